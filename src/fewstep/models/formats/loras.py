"""Adapters (LoRA) of pipelines in files: read in all common forms, and written.

    diffusers   unet.X.lora_A.weight, .lora_B.weight; older: .lora.down.weight, .lora.up.weight and
                X.processor.to_q_lora.down.weight
    peft        base_model.model.X.lora_A.weight
    kohya       lora_unet_X.lora_down.weight, .lora_up.weight, .alpha, with X's dots as underscores;
                of SDXL also by the names of sgm. lora_te_, lora_te1_, lora_te2_ for text encoders

What is added to a weight is alpha / rank up down; alpha is the rank where a file names none. Where
diffusers has written the configuration of peft beside the tensors, alpha is that of the layer, and
divided by the root of the rank where it says so (rsLoRA). A kohya name is found among the network's
own names, and never split at its underscores.

Source: Kalajdzievski 2023 (rsLoRA), arXiv:2312.03732.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.files import file_hash
from fewstep.models.card import Card
from fewstep.models.pipeline import PipelineModel
from fewstep.records import parse, shown
from fewstep.tensors import Entry, load_tensors, read_metadata, write_tensors

__all__ = ["DIFFUSERS", "KOHYA", "Lora", "save_lora", "with_loras"]

DIFFUSERS, KOHYA = "pytorch_lora_weights.safetensors", "lora_kohya.safetensors"
PRESET = "fewstep"  # the card of a student, among the texts of its file
PARTS = {  # ends of keys
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
NETWORKS = ("unet", "transformer")
ENCODERS = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
CONFIG = "lora_adapter_metadata"  # the configuration of peft, among the texts of a file
ALPHA = 8.0  # that of peft, where a configuration names none
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base
OTHERS = (  # fields that change what is added, or where
    "use_dora", "lora_bias", "layer_replication", "target_parameters", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # of sgm


@dataclass(frozen=True)
class Lora:
    """A file, or a folder with one of ours, and the factor of what it adds."""

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"the scale of {self.path} must be a finite number, got {self.scale}")

    @property
    def file(self) -> Path:
        return self.path / DIFFUSERS if self.path.is_dir() else self.path


@torch.no_grad()
def with_loras(model: PipelineModel, loras: Sequence[Lora]) -> PipelineModel:
    """The model with what adapters add in its weights, which change in place.

    One that was distilled, as its file says, makes the model a student: its levels, sampler and
    guidance are those of the card.

    Raises:
        ValueError: for a file that cannot be read or does not fit; the first key that does not is
            named. Nothing has changed then.
        OSError: a file cannot be read.
    """
    found = [_read(lora, model) for lora in loras]
    students = [card for _, card in found if card is not None]
    if len(students) > 1:
        raise ValueError("two of the LoRAs are students, each with levels of its own; give one")
    known = [
        {"file": one.file.name, "sha256": file_hash(one.file), "scale": one.scale} for one in loras
    ]
    for changes, _ in found:
        for change in changes:
            change.weight.add_(change.more())
    model.texts.clear()
    card = model.card
    if students:
        said = students[0]
        network = {**card.network, "told": list(said.told)}
        card = replace(
            card, name=said.name, auto=said.auto, distilled=said.distilled, network=network
        )
    return replace(model, card=card, loras=(*model.loras, *known))


def save_lora(
    path: Path, tensors: Mapping[str, tuple[Tensor, Tensor]], component: str, card: Card
) -> None:
    """Write adapters, (down, up) by layer, as float16, whole; in the form of diffusers or of kohya,
    by the name of the file. The card is among the file's texts."""
    values: dict[str, Tensor] = {}
    for name, (down, up) in sorted(tensors.items()):
        key, ends = f"{component}.{name}", ("lora_A.weight", "lora_B.weight")
        if path.name == KOHYA:
            key = "lora_unet_" + name.replace(".", "_")
            ends = ("lora_down.weight", "lora_up.weight")
            values[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
        values |= {f"{key}.{end}": one for end, one in zip(ends, (down, up), strict=True)}
    rank = str(next(iter(tensors.values()))[0].shape[0])
    texts = {PRESET: json.dumps(card.to_dict()), "format": "pt"}
    if path.name == KOHYA:
        texts |= {"ss_network_module": "networks.lora", "ss_network_dim": rank}
        texts |= {"ss_network_alpha": rank}
    layout = {name: Entry("F16", tuple(value.shape)) for name, value in values.items()}
    write_tensors(path, layout, values.items, texts)


@dataclass(frozen=True, eq=False)
class Change:
    """What one layer's weight gets: factor up down."""

    weight: Tensor
    down: Tensor
    up: Tensor
    factor: float

    def more(self) -> Tensor:
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return (self.factor * product.reshape(self.weight.shape)).to(self.weight)

    def finite(self) -> bool:
        """Whether no number of it is too large for the weight."""
        down, up = (float(one.float().abs().max()) for one in (self.down, self.up))
        largest, room = down * up * self.down.shape[0], torch.finfo(self.weight.dtype).max / 2
        if abs(self.factor) * largest < room:
            return True
        return bool((self.weight + self.more()).isfinite().all())


def _read(lora: Lora, model: PipelineModel) -> tuple[list[Change], Card | None]:
    """What a file adds to which weights, and the card of a student. Raises: ValueError, OSError."""
    path = lora.file
    texts, tensors = read_metadata(path), load_tensors(path)
    find = _finder(model)
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    first: dict[tuple[str, str], str] = {}
    for key in sorted(tensors):
        base, part = _split(key)
        place = None if part is None else find(base)
        if part is None or place is None:
            what = "is of no kind of LoRA that fewstep reads" if part is None else "has no layer"
            raise ValueError(
                f"{path} does not fit {model.card.name}: its key {shown(key)} {what}"
                + (" there; is it for another model?" if part else "")
            )
        if part in parts.get(place, {}):
            raise ValueError(f"{path} has {shown(key)} for a layer that has it under another name")
        parts.setdefault(place, {})[part] = _checked(path, key, part, tensors[key])
        first.setdefault(place, key)
    known = _configurations(path, texts)
    changes = []
    for place, found in parts.items():
        if "down" not in found or "up" not in found:
            raise ValueError(f"{path} has {shown(first[place])} without its other half")
        weight = getattr(model.pipe, place[0]).get_submodule(place[1]).weight
        down, up = found["down"], found["up"]
        rank = down.shape[0] if down.ndim else 0
        fits = (
            min(down.ndim, up.ndim) > 1
            and up.flatten(1).shape[1] == rank > 0
            and (up.shape[0], *down.shape[1:]) in _shapes_of(weight, down.ndim)
        )
        if not fits:
            raise ValueError(
                f"{path} does not fit {model.card.name}: its key {shown(first[place])} has shape "
                f"{list(down.shape)} beside {list(up.shape)}, and the layer's weight "
                f"{list(weight.shape)}"
            )
        if "alpha" in found and place[0] in known:
            raise ValueError(
                f"{path} has {CONFIG} and its key {shown(first[place])}, which both say alpha; "
                "remove one"
            )
        own = known.get(place[0], Peft(float(rank)))
        factor = found["alpha"].item() / rank if "alpha" in found else own.factor(place[1], rank)
        change = Change(weight, down, up, lora.scale * factor)
        if not change.finite():
            raise ValueError(
                f"{path} adds numbers to the layer of its key {shown(first[place])} that are too "
                f"large for {weight.dtype}; its factor is {lora.scale * factor:g}"
            )
        changes.append(change)
    return changes, _student(path, texts)


def _checked(path: Path, key: str, part: str, value: Tensor) -> Tensor:
    """The tensor. Raises: ValueError where it is no finite number, of an alpha, or no numbers."""
    alpha, found = part == "alpha", f"{value.dtype} of shape {list(value.shape)}"
    whole = alpha and not value.is_complex() and value.dtype != torch.bool
    right = (value.is_floating_point() or whole) and (value.numel() == 1 or not alpha)
    if right and value.double().isfinite().all():
        return value
    raise ValueError(
        f"{path} cannot be used: its key {shown(key)} must have "
        f"{'one finite number' if alpha else 'finite floating point numbers'}, got "
        f"{'NaN or infinity in ' if right else ''}{found}"
    )


def _shapes_of(weight: Tensor, ndim: int) -> list[tuple[int, ...]]:
    """Shapes of up times down that stand for the weight: 1x1 convolutions are linear layers."""
    shape = tuple(weight.shape)
    plain = shape[:2] if set(shape[2:]) <= {1} else shape
    return [shape, plain, (*plain, *(1,) * (ndim - len(plain)))]


def _split(key: str) -> tuple[str, str | None]:
    """The layer that a key names, and which part of its adapter it is."""
    for end, part in PARTS.items():
        if key.endswith(end):
            base = key.removesuffix(end)
            if end.startswith("_lora"):  # X.processor.to_q
                base = re.sub(r"\.processor\.(\w+)$", r".\1", base)
                base = re.sub(r"\.to_out$", ".to_out.0", base)
            return base, part
    return key, None


def _finder(model: PipelineModel) -> Callable[[str], tuple[str, str] | None]:
    """From the name of a layer in a file to (component, name)."""
    network, pipe = model.family.network, model.pipe
    names: dict[str, tuple[str, str]] = {}
    for name in _layers(model.net):
        place = (network, name)
        for start in (f"{network}.", "base_model.model.", ""):
            names[start + name] = place
        names["lora_unet_" + name.replace(".", "_")] = place
        if network == "unet" and (other := _sgm(name, model.net)) is not None:
            names["lora_unet_" + other.replace(".", "_")] = place
    for start, part in ENCODERS.items():
        for name in _layers(getattr(pipe, part, None)):
            long = name if name.startswith("text_model.") else f"text_model.{name}"
            names[start + long.replace(".", "_")] = (part, name)
            names[f"{part}.{long}"] = names[f"{part}.{name}"] = (part, name)
    return names.get


def _layers(module: nn.Module | None) -> Iterator[str]:
    if module is not None:
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                yield name


def _sgm(name: str, net: Any) -> str | None:
    """The name that sgm gives to a layer of a U-Net."""
    parts, layers = name.split("."), net.config.get("layers_per_block")
    if parts[0] not in ("down_blocks", "mid_block", "up_blocks") or not isinstance(layers, int):
        return None
    mid = parts[0] == "mid_block"
    block = 0 if mid else int(parts[1])
    what, index, rest = parts[2 - mid], int(parts[3 - mid]), parts[4 - mid :]
    inner = ".".join([RESNET.get(rest[0], rest[0]), *rest[1:]] if what == "resnets" else rest)
    attends = what == "attentions"
    if mid:
        return f"middle_block.{1 if attends else 2 * index}.{inner}"
    if what == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
    if what == "upsamplers":
        crossed = "CrossAttn" in net.config.up_block_types[block]
        return f"output_blocks.{block * (layers + 1) + layers}.{1 + crossed}.conv"
    if parts[0] == "down_blocks":
        return f"input_blocks.{1 + block * (layers + 1) + index}.{int(attends)}.{inner}"
    return f"output_blocks.{block * (layers + 1) + index}.{int(attends)}.{inner}"


@dataclass(frozen=True)
class Peft:
    """What the configuration of peft says of the adapters in one component.

    alphas: (place, alpha) by the ends of layers' names, or whole names behind a ^; of those that
        fit, the one of the first place holds
    root: alpha is divided by the root of the rank
    """

    alpha: float
    alphas: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    root: bool = False

    def factor(self, layer: str, rank: int) -> float:
        parts = layer.removeprefix("text_model.").split(".")  # which some versions leave out
        names = [".".join(parts[i:]) for i in range(len(parts))]
        long = f"text_model.{names[0]}"
        fits = {*names, long, f"^{names[0]}", f"^{long}"}
        fitting = (self.alphas[one] for one in fits if one in self.alphas)
        _, alpha = min(fitting, default=(0, self.alpha))
        return alpha / (math.sqrt(rank) if self.root else rank)


def _configurations(path: Path, texts: Mapping[str, str]) -> dict[str, Peft]:
    """By component, where diffusers has written any. Raises: ValueError."""
    if not texts.get(CONFIG):
        return {}
    try:
        said = parse(texts[CONFIG], "it")
        if not isinstance(said, dict):
            raise ValueError(f"it must be a table, got {shown(said)}")
        found = {}
        for part in dict.fromkeys((*NETWORKS, *ENCODERS.values())):
            own = {k: v for k, v in said.items() if k.startswith(f"{part}.")}
            if own:
                found[part] = _configuration(part, own)
    except ValueError as error:
        raise ValueError(f"{path} has {CONFIG} that cannot be used: {error}") from None
    return found


def _configuration(part: str, said: Mapping[str, Any]) -> Peft:
    """Of one component. Raises: ValueError, that names the field."""

    def of(name: str, default: Any = None) -> Any:
        return said.get(f"{part}.{name}", default)

    unknown = [name for name in OTHERS if of(name)]
    unknown += ["bias"] * (of("bias") not in (None, "none"))
    unknown += ["init_lora_weights"] * (of("init_lora_weights") not in INITIAL)
    if unknown:
        name, value = f"{part}.{unknown[0]}", of(unknown[0])
        raise ValueError(f"{name} is {shown(value)}, a kind of adapter that fewstep does not add")
    root, pattern = of("use_rslora"), of("alpha_pattern")
    if root not in (None, True, False):
        raise ValueError(f"{part}.use_rslora must be true or false, got {shown(root)}")
    if not isinstance(pattern, dict | None):
        raise ValueError(f"{part}.alpha_pattern must be a table, got {shown(pattern)}")
    alphas: dict[str, tuple[int, float]] = {}
    for at, (key, value) in enumerate((pattern or {}).items()):
        plain = key.replace("\\.", ".").removesuffix("$")
        if not re.fullmatch(r"\^?[\w.-]+", plain):
            raise ValueError(
                f"{part}.alpha_pattern must have names of layers, or their ends, got {shown(key)}"
            )
        alphas.setdefault(plain, (at, _finite(f"{part}.alpha_pattern {shown(key)}", value)))
    alpha = _finite(f"{part}.lora_alpha", of("lora_alpha", ALPHA))
    return Peft(alpha, alphas, bool(root))


def _finite(name: str, value: Any) -> float:
    with contextlib.suppress(OverflowError):
        if type(value) in (int, float) and math.isfinite(number := float(value)):
            return number
    raise ValueError(f"{name} must be a finite number, got {shown(value)}")


def _student(path: Path, texts: Mapping[str, str]) -> Card | None:
    """The card among a file's texts. Raises: ValueError where it is no card."""
    if PRESET not in texts:
        return None
    try:
        card = Card(**parse(texts[PRESET], "its card"))
        if card.network.get("told"):
            raise ValueError("its network is told numbers, and adapters have no input for any")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has a card that cannot be read ({error})") from None
    return card if card.distilled else None
