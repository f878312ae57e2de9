"""Models by name or path: `load`, and the protocol that everything else relies on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fewstep._lazy import lazily
from fewstep.arguments import either, place
from fewstep.models.card import CARD_FILE, Card
from fewstep.models.formats import format_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from fewstep.denoiser import Denoiser
    from fewstep.models.formats.diffusers import from_pipe
    from fewstep.models.own import fingerprint, of

__all__ = [
    "Card",
    "Model",
    "PictureModel",
    "builtin",
    "fingerprint",
    "from_pipe",
    "is_model",
    "load",
    "of",
    "read_card",
    "students_of",
    "teacher_of",
]

BUILTIN = Path(__file__).parent / "builtin"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name


class Model(Protocol):
    """What sampling needs of a model. `denoiser(...)` gives D(x, sigma) with the conditions filled
    in."""

    @property
    def card(self) -> Card: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def denoiser(
        self,
        label: Any = None,
        prompt: Any = None,
        guidance: Any = None,
        *,
        negative: Any = None,
    ) -> Denoiser: ...
    def prior(
        self, seeds: Sequence[int], sigma: float | None = None, label: Any = None
    ) -> Tensor: ...
    def decode(self, x: Tensor) -> np.ndarray: ...


class PictureModel(Model, Protocol):
    """What it needs besides to start from pictures of the shape `picture`, (h, w, c)."""

    @property
    def picture(self) -> tuple[int, int, int]: ...
    def level(self, strength: float) -> float: ...
    def start(self, images: Any, seeds: Sequence[int], strength: float) -> tuple[Tensor, float]: ...


def builtin() -> list[str]:
    """Names of the models that ship with fewstep."""
    return sorted(path.parent.name for path in BUILTIN.glob(f"*/{CARD_FILE}"))


def students_of(card: Card) -> list[str]:
    """Names of those that were distilled from a model with these weights and ship with fewstep."""
    found = ((name, read_card(name).distilled) for name in builtin())
    return [name for name, how in found if how and how.teacher_weights == card.weights_sha256]


def teacher_of(card: Card, teacher: str | Path | None = None, **options: Any) -> Model:
    """The model that a student was distilled from, loaded.

    Args:
        card: of the student
        teacher: its name or path; a built-in one is found by what the card says
        options: of `load`

    Raises:
        ValueError: the card is of no student; the teacher is not built in and not given, or has
            other weights.
    """
    how = card.distilled
    if how is None:
        raise ValueError(f"{card.name} is no student, so it has no teacher; leave the teacher out")
    if teacher is None:
        built_in = how.teacher in builtin()
        if not built_in or read_card(how.teacher).weights_sha256 != how.teacher_weights:
            raise ValueError(
                f"{card.name} is a student of {how.teacher} ({how.teacher_weights[:8]}), which "
                "does not come with fewstep; name its folder (--teacher-model)"
            )
    model = load(how.teacher if teacher is None else teacher, **options)
    if how.teacher_weights and model.card.weights_sha256 != how.teacher_weights:
        raise ValueError(
            f"{card.name} is a student of {how.teacher} ({how.teacher_weights[:8]}), and "
            f"{model.card.name} has other weights ({model.card.weights_sha256[:8]}); name the "
            "folder of its teacher (--teacher-model)"
        )
    return model


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    compile: bool = False,
    **options: Any,
) -> Model:
    """Load a built-in model by name, a model folder by path, or a pipeline of diffusers.

    Nothing in a folder is executed.

    Args:
        name_or_path: for a pipeline, its folder, the .safetensors or .ckpt file of a Stable
            Diffusion, or its name on the Hugging Face hub
        device: a torch device
        dtype: the network's arithmetic, float32, bfloat16 or float16, or torch's own (the sampled
            state stays float32)
        compile: torch.compile the network, worth it for many pictures
        options: for pipelines: config, size, slicing, tiling; see `load_pipeline` in
            `fewstep.models.formats.diffusers`

    Raises:
        ValueError: there is no such model (with the nearest names), no such device, or its files
            are damaged.
    """
    for what, given in (("device", device), ("dtype", dtype)):
        if not isinstance(given, str) and type(given).__name__ != what:  # torch.device, torch.dtype
            raise ValueError(f"{what} must be its name or torch's own, got {given!r:.80}")
    device, dtype = str(device), str(dtype).removeprefix("torch.")
    either("compile", compile)
    name = str(place("a model's name or folder", name_or_path))
    path = BUILTIN / name if name in builtin() else Path(name_or_path)
    if (found := format_of(path)) is not None:
        return found.load(path, device, dtype, compile, **options)
    if path.exists() or HUB_NAME.fullmatch(name) is None:
        _folder(name_or_path)  # raises, and says why
    from fewstep.models.formats.diffusers import load_pipeline

    return load_pipeline(name, device, dtype, compile, **options)


def is_model(name_or_path: str | Path) -> bool:
    """Whether this names a built-in model or a model folder."""
    return str(name_or_path) in builtin() or (Path(name_or_path) / CARD_FILE).is_file()


def read_card(name_or_path: str | Path) -> Card:
    """The card of a model, by name or path, without its weights. Errors as in `load`."""
    return Card.read(_folder(name_or_path))


def _folder(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    if name in builtin():
        return BUILTIN / name
    folder = Path(name_or_path)
    if not folder.exists():
        near = difflib.get_close_matches(name, builtin(), n=3, cutoff=0.4)
        hint = f"; the nearest: {', '.join(near)}" if near else ""
        raise ValueError(
            f"there is no model called {name!r} and no such folder{hint} "
            "(`fewstep models` lists the built-in ones)"
        )
    if not (folder / CARD_FILE).is_file():
        raise ValueError(
            f"{folder} is not a model folder: it has no {CARD_FILE}, and no model_index.json as a "
            "pipeline of diffusers has"
        )
    return folder


__getattr__ = lazily(
    __name__,
    {
        "fewstep.models.formats.diffusers": ("from_pipe",),
        "fewstep.models.own": ("fingerprint", "of"),
    },
)
