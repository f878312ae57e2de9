"""Reading pipelines: a folder of diffusers, a single file of Stable Diffusion, a name on the hub.

What a folder holds is read from its model_index.json. Nothing in it is executed: classes come from
diffusers and transformers alone, weights from safetensors, or from pickles that hold nothing but
tensors (`weights_only`), always. `checks` looks through a folder before either library
opens it, and `contents` tells from its keys what a single file is.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep.extras import needs
from fewstep.files import file_hash
from fewstep.models.card import CARD_FILE, Card, Choice
from fewstep.models.components import pixels_per_latent, quiet, sample_sides
from fewstep.models.families import FAMILIES, Family
from fewstep.models.formats.checks import check_folder, in_one_line
from fewstep.models.formats.contents import declared
from fewstep.models.formats.loras import Lora, with_loras
from fewstep.models.formats.sources import (
    INDEX_FILE,
    LOAD_ERRORS,
    PICKLED,
    SAFE,
    Source,
    find_source,
)
from fewstep.models.pipeline import PipelineModel, Size, process_of
from fewstep.models.process import Process
from fewstep.models.students import as_lcm
from fewstep.models.texts import TextCache
from fewstep.networks.device import check_device
from fewstep.records import as_slug, check_slug, read_json, shown

__all__ = ["from_pipe", "load_pipeline", "weights_hash"]

WEIGHTS = re.compile(r"diffusion_pytorch_model(\.(?P<variant>[\w-]+?))?(-\d+-of-\d+)?\.\w+")
# Components that judge or watermark pictures, or read pictures in place of text.
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
LIBRARIES = ("diffusers", "transformers", "fewstep.integrations.diffusers")


def load_pipeline(
    name_or_path: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    compile: bool = False,
    *,
    config: str | Path | None = None,
    size: Size | None = None,
    slicing: bool = False,
    tiling: bool = False,
    loras: Sequence[tuple[Path | str, float]] = (),
    preset: str | None = None,
) -> PipelineModel:
    """Load a pipeline of diffusers, recognised by what it holds.

    Args:
        name_or_path: a folder with model_index.json, a .safetensors or .ckpt file with all of a
            Stable Diffusion, or a name on the Hugging Face hub
        device, dtype, compile: as in `fewstep.load`
        config: for a single file, a folder with the configurations and tokenizers of its class: a
            diffusers folder of the same class, its weights not needed
        size: (height, width) of the pictures in pixels; the size of training where left out
        slicing, tiling: decode one picture at a time, or each in overlapping tiles: less memory
        loras: files of adapters with a scale each, added to the weights
        preset: lcm: it is a latent consistency model, by its adapters too

    Raises:
        ValueError: for what is not a pipeline, classes and processes that fewstep does not run,
            missing components, damaged files, and pickles with anything but tensors in them.
    """
    if preset not in (None, "lcm"):
        raise ValueError(f"preset of a pipeline must be lcm, got {preset!r}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    place = check_device(device)
    _import_diffusers(name_or_path)
    source = find_source(name_or_path, config)
    index, family = read_index(source)
    check_components(source, index, family)
    check_folder(source.folder)
    pipe = _read(source, index, family, dtype)
    if source.single is not None:
        _apply_marks(pipe, source, given=config is not None)
    check_network(source.where, getattr(pipe, family.network))
    vae = getattr(pipe, family.autoencoder) if family.autoencoder else None
    if vae is not None and slicing:
        vae.enable_slicing()
    if vae is not None and tiling:
        vae.enable_tiling()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(place).eval().requires_grad_(False)
    digest = weights_hash(source, family, dtype)
    model = _model(pipe, family, source.name, digest, size, compile)
    model = replace(model, card=_told(model.card, source))
    if loras:
        model = with_loras(model, [Lora(Path(path), scale) for path, scale in loras])
    if preset is None:
        return model
    return replace(model, card=as_lcm(model.card, model.process.schedule))


def from_pipe(pipe: Any, *, size: Size | None = None, compile: bool = False) -> PipelineModel:
    """The model of a pipeline that is in memory; its parts are shared, and left as they are.

    Texts are encoded anew at each call, since the text encoders may change between two. The card
    has no hash of a file of weights. A learned solver is told apart by the weights in memory, see
    `fewstep.models.identity`.

    Args:
        pipe: of one of the classes that `load_pipeline` reads; what was changed on it (adapters,
            device, dtype, slicing) holds
        size, compile: as in `load_pipeline`

    Raises:
        ValueError: for other classes, and processes that fewstep does not run.
    """
    kind = type(pipe).__name__
    if kind not in FAMILIES:
        raise ValueError(f"pipe is a {kind}; fewstep runs {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    net = getattr(pipe, family.network)
    check_network(kind, net)
    return replace(_model(pipe, family, kind, "", size, compile), texts=TextCache(limit=0))


def _model(
    pipe: Any, family: Family, name: str, digest: str, size: Size | None, compile: bool
) -> PipelineModel:
    net = getattr(pipe, family.network)
    vae = getattr(pipe, family.autoencoder) if family.autoencoder else None
    height, width = size or [side * pixels_per_latent(vae) for side in sample_sides(net)]
    process = process_of(pipe, family, (height, width))
    card = _card(name, type(pipe).__name__, family, net, process, digest)
    forward = torch.compile(net) if compile else net
    return PipelineModel(card, pipe, family, process, (height, width), forward)


def read_index(source: Source) -> tuple[dict[str, Any], Family]:
    """The model_index.json and the family of its class.

    Raises:
        ValueError: it is missing or damaged, of an unknown class, or wants code that is not
            diffusers' or transformers'.
    """
    path = source.folder / INDEX_FILE
    if not path.is_file():
        raise ValueError(
            f"{source.folder} is not a pipeline folder: one holds {INDEX_FILE}, and a folder with "
            "config and weights for each component (unet, vae, scheduler, ...)"
        )
    index = read_json(path, "the index of a pipeline")
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"{source.folder} is a pipeline of class {name!r}; fewstep runs {', '.join(FAMILIES)}"
        )
    for part, entry in _components(index).items():
        if part not in LEFT_OUT and entry[0] not in LIBRARIES:  # and see `checks` for code
            raise ValueError(
                f"{path}: {part} is of module {entry[0]!r}, and fewstep takes classes from "
                "diffusers and transformers alone, since code beside weights is not executed"
            )
        if str(entry[1]).endswith("Pipeline"):
            raise ValueError(
                f"{path}: {part} is a pipeline of its own, {entry[1]!r}, and is not read"
            )
        if not (check_slug("component", part) and isinstance(entry[1], str)):
            raise ValueError(f"{path}: {part} must name a class, got {shown(entry[1])}")
    return index, FAMILIES[name]


def check_components(source: Source, index: dict[str, Any], family: Family) -> None:
    """Raise ValueError that names the component that the index or the folder lacks."""
    there = _components(index)
    for part in (*family.needs, "scheduler"):
        home = source.folder / part
        file = source.folder / ("scheduler_config.json" if part == "scheduler" else "config.json")
        if part not in there or not (home.is_dir() or file.is_file()):
            what = "its index names none" if part not in there else f"there is no folder {home}"
            raise ValueError(
                f"{source.folder} has no {part} ({what}); a {index['_class_name']} needs "
                f"{', '.join(family.needs)} and scheduler"
            )


def _components(index: dict[str, Any]) -> dict[str, list[str]]:
    """The entries of the index that name a class: [library, class]."""
    return {
        name: value
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[0] is not None
    }


def _import_diffusers(name_or_path: str | Path) -> None:
    there = Path(name_or_path).exists()
    absent = "" if there else f"there is no folder {str(name_or_path)!r}, and "
    with needs("diffusers", f"{absent}a pipeline"):
        import diffusers  # noqa: F401
        import transformers  # noqa: F401


def _apply_marks(pipe: Any, source: Source, given: bool) -> None:
    """Set the scheduler to what a single file says of itself by its keys.

    Args:
        given: whether the configuration is one that the caller named

    Raises:
        ValueError: the two contradict each other, and for a process that fewstep does not run.
    """
    assert source.single is not None
    wanted = declared(source.single)
    config = pipe.scheduler.config
    said = read_json(source.folder / "scheduler" / "scheduler_config.json", "a configuration")
    for name, value in wanted.items():
        if given and said.get(name, value) != value:
            raise ValueError(
                f"{source.single} says {name} = {value}, and the configuration in "
                f"{source.folder} says {said[name]}; correct that"
            )
    if wanted:
        pipe.scheduler = type(pipe.scheduler).from_config(config, **wanted)


def network_files(source: Source, family: Family) -> tuple[dict[str | None, list[Path]], Path]:
    """The network's weight files by variant (None: without), and their folder."""
    home = source.folder / family.network
    home = home if home.is_dir() else source.folder
    found: dict[str | None, list[Path]] = {}
    for kinds in (SAFE, PICKLED):
        for file in sorted(home.iterdir()):
            match = WEIGHTS.fullmatch(file.name)
            if match and file.suffix in kinds:
                found.setdefault(match["variant"], []).append(file)
        if found:
            break
    return found, home


def _variant(source: Source, family: Family, dtype: str) -> str | None:
    """Which variant of the weights to read: the one for the dtype, else the plain one, else what
    there is."""
    found, home = network_files(source, family)
    if not found:
        raise ValueError(
            f"{home} has no weights; it needs a diffusion_pytorch_model.safetensors, or its parts"
        )
    half = {"float16": "fp16", "bfloat16": "bf16"}.get(dtype)
    for wanted in (half, None, *sorted(str(name) for name in found)):
        if wanted in found:
            return wanted
    return None


def _read(source: Source, index: dict[str, Any], family: Family, dtype: str) -> Any:
    """The pipeline, on the CPU, without the components that fewstep leaves out."""
    import diffusers

    with quiet():
        kind = getattr(diffusers, index["_class_name"], None)
    if kind is None:
        raise ValueError(
            f"{source.where} is a {index['_class_name']}, which diffusers {diffusers.__version__} "
            "does not have; install a newer one"
        )
    options: dict[str, Any] = dict.fromkeys(LEFT_OUT[:1]) if "safety_checker" in index else {}
    options |= {name: None for name in LEFT_OUT[1:] if name in index}
    there = _components(index)
    options |= {
        name: None
        for name in family.optional
        if name not in there or not (source.folder / name).is_dir()
    }
    if "requires_safety_checker" in index:
        options["requires_safety_checker"] = False
    options |= {**family.options, _dtype_key(): getattr(torch, dtype)}
    try:
        with _loading():
            if source.single is not None:
                return kind.from_single_file(
                    str(source.single), config=str(source.folder), local_files_only=True, **options
                )
            options |= {"variant": _variant(source, family, dtype), "local_files_only": True}
            return kind.from_pretrained(str(source.folder), trust_remote_code=False, **options)
    except LOAD_ERRORS as error:
        reason = in_one_line(error)
        raise ValueError(f"{source.where} cannot be loaded as {kind.__name__}: {reason}") from None


@contextmanager
def _loading() -> Iterator[None]:
    import diffusers.utils.logging

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names of arguments that are to change
        # it calls the lack of a safetensors file an error where there is a pickle
        diffusers.utils.logging.set_verbosity(logging.CRITICAL)
        yield


def _dtype_key() -> str:
    import diffusers

    return "torch_dtype" if diffusers.__version__.startswith("0.") else "dtype"


def check_network(where: str | Path, net: Any) -> None:
    """Raise ValueError for a network that wants more than x_t, t and text."""
    config = net.config
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        raise ValueError(
            f"{where}: its network wants class labels, which fewstep does not give to pipelines"
        )
    inputs, outputs = config.in_channels, config.get("out_channels") or config.in_channels
    if outputs not in (inputs, 2 * inputs):
        raise ValueError(
            f"{where}: its network reads {inputs} channels and writes {outputs}, so it is "
            "made for in-painting or editing, which fewstep does not run"
        )


def _card(name: str, kind: str, family: Family, net: Any, process: Process, digest: str) -> Card:
    flow = process.prediction == "flow"
    card = Card(
        name=as_slug(name),
        network={"class": type(net).__name__},
        summary=f"{kind} of diffusers, {process.prediction} prediction",
        sigma_min=process.sigma_min,
        sigma_max=process.sigma_max,
        sigma_data=1.0 if family.autoencoder else 0.5,
        feature_module=family.tap(net),
        weights_sha256=digest,
        # The network's own time is the usual grid for such networks, and the only sensible one
        # where sigma_max is huge (flows, zero terminal SNR).
        grid="trailing",
        end="zero",
        auto={"1": Choice("dpmpp-2m")},
        about={"pipeline": kind, "prediction": process.prediction, "flow": flow},
        kind="pipeline",
    )
    return as_lcm(card, process.schedule) if net.config.get("time_cond_proj_dim") else card


def _told(card: Card, source: Source) -> Card:
    """The card with what a card.json in the folder adds: names, figures and the best settings.

    Errors: ValueError where that is the card of other weights.
    """
    if source.single is not None or not (source.folder / CARD_FILE).is_file():
        return card
    said = Card.read(source.folder)
    if said.kind != card.kind or said.weights_sha256 != card.weights_sha256:
        raise ValueError(
            f"{source.folder / CARD_FILE} is not the card of the pipeline beside it "
            "(its kind or the weights' SHA-256 differs); remove it, or fetch both again"
        )
    return replace(
        card,
        name=said.name,
        summary=said.summary,
        network=said.network,
        auto=card.auto | said.auto,
        screened=said.screened,
        distilled=said.distilled or card.distilled,
        about=card.about | said.about,
        folder=said.folder,
    )


def weights_hash(source: Source, family: Family, dtype: str) -> str:
    """SHA-256 of the denoising network's weights, or of the single file; of the list of hashes
    where they are in parts."""
    if source.single is not None:
        return file_hash(source.single)
    found, _ = network_files(source, family)
    hashes = [file_hash(path) for path in found[_variant(source, family, dtype)]]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
