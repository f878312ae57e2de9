"""Files of the ADM family: guided-diffusion, consistency models, CompVis latent diffusion.

What a file is follows from the names and shapes in it:

    model.diffusion_model.*                       latent diffusion; of EMA weights where it has them
    input_blocks.*, qkv weights of 3 dimensions   guided-diffusion, eps; learned variances dropped
    input_blocks.*, qkv weights of 4 dimensions   consistency models
    input_blocks.*, an attention pool at the end  a noisy classifier

and what shapes do not say from `fewstep.models.formats.adm_settings`. The EMA weights of a latent
diffusion are named as the network's own, without any dot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.files import file_hash
from fewstep.models.adm_spec import GUIDE, NULL_CLASS, STAGE, Spec, betas_of, card_of
from fewstep.models.formats.adm_settings import (
    PRESETS,
    Unsaid,
    check_against,
    fitting,
    numbers,
    of_shapes,
    read_config,
)
from fewstep.models.formats.adm_settings import preset as named_preset
from fewstep.models.formats.papers import Source
from fewstep.models.formats.state import open_tensors
from fewstep.networks.adm_config import ADMConfig, AutoencoderConfig
from fewstep.records import shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Examined", "examine", "examine_classifier", "known", "open_source"]

RAW, EMA, FIRST = "model.diffusion_model.", "model_ema.", "first_stage_model."
EMBEDDER = "cond_stage_model.embedding.weight"
FAMILIES = ("guided-diffusion", "consistency-models", "latent-diffusion", "classifier")
TEACHER, STUDENTS = "edm_", ("cd_", "ct_")  # how the published files of consistency models begin

SMALL = ("betas", "scale_factor")  # tensors that say something of the process

Numbers = Mapping[str, list[float]]


@dataclass(frozen=True)
class Examined:
    """What a file holds, before its numbers are read.

    names, stage: from our names of the network's and the first stage's weights to the file's
    unet_rows: where the rows of qkv lie head after head, how many heads an attention of so many
        channels has
    preset: the published settings that it has
    """

    spec: Spec
    names: dict[str, str]
    stage: dict[str, str]
    unet_rows: Callable[[int], int] | None
    preset: str | None


def kind_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """One of FAMILIES, of the names and shapes in a file."""
    if any(name.startswith(RAW) for name in shapes):
        return "latent-diffusion"
    if "out.2.positional_embedding" in shapes:
        return "classifier"
    qkv = shapes.get("middle_block.1.qkv.weight", ())
    return "consistency-models" if len(qkv) == 4 else "guided-diffusion"


def examine(
    entries: Mapping[str, Any],
    small: Numbers,
    where: str,
    name: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
) -> Examined:
    """What a file holds, before its numbers are read.

    Args:
        entries: whatever has a shape, by the names of the file
        small: the numbers of those of SMALL that it has
        where: the file, for messages; how it begins decides between teacher and student of
            consistency models where nothing else does
        name: of a preset
        config: settings by their published names, or a file of them

    Raises:
        OSError: where the file of settings cannot be read.
        ValueError: where the tensors are not of this family, where something is said nowhere, and
            where preset, settings and shapes contradict each other.
    """
    shapes = {key: tuple(value.shape) for key, value in entries.items()}
    kind = kind_of(shapes)
    if kind == "classifier":
        raise ValueError(f"{where} is a classifier; give it beside a network, as classifier")
    given = read_config(config)
    names = {key: key for key in shapes}
    stage: dict[str, str] = {}
    if kind == "latent-diffusion":
        names = _diffusion_names(shapes, given.get("use_ema", True), where)
        stage = _first_stage_names(shapes, where)
        if EMBEDDER in shapes:
            names["contexts.weight"] = EMBEDDER
    derived = _derived({ours: shapes[theirs] for ours, theirs in names.items()}, kind, where)
    derived["context_rows"] = shapes[EMBEDDER][0] if "contexts.weight" in names else 0
    if derived["context"] and not derived["context_rows"]:
        raise ValueError(
            f"{where} attends to a context of {derived['context']} numbers and has no table of "
            f"classes for it ({EMBEDDER}); fewstep runs class-conditional ones"
        )
    chosen, how = _choose(kind, derived, given, name, where)
    spec = _spec(kind, derived, chosen, small, where, how)
    if stage:
        config_of = AutoencoderConfig.of_shapes
        try:
            found = config_of({ours: shapes[theirs] for ours, theirs in stage.items()})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if found.embedded != spec.unet.channels:
            raise ValueError(
                f"{where}: its network works on {spec.unet.channels} channels, and its first stage "
                f"on {found.embedded}"
            )
        spec = replace(spec, first_stage=found)
    rows = spec.unet.heads_of if _legacy(kind, chosen, where) else None
    return Examined(spec, names, stage, rows, chosen.get("preset"))


def open_source(
    path: Path | str,
    preset: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    classifier: str | Path | None = None,
) -> Source:
    """What a file of torch.save or safetensors holds; nothing in it is run, no weight is read.

    Args:
        path: of the file
        preset: see `fewstep.models.formats.adm_settings.PRESETS`
        config: settings by their published names, or a JSON or YAML file of them
        classifier: the file of a noisy classifier, by which guidance goes then

    Raises:
        OSError: where a file cannot be read.
        ValueError: as of `examine`.
    """
    path = Path(path)
    file = open_tensors(path)
    small = {name: file.floats(name) for name in SMALL if name in file.entries}
    found = examine(file.entries, small, str(path), preset, config)
    spec, named = found.spec, [(file, found.names, "", found.unet_rows)]
    if found.stage:
        named.append((file, found.stage, STAGE, None))
    if classifier is not None:
        other = open_tensors(Path(classifier))
        guide, rows = examine_classifier(other.entries, str(classifier), spec, config)
        spec = replace(spec, classifier=guide)
        named.append((other, {name: name for name in other.entries}, GUIDE, rows))
    shapes = {
        prefix + ours: _shape(prefix + ours, tuple(one.entries[theirs].shape))
        for one, names, prefix, _ in named
        for ours, theirs in names.items()
    }

    def values() -> Iterator[tuple[str, Tensor]]:
        for one, names, prefix, heads in named:
            ours = {theirs: name for name, theirs in names.items()}
            for theirs, value in one.stream(ours):
                name = prefix + ours[theirs]
                yield name, _arranged(name, value, heads)

    card = card_of(spec, path.stem, file_hash(path), source=path.name)
    return Source(path, card, found.preset, shapes, values)


def known(path: Path | str) -> dict[str, Any]:
    """What a file says by its names and shapes: kind, parameters, pictures, classes, and the
    presets of its kind.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where the tensors are not of this family.
    """
    shapes = {key: tuple(value.shape) for key, value in open_tensors(Path(path)).entries.items()}
    kind = kind_of(shapes)
    begin = RAW if kind == "latent-diffusion" else ""
    own = {n.removeprefix(begin): shape for n, shape in shapes.items() if n.startswith(begin)}
    derived, rows = _derived(own, kind, str(path)), shapes.get(EMBEDDER, (0,))[0]
    return {
        "kind": kind,
        "parameters": sum(map(math.prod, own.values())),
        "channels": derived["channels"],
        "widths": list(derived["widths"]),
        "classes": derived["classes"] or rows - (rows == NULL_CLASS),
        "presets": [n for n, values in PRESETS.items() if values["kind"] == kind],
    }


def examine_classifier(
    entries: Mapping[str, Any],
    where: str,
    spec: Spec,
    config: str | Path | Mapping[str, Any] | None = None,
) -> tuple[ADMConfig, Callable[[int], int] | None]:
    """The shape of a noisy classifier, and how the rows of its attentions lie.

    Args:
        entries, where: as of `examine`
        spec: the network beside it
        config: those settings whose names begin with classifier_ are meant

    Raises:
        ValueError: where it is none, or does not go with the network.
    """
    shapes = {key: tuple(value.shape) for key, value in entries.items()}
    if "input_blocks.0.0.weight" not in shapes or (kind := kind_of(shapes)) != "classifier":
        raise ValueError(
            f"{where} is no noisy classifier of guided-diffusion (out.2.positional_embedding)"
        )
    derived, given = _derived(shapes, kind, where), read_config(config, classifier=True)
    chosen, _ = _choose(kind, derived, given, None, where)
    if "num_heads" not in chosen:
        chosen.setdefault("num_head_channels", 64)  # a constant of the published code
    unet = ADMConfig(**{**derived, **_heads(kind, chosen, where)})
    ours = spec.unet
    if (unet.channels, unet.size) != (ours.channels, ours.size):
        raise ValueError(
            f"{where} classifies {unet.channels} channels of {unet.size} pixels, and the network "
            f"has {ours.channels} of {ours.size}"
        )
    if spec.classes not in (0, unet.outputs):
        raise ValueError(f"{where} knows {unet.outputs} classes, and the network {spec.classes}")
    return unet, unet.heads_of if _legacy(kind, chosen, where) else None


def _derived(shapes: Mapping[str, tuple[int, ...]], kind: str, where: str) -> dict[str, Any]:
    try:
        return of_shapes(shapes)
    except ValueError as error:
        raise ValueError(f"{where} is of {kind}, but damaged: {error}") from None


def _choose(
    kind: str, derived: dict[str, Any], given: dict[str, Any], name: str | None, where: str
) -> tuple[dict[str, Any], str]:
    """The settings that hold, and in words where they are from."""
    config = {"kind": kind, **given}
    if config["kind"] != kind:
        raise ValueError(f"{where} is of {kind}, and config says kind = {shown(config['kind'])}")
    if name is not None:
        named = named_preset(name)
        if named["kind"] != kind:
            raise ValueError(f"{where} is of {kind}, and preset {name} is of {named['kind']}")
        check_against(named, derived, f"preset {name}")
        return _merged(config, named, derived, name) | {"preset": name}, f"preset {name}"
    check_against(config, derived, "config")
    fits = fitting(derived, kind)
    if kind == "consistency-models" and "distillation" not in given:
        begins = Path(where).name.lower()
        role = {True: STUDENTS, False: (TEACHER,)}
        fits = [one for one in fits if begins.startswith(role[PRESETS[one]["distillation"]])]
        for distilled, marks in role.items():
            if begins.startswith(marks):
                config["distillation"] = distilled
    if len(fits) == 1 or (len(fits) == 2 and "distillation" in given):
        found = next(
            (f for f in fits if PRESETS[f].get("distillation") == given.get("distillation")),
            fits[0],
        )
        named = PRESETS[found]
        merged = _merged(config, named, derived, found) | {"preset": found}
        return merged, f"preset {found}, by the shapes"
    return config, "config" if given else "the shapes"


def _merged(
    config: dict[str, Any], named: dict[str, Any], derived: dict[str, Any], name: str
) -> dict[str, Any]:
    """Both together. Errors: ValueError where they contradict each other."""
    named = {key: value for key, value in named.items() if not (key in config and value == -1)}
    check_against(config, derived, "config")
    free = ("use_ema", "clip_denoised", "channel_mult", "attention_resolutions")
    for key, value in config.items():
        if key in named and named[key] != value and key not in free:
            raise ValueError(
                f"config says {key} = {shown(value)}, and preset {name} says {shown(named[key])}"
            )
    return {**named, **config}


def _heads(kind: str, chosen: Mapping[str, Any], where: str) -> dict[str, int]:
    """heads and head_width. A width of heads goes before their number, as in the commands."""
    width, heads = chosen.get("num_head_channels", -1), chosen.get("num_heads", -1)
    if width > 0:
        return {"head_width": width, "heads": 0}
    if (upper := chosen.get("num_heads_upsample", -1)) not in (-1, heads):
        raise ValueError(f"num_heads_upsample must be num_heads, {heads}, or -1, got {upper}")
    if heads > 0:
        return {"heads": heads, "head_width": 0}
    raise Unsaid(
        f"{where} is of {kind}, and how many heads its attentions have stands in no file: name a "
        f"preset ({', '.join(n for n, v in PRESETS.items() if v['kind'] == kind)}), or give config "
        "with num_head_channels or num_heads"
    )


def _legacy(kind: str, chosen: Mapping[str, Any], where: str) -> bool:
    """Whether the rows of qkv lie head after head, and in each [q | k | v]."""
    if kind == "consistency-models":
        return False  # whatever its flag says
    if kind in ("latent-diffusion", "classifier"):
        return not chosen.get("use_new_attention_order", False)
    if "use_new_attention_order" not in chosen:
        raise Unsaid(
            f"{where} does not say in which order its attention's rows lie: name a preset, or give "
            "config with use_new_attention_order"
        )
    return not chosen["use_new_attention_order"]


def _spec(
    kind: str,
    derived: dict[str, Any],
    chosen: dict[str, Any],
    small: Numbers,
    where: str,
    how: str,
) -> Spec:
    fields = {**derived, **_heads(kind, chosen, where)}
    fields["size"] = chosen.get("image_size", derived["size"])
    unet = ADMConfig(**fields)
    if unet.outputs not in (unet.channels, 2 * unet.channels):
        raise ValueError(
            f"{where} reads {unet.channels} channels and writes {unet.outputs}; a network of eps "
            "writes as many, or twice as many"
        )
    clip = 1.0 if chosen.get("clip_denoised", False) else None
    if kind == "consistency-models":
        if "distillation" not in chosen:
            raise Unsaid(
                f"{where} does not say whether it is a teacher (edm) or a student (cd, ct): name a "
                "preset, or give config with distillation"
            )
        role = "consistency" if chosen["distillation"] else "edm"
        ends = chosen.get("sigma_min", 0.002), chosen.get("sigma_max", 80.0)
        places = {"points": chosen["steps"]} if "steps" in chosen else {}
        if "ts" in chosen:
            places["indices"] = tuple(int(index) for index in numbers(chosen["ts"], "ts"))
        return Spec(
            kind, unet, role, sigma_min=ends[0], sigma_max=ends[1], clip=clip, how=how, **places
        )
    if kind == "latent-diffusion":
        schedule = _read_betas(small, chosen, where)
        scale = small.get("scale_factor")
        factor = chosen.get("scale_factor", 1.0) if scale is None else math.prod(scale)
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"{where}: scale_factor must be positive, got {factor}")
        return Spec(kind, unet, "eps", schedule, clip=clip, scale=factor, how=how)
    if "noise_schedule" not in chosen:
        raise Unsaid(
            f"{where} does not say its noise schedule: name a preset, or give config with "
            "noise_schedule, linear or cosine"
        )
    return Spec(kind, unet, "eps", _named_betas(chosen), clip=clip, how=how)


def _named_betas(chosen: Mapping[str, Any]) -> tuple[str | float, ...]:
    count, name = chosen.get("diffusion_steps", 1000), chosen["noise_schedule"]
    if name == "cosine":
        return ("cosine", count)
    if name != "linear":
        raise ValueError(f"noise_schedule must be linear or cosine, got {shown(name)}")
    return ("linear", count, 0.1 / count, 20 / count)  # 1e-4 to 0.02 of 1000


def _read_betas(small: Numbers, chosen: Mapping[str, Any], where: str) -> tuple[str | float, ...]:
    """The schedule of a latent diffusion: its ends in the fewest digits that give the table in the
    file, else the table itself."""
    low, high = chosen.get("linear_start"), chosen.get("linear_end")
    table = small.get("betas")
    if table is None:
        if low is None or high is None:
            raise ValueError(f"{where} has no betas; give config with linear_start and linear_end")
        return ("scaled_linear", chosen.get("diffusion_steps", 1000), low, high)
    count = len(table)
    if not 2 <= count <= 100_000 or not all(0 < beta < 1 for beta in table):
        raise ValueError(f"{where}: betas must be numbers in (0, 1), got {count} of them")
    for name, given, end in (("linear_start", low, table[0]), ("linear_end", high, table[-1])):
        if given is not None and not math.isclose(given, end, rel_tol=1e-5):
            raise ValueError(f"config says {name} = {given}, and {where} has {end:.6g}")
    short = ("scaled_linear", count, *(float(f"{end:.4g}") for end in (table[0], table[-1])))
    same = zip(betas_of(short), table, strict=True)
    close = all(math.isclose(ours, theirs, rel_tol=2e-6) for ours, theirs in same)
    return short if close else ("betas", *table)


def _diffusion_names(names: Iterable[str], ema: bool, where: str) -> dict[str, str]:
    """The names in the file of the U-Net's weights: the EMA ones where there are any."""
    known = set(names)
    plain = [name.removeprefix(RAW) for name in known if name.startswith(RAW)]
    averaged = {name: f"{EMA}diffusion_model{name.replace('.', '')}" for name in plain}
    missing = [name for name in plain if averaged[name] not in known]
    if not ema or len(missing) == len(plain):
        return {name: RAW + name for name in plain}
    if missing:
        raise ValueError(f"{where} has averaged weights (EMA), but none for {shown(missing[0])}")
    if len(set(averaged.values())) < len(averaged):
        raise ValueError(f"{where} has averaged weights (EMA) of which two have one name")
    return averaged


def _first_stage_names(names: Iterable[str], where: str) -> dict[str, str]:
    """The names in the file of the first stage's weights, without what its training needed."""
    training = (f"{FIRST}loss.", f"{FIRST}model_ema.")
    found = {
        name.removeprefix(FIRST): name
        for name in names
        if name.startswith(FIRST) and not name.startswith(training)
    }
    if not found:
        raise ValueError(f"{where} has no first stage (first_stage_model.*), which makes pictures")
    return found


def _shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a parameter as the network keeps it."""
    if name.startswith(STAGE):
        return shape
    matrix = name.endswith(SQUEEZED) and len(shape) > 2 and math.prod(shape[2:]) == 1
    return shape[:2] if matrix else shape


def _arranged(name: str, value: Tensor, heads_of: Callable[[int], int] | None) -> Tensor:
    """A parameter as the network keeps it: float32, 1 x 1 convolutions of tokens as matrices, the
    rows of an attention as [q | k | v]; heads_of: where they lie head after head, how many there
    are of so many channels."""
    value = value.float().reshape(_shape(name, tuple(value.shape)))
    if heads_of is not None and name.endswith((".qkv.weight", ".qkv.bias")):
        heads, rows = heads_of(value.shape[0] // 3), value.shape[0]
        if heads and rows % (3 * heads) == 0:
            parts = value.reshape(heads, 3, rows // (3 * heads), *value.shape[1:])
            value = parts.transpose(0, 1).reshape(value.shape)
    return value.contiguous()


SQUEEZED = tuple(f".{part}.weight" for part in ("qkv", "proj_out", "proj_in", "qkv_proj", "c_proj"))
