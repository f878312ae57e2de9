"""A folder of diffusers or transformers is looked through before either library opens it.

Refused are: code, and configurations that ask for code; files of weights that are damaged, or
pickles of more than tensors; and configurations that declare more than the weights hold.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fewstep.records import LARGEST, read_json, shown
from fewstep.tensors import read_header

__all__ = ["check_folder", "check_part", "check_pickle", "in_one_line"]

SAFE, PICKLED = (".safetensors",), (".bin", ".ckpt", ".pt", ".pth")
CODE = ("auto_map", "custom_pipelines", "custom_pipeline", "trust_remote_code")
LAYERS = re.compile(r"(layers|blocks)(_per_block)?$|^depth$")
WIDTHS = re.compile(r"(channels|_dim|vocab_size|hidden_size|intermediate_size|heads|embeddings)$")
LARGEST_SIDE = 16_384  # pixels


def check_folder(folder: Path) -> None:
    """A folder and the folders of its components.

    Raises:
        ValueError: that names the file, for what this module's docstring lists.
    """
    if not folder.is_dir():
        return
    for part in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        check_part(part)


def check_part(folder: Path) -> None:
    """One folder of configurations and weights. Raises: as `check_folder`."""
    if code := next(folder.glob("*.py"), None):
        raise ValueError(f"{code} is code beside weights, which is not executed; remove it")
    shapes = list(_shapes(folder))
    for path in sorted(folder.glob("*.json")):
        if path.stat().st_size > LARGEST or not _is_config(path.name):
            continue  # vocabularies and lists of files
        values = read_json(path, "a configuration")
        for name, value in _entries(values):
            if name in CODE and value:
                raise ValueError(
                    f"{path} has {name} = {shown(value)}: it asks for code beside weights, which "
                    "is never executed"
                )
            if isinstance(value, int) and not isinstance(value, bool):
                _check_size(path, name, value, shapes)


def check_pickle(path: Path) -> None:
    """Raise ValueError where a file of torch.save is damaged, or has more than tensors in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # pickles of another protocol
            torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"Unsupported (?:global|class)[^\n]*?([\w.]+) was not", str(error))
        what = f" ({found[1]})" if found else ""
        raise ValueError(
            f"{path} holds more than tensors{what}, which fewstep never executes; "
            "use the .safetensors of this model, or convert it where you trust it"
        ) from None
    except Exception as error:  # a pickle can fail in any way
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a TorchScript file, which is a program; give the model's weights"
            ) from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}); fetch it again") from None


def _is_config(name: str) -> bool:
    return name.endswith(("config.json", "model_index.json"))


def _shapes(folder: Path) -> Iterator[tuple[int, ...]]:
    """Of all tensors in the folder's safetensors; its pickles are checked, and tell none."""
    for path in sorted(folder.iterdir()):
        if path.suffix in SAFE and path.is_file():
            for entry in read_header(path).values():
                yield entry.shape
        elif path.suffix in PICKLED and path.is_file():
            check_pickle(path)


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values of a tree, with the last name on the way to each; `CODE` as it is."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in CODE:
                yield key, inner
            yield from _entries(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner, name)
    else:
        yield name, value


def _check_size(path: Path, name: str, value: int, shapes: list[tuple[int, ...]]) -> None:
    """Raise ValueError for a number that the weights cannot have, or that no picture has."""
    most = None
    if name == "sample_size" or name == "image_size":
        most = LARGEST_SIDE
    elif LAYERS.search(name):
        most = len(shapes) if shapes else 1000
    elif WIDTHS.search(name):
        most = max((max(shape, default=1) for shape in shapes), default=2**20) if shapes else 2**20
        most = max(most, 4096)
    if most is not None and value > most:
        what = f"and its weights have {len(shapes)} tensors" if LAYERS.search(name) else ""
        raise ValueError(f"{path}: {name} must be at most {most}, got {value} {what}".rstrip())


def in_one_line(error: BaseException) -> str:
    """An error of another library in one short line, without advice to load a pickle anyway."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "weights_only" in text:
        return "a file of weights holds more than tensors, which fewstep never executes"
    return text if len(text) <= 300 else text[:300] + " ..."
