"""What a file of weights is, told from its content: nothing in it runs, and no tensor is read.

A file is safetensors, a file of torch.save, or a bare pickle. Of the first the header is read, of
the others the records that `fewstep.pickles` makes of them. The names of the tensors then say which
kind of checkpoint it is: one line of `KINDS` each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.pickles import Pickled, is_pickle, named, read
from fewstep.tensors import read_header, read_metadata

__all__ = ["KINDS", "Contents", "Kind", "declared", "of_pickle", "recognise", "tensor_names"]

MODELSPEC = {  # of modelspec.prediction_type, in the metadata of safetensors
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
}
SIGNS = {  # how files begin that stand in the place of weights, in lower case
    b"<": "it is a web page, not what was linked on it; fetch the file itself",
    b"version https://": "it is a pointer of Git LFS; fetch the file itself: git lfs pull",
    b"gguf": "it is a GGUF of another runtime; fetch the safetensors of this model",
    b"{": "it is JSON, not weights; give the folder that it is in, or the weights beside it",
}


@dataclass(frozen=True)
class Contents:
    """What is in a file.

    names: of its tensors
    classes: what a pickle names, "module.name"
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
    source: module and function that open it as a network of a paper, "module:function"
    options: the names of further options
    """

    name: str
    is_it: Callable[[Contents], bool]
    advice: str = ""
    source: str = ""
    options: tuple[str, ...] = ()


def _sd(parts: Iterable[str]) -> Callable[[Contents], bool]:
    return lambda c: c.has("model.diffusion_model.", *parts)


ALONE = "it lacks {}; load the whole model, a folder of diffusers or a file with all its parts"
UNET, QUANTISER = "model.diffusion_model.", "first_stage_model.quantize."
EMBEDDER = "cond_stage_model.embedding.weight"  # of a class-conditional latent diffusion
ADM, ADM_OPTIONS = "fewstep.models.formats.adm:open_source", ("preset", "config", "classifier")
EMBEDDINGS = ({"emb_params"}, {"clip_l", "clip_g"})  # of textual inversion
KINDS: tuple[Kind, ...] = (
    Kind(
        "a LoRA",
        lambda c: any(map(c.holds, ("lora_up.", "lora_A.", ".lora.up", "lora_B.", "hada_w1"))),
        "it is an addition to a model; load that model's own files",
    ),
    Kind(
        "a ControlNet",
        lambda c: c.has("control_model.") or c.has("controlnet_"),
        "it is an addition to a model; load that model's own files",
    ),
    Kind(
        "an embedding of textual inversion",
        lambda c: c.names in EMBEDDINGS or c.has("string_to_param"),
        "it is an addition to a model; load that model's own files",
    ),
    Kind(
        "a network pickle of NVlabs/edm, edm2 or diff-sampler",
        lambda c: any("persistence" in name for name in c.classes),
        source="fewstep.models.formats.papers:open_pickle",
        options=("preset", "vae", "guide"),
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
        "a latent diffusion of CompVis",
        lambda c: (
            c.has("model.diffusion_model.", "first_stage_model.")
            and any(map(c.has, (f"{UNET}middle_block.1.qkv.", EMBEDDER, QUANTISER)))
        ),
        source=ADM,
        options=ADM_OPTIONS[:2],
    ),
    Kind(
        "a Stable Diffusion in one file",
        lambda c: (
            c.has("model.diffusion_model.", "first_stage_model.")
            and (c.has("cond_stage_model.") or c.has("conditioner."))
        ),
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
        source=ADM,
        options=ADM_OPTIONS,
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
    """The names of the tensors in a file.

    Raises:
        ValueError: as `recognise`.
    """
    with open(path, "rb") as file:
        start = file.read(16)
    if start[8:9] == b"{":
        return Contents(frozenset(read_header(path)))
    if not is_pickle(start):
        raise ValueError(f"{path} cannot be read: {_not_weights(start)}")
    return of_pickle(read(path))


def declared(path: Path) -> dict[str, Any]:
    """What a single file says of its process, by keys or in its metadata: fields of a scheduler's
    configuration.

    Raises:
        ValueError: it contradicts itself, or names a process that fewstep does not run.
    """
    names = tensor_names(path).names
    if any(name.startswith("edm_") for name in names):
        raise ValueError(
            f"{path} says that it is of EDM's process (edm_vpred.* or edm_mean), which fewstep "
            "does not run for pipelines"
        )
    own = {name.rpartition(".")[2] for name in names}
    found: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in own else {}
    safe = path.suffix == ".safetensors"
    said = read_metadata(path).get("modelspec.prediction_type", "") if safe else ""
    if (spec := MODELSPEC.get(said.lower())) is not None:
        if found.get("prediction_type", spec) != spec:
            raise ValueError(f"{path} has the key v_pred, and its metadata say {said}")
        found["prediction_type"] = spec
    return {**found, "rescale_betas_zero_snr": True} if "ztsnr" in own else found


def _not_weights(start: bytes) -> str:
    """What a file is that is no file of weights, and what to do."""
    for begin, what in SIGNS.items():
        if start.lstrip().lower().startswith(begin):
            return what
    if not start:
        return "it is empty; fetch it again"
    return "it is neither safetensors, nor of torch.save, nor a pickle; fetch it again"


def of_pickle(file: Pickled) -> Contents:
    """The names in a file that was read as data."""
    return Contents(frozenset(named(file)), frozenset(map(str, file.names)))
