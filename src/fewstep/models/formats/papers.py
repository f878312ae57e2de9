"""Files of networks of papers: what they are, their networks, and our folders of them.

A file is read as data (`fewstep.pickles`); what it is follows from what it holds. The weights stay
in the file until the network takes them, one tensor at a time.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.files import file_hash
from fewstep.models.card import Card
from fewstep.models.edm_spec import card_of
from fewstep.models.formats.adm_settings import Unsaid
from fewstep.models.formats.contents import recognise
from fewstep.models.formats.nvlabs import preset_of, read
from fewstep.pickles import Pickled, Tensor, stream
from fewstep.pickles import read as read_pickle
from fewstep.text import clean

if TYPE_CHECKING:
    import torch

    from fewstep.models.network import NetworkModel

__all__ = ["Source", "describe", "load_file", "open_pickle", "open_source"]

GUIDE, VAE = "guide.", "vae."
BUFFERS = ("resample_filter", "freqs", "phases")


@dataclass(frozen=True, eq=False)
class Source:
    """A network in a file, whose weights are still there.

    card: what is known of it
    preset: the published settings that it has; None where they are of its own
    shapes: of all its tensors, by our names
    values: gives them one after the other
    """

    path: Path
    card: Card
    preset: str | None
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    values: Callable[[], Iterable[tuple[str, torch.Tensor]]] = field(repr=False)

    @property
    def parameters(self) -> int:
        """How many the network itself has."""
        others = (GUIDE, VAE, "classifier.", "first_stage.")
        return sum(
            math.prod(shape)
            for name, shape in self.shapes.items()
            if not name.startswith(others) and not name.endswith(BUFFERS)
        )

    def model(
        self, device: str = "cpu", dtype: str = "float32", compile: bool = False
    ) -> NetworkModel:
        """The model, with its weights.

        Raises:
            ValueError: where the weights do not go with the settings.
        """
        from fewstep.models.formats import native
        from fewstep.networks.device import check_device, check_dtype

        arithmetic, place = check_dtype(dtype), check_device(device)
        try:
            kind = native.kind_of(self.card)
            parts = kind.parts(self.card, len(self.shapes))
            native.check_shapes(native.shapes_of(parts), self.shapes)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{clean(self.path)}: {reason}") from None
        native.fill(parts, {name: native.laid_out(value) for name, value in self.values()})
        return kind.model(self.card, parts, {}, place, arithmetic, compile)


def load_file(
    path: Path | str,
    device: str = "cpu",
    dtype: str = "float32",
    compile: bool = False,
    **options: Any,
) -> NetworkModel:
    """The model in a file.

    Args:
        path: of the file
        device: a torch device
        dtype: the network's arithmetic
        compile: torch.compile the network
        options: as of `open_source`

    Raises:
        OSError: where a file cannot be read.
        ValueError: as `open_source` and `Source.model`.
    """
    return open_source(path, **options).model(device, dtype, compile)


def describe(path: Path | str, **options: Any) -> tuple[Card | None, dict[str, Any]]:
    """What a file is, without its network: its card; kind, preset, parameters. Without a card,
    where it leaves something unsaid, which is then told, with the presets to choose from.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it holds none of these networks.
    """
    try:
        source = open_source(path, **options)
    except Unsaid as unsaid:
        from fewstep.models.formats.adm import known as of_adm

        return None, {"file": str(path), **of_adm(path), "unsaid": str(unsaid)}
    known = {"file": str(path), "kind": source.card.kind, "preset": source.preset}
    return source.card, {**known, "parameters": source.parameters}


def open_source(path: Path | str, **options: Any) -> Source:
    """Read what a file holds.

    Args:
        path: of the file
        options: preset, the name of published settings that it must have; vae, a folder of
            diffusers with Stable Diffusion's autoencoder, for states that are latents; guide, a
            file with the second network of guidance; config and classifier, as of
            `fewstep.models.formats.adm.open_source`

    Raises:
        OSError: where a file cannot be read.
        ValueError: where a file holds none of these networks, contradicts what it is said to be, or
            has no such option.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{clean(path)} is no file; give a network file of a paper")
    kind, _ = recognise(path)
    if kind is None or not kind.source:
        what = f"is {kind.name}" if kind else "is no network that fewstep knows"
        raise ValueError(f"{clean(path)} {what}; a network file of a paper is meant here")
    if unknown := [name for name in options if name not in kind.options]:
        have = ", ".join(kind.options)
        raise ValueError(f"{', '.join(unknown)}: {kind.name} has no such options; it has {have}")
    module, _, function = kind.source.partition(":")
    return getattr(importlib.import_module(module), function)(path, **options)


def open_pickle(
    path: Path,
    preset: str | None = None,
    vae: Path | str | None = None,
    guide: Path | str | None = None,
) -> Source:
    """What a network pickle of NVlabs holds. Arguments and errors as of `open_source`."""
    file = read_pickle(path)
    spec, tensors = read(file, preset)
    named: list[tuple[Pickled, dict[str, Tensor]]] = [(file, tensors)]
    if guide is not None:
        other = read_pickle(guide)
        theirs, weights = read(other)
        spec = replace(spec, guide={"kind": theirs.kind, **asdict(theirs)})
        named.append((other, {GUIDE + name: tensor for name, tensor in weights.items()}))
    shapes = {name: one.shape for _, part in named for name, one in part.items()}
    extra: dict[str, torch.Tensor] = {}
    if vae is not None:
        from fewstep.models.formats.vaes import read_autoencoder

        if not spec.latent:
            raise ValueError(f"{clean(path)} makes pictures without an autoencoder; leave out vae")
        config, extra = read_autoencoder(Path(vae))
        spec = replace(spec, vae=config)
        extra = {VAE + name: value for name, value in extra.items()}
        shapes |= {name: tuple(value.shape) for name, value in extra.items()}

    def values() -> Iterable[tuple[str, torch.Tensor]]:
        for one, part in named:
            yield from stream(one, part)
        yield from extra.items()

    card = card_of(spec, path.stem, file_hash(path), source=path.name)
    return Source(path, card, preset_of(spec), shapes, values)
