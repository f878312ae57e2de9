"""How models lie on disk: a file for each format, and a line in `FORMATS`.

A format is told from what is there, never from what a name suggests: a folder by its index, a
file by its content (`fewstep.models.formats.contents`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.models.card import CARD_FILE
from fewstep.models.formats.contents import recognise

__all__ = ["FORMATS", "Format", "format_of", "load_single"]


@dataclass(frozen=True)
class Format:
    """One way in which a model lies on disk.

    name: in messages
    fits: whether this path is of that format
    home: module and function that load it, "module:function", called with (path, device, dtype,
        compile, **options)
    options: the names of further options
    """

    name: str
    fits: Callable[[Path], bool]
    home: str
    options: tuple[str, ...] = ()

    def load(self, path: Path | str, device: str, dtype: str, compile: bool, **options: Any) -> Any:
        """The model.

        Raises:
            ValueError: for options that the format does not have.
        """
        if unknown := [name for name in options if name not in self.options]:
            have = f"it has {', '.join(self.options)}" if self.options else "leave them out"
            raise ValueError(f"{', '.join(unknown)}: {self.name} has no such options; {have}")
        module, _, function = self.home.partition(":")
        return getattr(importlib.import_module(module), function)(
            path, device, dtype, compile, **options
        )


PIPELINE_OPTIONS = ("config", "size", "slicing", "tiling", "loras", "preset")
PIPELINE = "fewstep.models.formats.diffusers:load_pipeline"
PAPER = "fewstep.models.formats.papers:load_file"
FORMATS = (
    Format(
        "a pipeline of diffusers",  # with a card beside its index, or without
        lambda path: path.is_dir() and (path / "model_index.json").is_file(),
        PIPELINE,
        PIPELINE_OPTIONS,
    ),
    Format(
        "a model folder of fewstep",
        lambda path: (path / CARD_FILE).is_file(),
        "fewstep.models.formats.native:load_folder",
    ),
    Format(
        "a single file",
        lambda path: path.is_file(),
        "fewstep.models.formats:load_single",
        (*PIPELINE_OPTIONS, "classifier", "vae", "guide"),
    ),
)


def load_single(path: Path, device: str, dtype: str, compile: bool, **options: Any) -> Any:
    """The model in a file, by the reader of its kind; a pipeline's where none has one.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is damaged, or of a kind that nothing here reads, and for options that
            its reader does not have.
    """
    kind, _ = recognise(path)
    if kind is None or not kind.source:
        whole = Format("a pipeline in one file", Path.is_file, PIPELINE, PIPELINE_OPTIONS)
    else:
        whole = Format(kind.name, Path.is_file, PAPER, kind.options)
    return whole.load(path, device, dtype, compile, **options)


def format_of(path: Path) -> Format | None:
    """The format of what lies there; None where none fits."""
    return next((one for one in FORMATS if one.fits(path)), None)
