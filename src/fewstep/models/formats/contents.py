"""What a file of weights is, told from its content: nothing in it runs, and no tensor is read.

A file is safetensors, a zip of torch.save, or a bare pickle. Of the first the header is read; of
the others the pickle, by a reader for which every class and function is an inert stand-in. The
names of its tensors then say which kind of checkpoint it is: one line of `KINDS` each.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.records import shown
from fewstep.tensors import read_header

__all__ = ["KINDS", "Contents", "Kind", "recognise", "tensor_names"]

LARGEST = 16 * 2**20  # bytes of the pickle in a file, whose tensors lie beside it
DEEPEST = 8  # levels at which tensors are looked for


@dataclass(frozen=True)
class Contents:
    """What is in a file.

    names: of its tensors
    classes: what a pickle names beside torch's own, "module.name"
    """

    names: frozenset[str]
    classes: frozenset[str] = field(default_factory=frozenset)

    def has(self, *parts: str) -> bool:
        """Whether each of these is the begin of a tensor's name."""
        return all(any(name.startswith(part) for name in self.names) for part in parts)

    def holds(self, part: str) -> bool:
        """Whether this is a part of a tensor's name."""
        return any(part in name for name in self.names)


@dataclass(frozen=True)
class Kind:
    """One kind of checkpoint.

    name: in a message, after "is"
    is_it: told from the contents; the first of `KINDS` that fits is meant
    advice: what to do instead, where fewstep has no reader for it
    """

    name: str
    is_it: Callable[[Contents], bool]
    advice: str = ""


def _sd(parts: Iterable[str]) -> Callable[[Contents], bool]:
    return lambda c: c.has("model.diffusion_model.", *parts)


ALONE = "it lacks {}; load the whole model, a folder of diffusers or a file with all its parts"
KINDS: tuple[Kind, ...] = (
    Kind(
        "a LoRA",
        lambda c: any(map(c.holds, ("lora_up.", "lora_A.", ".lora.up", "lora_B.", "hada_w1"))),
        "it is an addition to a model; load that model's own files",
    ),
    Kind(
        "a network pickle of NVlabs/edm, edm2 or diff-sampler",
        lambda c: any("persistence" in name for name in c.classes),
        "it holds its network as a program, which fewstep never runs",
    ),
    Kind(
        "a Flux",
        lambda c: c.holds("double_blocks."),
        "fewstep does not run this family",
    ),
    Kind(
        "a Stable Diffusion 3 in one file",
        lambda c: c.has("model.diffusion_model.joint_blocks."),
    ),
    Kind(
        "a Stable Diffusion in one file",
        lambda c: (
            c.has("model.diffusion_model.", "first_stage_model.")
            and (c.has("cond_stage_model.") or c.has("conditioner."))
        ),
    ),
    Kind(
        "a latent diffusion of CompVis",
        lambda c: c.has("model.diffusion_model.", "first_stage_model.quantize."),
        "fewstep does not read this format; convert it to a folder of diffusers",
    ),
    Kind(
        "a Stable Diffusion without its text encoder",
        _sd(["first_stage_model."]),
        ALONE.format("cond_stage_model.* or conditioner.*"),
    ),
    Kind(
        "a Stable Diffusion without its autoencoder",
        lambda c: (
            c.has("model.diffusion_model.")
            and (c.has("cond_stage_model.") or c.has("conditioner."))
        ),
        ALONE.format("first_stage_model.*"),
    ),
    Kind(
        "the U-Net of a Stable Diffusion alone",
        _sd([]),
        ALONE.format("first_stage_model.*, cond_stage_model.* or conditioner.*"),
    ),
    Kind(
        "a state dict of openai/guided-diffusion or consistency_models",
        lambda c: c.has("input_blocks.0.0.", "time_embed.0."),
        "fewstep does not read this format; convert it to a folder of diffusers",
    ),
    Kind(
        "one component in diffusers' names",
        lambda c: c.has("conv_in.") and (c.has("down_blocks.") or c.has("encoder.")),
        "give the folder of the pipeline that it belongs to",
    ),
    Kind(
        "a text encoder alone",
        lambda c: c.has("text_model.") or c.has("encoder.block."),
        "give the folder of the pipeline that it belongs to",
    ),
)


def recognise(path: Path) -> tuple[Kind | None, Contents]:
    """The kind of a file, None where none fits, and what is in it.

    Raises:
        ValueError: that names the file, where it is damaged or no file of weights.
    """
    contents = tensor_names(path)
    return next((kind for kind in KINDS if kind.is_it(contents)), None), contents


def tensor_names(path: Path) -> Contents:
    """The names of the tensors in a file. Raises: as `recognise`."""
    with open(path, "rb") as file:
        start = file.read(16)
    if start[8:9] == b"{":
        return Contents(frozenset(read_header(path)))
    if start[:4] == b"PK\x03\x04":
        return _of_pickle(path, _zipped(path))
    if start[:1] == b"\x80":
        with open(path, "rb") as file:
            return _of_pickle(path, file.read(LARGEST + 1))
    raise ValueError(
        f"{path} cannot be read: it is neither safetensors, nor of torch.save, nor a pickle; fetch "
        "it again"
    )


def _zipped(path: Path) -> bytes:
    """The pickle in a zip of torch.save, of which no more is unpacked than is allowed."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith("data.pkl") and info.filename.count("/") <= 1:
                    with archive.open(info) as file:
                        return file.read(LARGEST + 1)
            inner = [info.filename for info in archive.infolist()][:3]
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); fetch it again") from None
    raise ValueError(
        f"{path} is a zip without weights of torch.save ({shown(inner)}); unpack it and "
        "give the file in it"
    )


class Inert(dict):  # type: ignore[type-arg]
    """Stands for whatever a pickle names; it takes everything and does nothing."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any, **values: Any) -> Inert:
        return Inert()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.update(state)

    def append(self, value: Any) -> None:
        """Nothing."""

    def extend(self, values: Any) -> None:
        """Nothing."""


class Tensor(Inert):
    """Stands for a tensor."""


class _Names(pickle.Unpickler):
    """Reads a pickle in which every class, function and storage is a stand-in."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.classes: set[str] = set()

    def find_class(self, module: str, name: str, /) -> Any:
        if module == "torch._utils" and name.startswith("_rebuild"):
            return Tensor
        if not module.startswith(("torch.", "collections", "numpy")) and module != "torch":
            self.classes.add(f"{module}.{name}"[:200])
        return Inert

    def persistent_load(self, pid: Any, /) -> Any:
        return Inert()


def _of_pickle(path: Path, data: bytes) -> Contents:
    if len(data) > LARGEST:
        raise ValueError(f"{path} has a pickle of more than {LARGEST} bytes, and is not read")
    try:
        _check_sizes(data)
        reader = _Names(data)
        root = reader.load()
    except Exception as error:  # a pickle can ask for any operation on the stand-ins
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}); fetch it again") from None
    return Contents(frozenset(_names_in(root)), frozenset(reader.classes))


def _check_sizes(data: bytes) -> None:
    """Raise ValueError for a pickle whose memo would take more memory than the file."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise ValueError(f"its memo has an index of {argument}")


def _names_in(root: Any) -> set[str]:
    """Names of the tensors in nested mappings; those of a state dict stand as they are."""
    found: set[str] = set()
    level: list[tuple[str, Any]] = [("", root)]
    for _ in range(DEEPEST):
        inner: list[tuple[str, Any]] = []
        for prefix, node in level:
            if isinstance(node, Tensor):
                found.add(prefix)
            elif isinstance(node, Mapping) and len(inner) < 1_000_000:
                named = prefix if prefix not in ("state_dict", "ema", "model") else ""
                inner += [
                    (f"{named}.{key}" if named else str(key), value) for key, value in node.items()
                ]
        level = inner
    return found
