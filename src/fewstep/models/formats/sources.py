"""Where a pipeline's files are: a folder, one file beside configurations, or the hub's cache."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from fewstep.models.components import quiet
from fewstep.models.formats.checks import check_pickle, in_one_line
from fewstep.models.formats.contents import recognise
from fewstep.records import shown

__all__ = ["INDEX_FILE", "LOAD_ERRORS", "PICKLED", "SAFE", "Source", "find_source"]

INDEX_FILE = "model_index.json"
SAFE, PICKLED = (".safetensors",), (".bin", ".ckpt", ".pt", ".pth", ".pkl")
CONFIG_FILES = ["*.json", "*/*.json", "*/*.txt", "*/*.model"]
LOAD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
    RuntimeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class Source:
    """A pipeline on disk.

    name: for the record
    folder: with model_index.json and the configurations
    single: the file with all weights, where they are not in the folder
    """

    name: str
    folder: Path
    single: Path | None = None

    @property
    def where(self) -> Path:
        return self.single or self.folder


def find_source(name_or_path: str | Path, config: str | Path | None) -> Source:
    """Where the files are; a hub name is fetched first."""
    path = Path(name_or_path)
    if path.is_dir():
        if config is not None:
            raise ValueError(
                f"{path} is a folder, which has its own configuration; leave out config"
            )
        return Source(path.name or str(path), path)
    if path.is_file():
        if path.suffix not in SAFE + PICKLED:
            raise ValueError(
                f"{path} is not a file of weights; a single file is .safetensors or .ckpt"
            )
        _check_single(path)
        return Source(path.name, _config_folder(path, config), path)
    return Source(str(name_or_path), _fetch(str(name_or_path)))


def _fetch(name: str) -> Path:
    """A hub name's files, from the cache or from the hub."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        with quiet():
            return Path(DiffusionPipeline.download(name))
    except Exception as error:  # the client's errors are of many libraries
        raise ValueError(
            f"there is no folder {name!r}, and the hub did not give it ({in_one_line(error)}); "
            "fetch it where there is a network and give its folder"
        ) from None


def _check_single(path: Path) -> None:
    """Raise ValueError where the file is damaged, of another kind, or a pickle of more than
    tensors."""
    kind, contents = recognise(path)
    if kind is not None and kind.advice:
        raise ValueError(f"{path} is {kind.name}: {kind.advice}")
    if path.suffix not in SAFE:
        check_pickle(path)
    if kind is None:
        some = ", ".join(map(shown, sorted(contents.names)[:3])) or "none"
        raise ValueError(f"{path} is no model that fewstep knows; its tensors: {some[:200]}")


def _config_folder(path: Path, config: str | Path | None) -> Path:
    """The folder of configurations that goes with a single file."""
    if config is not None:
        if Path(config).is_dir():
            return Path(config)
        if Path(config).exists():
            raise ValueError(f"config must be a folder with {INDEX_FILE}, got the file {config}")
        repository = str(config)
    else:
        repository = _usual_config(path)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=CONFIG_FILES))
    except Exception as error:  # the client's errors are of many libraries
        raise ValueError(
            f"{path} has weights but no configuration, and the hub did not give {repository!r} "
            f"({in_one_line(error)}); pass config=FOLDER, a diffusers folder of the same class"
        ) from None


def _usual_config(path: Path) -> str:
    """The hub's name for the configurations of a file's class, guessed by diffusers from its
    keys."""
    from diffusers.loaders import single_file_utils as utils

    try:
        checkpoint = utils.load_single_file_checkpoint(str(path), local_files_only=True)
        return utils.fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"]
    except LOAD_ERRORS as error:
        raise ValueError(
            f"the class of {path} cannot be told from its keys ({in_one_line(error)}); pass "
            "config=FOLDER, a diffusers folder of the same class"
        ) from None
