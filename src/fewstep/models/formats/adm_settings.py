"""What a published file of the ADM family leaves unsaid: settings by their published names.

The shapes of the weights say most of an architecture (`of_shapes`). They do not say how many heads
an attention has, in which order its rows lie, the schedule of the noise, and whether a network of
consistency models is a teacher or a student. These come from a preset, or from a mapping with the
names that the published commands and configurations use. Whatever both say must agree.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.records import read_json, shown

__all__ = [
    "PRESETS",
    "Unsaid",
    "check_against",
    "fitting",
    "of_shapes",
    "preset",
    "read_config",
    "settings",
]

Shapes = Mapping[str, tuple[int, ...]]


class Unsaid(ValueError):
    """A file, a preset and settings together do not say something that a network needs."""


_ADM = {"learn_sigma": True, "resblock_updown": True, "use_scale_shift_norm": True}
_ADM |= {"attention_resolutions": "32,16,8", "num_head_channels": 64}
_LARGE = {**_ADM, "num_channels": 256, "num_res_blocks": 2, "noise_schedule": "linear"}
_LARGE |= {"use_new_attention_order": False}
_64 = {**_ADM, "image_size": 64, "num_channels": 192, "num_res_blocks": 3}
_64 |= {"channel_mult": "1,2,3,4", "num_classes": 1000}
_256 = {"image_size": 256, "channel_mult": "1,1,2,2,4,4"}
_CM = {"learn_sigma": False, "use_new_attention_order": True}  # whatever their flag says
_CM_LSUN = {**_LARGE, **_256, **_CM, "use_scale_shift_norm": False}
del _CM_LSUN["noise_schedule"]
_LDM = {"resblock_updown": False, "use_scale_shift_norm": False, "learn_sigma": False}
_LDM |= {"use_new_attention_order": False, "attention_resolutions": [8, 4, 2], "num_res_blocks": 2}
_CLASSIFIER = {**_ADM, "num_channels": 128, "num_classes": 1000, "noise_schedule": "linear"}
_CLASSIFIER |= {"use_new_attention_order": False, "num_res_blocks": 2}
del _CLASSIFIER["learn_sigma"]

# The settings of the published files; kind: what file, see `fewstep.models.formats.adm`.
PRESETS: dict[str, dict[str, Any]] = {
    "imagenet64-adm": {
        **_64,
        "kind": "guided-diffusion",
        "use_new_attention_order": True,
        "noise_schedule": "cosine",
    },
    "imagenet128-adm": {
        **_LARGE,
        "kind": "guided-diffusion",
        "image_size": 128,
        "channel_mult": "1,1,2,3,4",
        "num_heads": 4,
        "num_head_channels": -1,
        "num_classes": 1000,
    },
    "imagenet256-adm": {**_LARGE, **_256, "kind": "guided-diffusion", "num_classes": 1000},
    "adm256": {**_LARGE, **_256, "kind": "guided-diffusion", "class_cond": False},
    "imagenet512-adm": {
        **_LARGE,
        "kind": "guided-diffusion",
        "image_size": 512,
        "channel_mult": "0.5,1,1,2,2,4,4",
        "num_classes": 1000,
    },
    "imagenet64-edm": {**_64, **_CM, "kind": "consistency-models", "distillation": False},
    "imagenet64-cm": {**_64, **_CM, "kind": "consistency-models", "distillation": True},
    "lsun256-edm": {**_CM_LSUN, "kind": "consistency-models", "distillation": False},
    "lsun256-cm": {**_CM_LSUN, "kind": "consistency-models", "distillation": True},
    "vq4-ldm": {  # LSUN bedroom, FFHQ, CelebA-HQ
        **_LDM,
        "kind": "latent-diffusion",
        "image_size": 64,
        "num_channels": 224,
        "channel_mult": [1, 2, 3, 4],
        "num_head_channels": 32,
    },
    "churches-ldm": {
        **_LDM,
        "kind": "latent-diffusion",
        "image_size": 32,
        "num_channels": 192,
        "channel_mult": [1, 2, 2, 4, 4],
        "attention_resolutions": [1, 2, 4, 8],
        "num_heads": 8,
        "resblock_updown": True,
        "use_scale_shift_norm": True,
    },
    "imagenet-ldm": {
        **_LDM,
        "kind": "latent-diffusion",
        "image_size": 64,
        "num_channels": 192,
        "channel_mult": [1, 2, 3, 5],
        "num_heads": 1,
        "context_dim": 512,
    },
    "imagenet64-classifier": {
        **_CLASSIFIER,
        "kind": "classifier",
        "image_size": 64,
        "channel_mult": "1,2,3,4",
        "num_res_blocks": 4,
    },
    "imagenet128-classifier": {
        **_CLASSIFIER,
        "kind": "classifier",
        "image_size": 128,
        "channel_mult": "1,1,2,3,4",
    },
    "imagenet256-classifier": {**_CLASSIFIER, **_256, "kind": "classifier"},
    "imagenet512-classifier": {
        **_CLASSIFIER,
        "kind": "classifier",
        "image_size": 512,
        "channel_mult": "0.5,1,1,2,2,4,4",
    },
}

# published name -> ours; those of a classifier stand beside the network's, with a prefix
RENAMED = {"model_channels": "num_channels", "timesteps": "diffusion_steps"}
OF_CLASSIFIER = "classifier_"
RENAMED_THERE = {"width": "num_channels", "depth": "num_res_blocks", "use_fp16": "use_fp16"}
KNOWN: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "image_size": int,
    "num_channels": int,
    "num_res_blocks": int,
    "channel_mult": (str, list, tuple),
    "attention_resolutions": (str, list, tuple),
    "num_heads": int,
    "num_heads_upsample": int,
    "num_head_channels": int,
    "num_classes": int,
    "class_cond": bool,
    "in_channels": int,
    "out_channels": int,
    "learn_sigma": bool,
    "use_scale_shift_norm": bool,
    "resblock_updown": bool,
    "use_new_attention_order": bool,
    "use_spatial_transformer": bool,
    "transformer_depth": int,
    "context_dim": int,
    "noise_schedule": str,
    "diffusion_steps": int,
    "linear_start": float,
    "linear_end": float,
    "scale_factor": float,
    "use_ema": bool,
    "distillation": bool,
    "sigma_min": float,
    "sigma_max": float,
    "clip_denoised": bool,
    "steps": int,
    "ts": (str, list, tuple),
}
# settings of the published commands that say nothing of a trained network's answer
WITHOUT_EFFECT = {
    "dropout",
    "use_checkpoint",
    "use_fp16",
    "weight_schedule",
    "timestep_respacing",
    "use_kl",
    "rescale_learned_sigmas",
    "legacy",
    "dims",
    "conv_resample",
}
FIXED = {"predict_xstart": False, "rescale_timesteps": False, "pool": "attention"}
FIXED |= {"dims": 2, "conv_resample": True, "parameterization": "eps", "beta_schedule": "linear"}


def preset(name: str) -> dict[str, Any]:
    """The settings of a published file. Errors: ValueError with the nearest names."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4) or list(PRESETS)
        raise ValueError(f"no preset is called {name!r}; did you mean {', '.join(near)}?")
    return dict(PRESETS[name])


def read_config(
    config: str | Path | Mapping[str, Any] | None, classifier: bool = False
) -> dict[str, Any]:
    """Settings of a mapping, or of a JSON or YAML file; of a configuration of latent diffusion, the
    network's and the schedule's part.

    Args:
        config: the mapping, or the file
        classifier: those of a classifier beside the network, whose names begin so

    Raises:
        OSError: where the file cannot be read.
        ValueError: for an unknown setting, or a value of the wrong kind.
    """
    if config is None:
        return {}
    values = dict(config) if isinstance(config, Mapping) else _read_file(Path(config))
    if isinstance(model := values.get("model"), Mapping):
        params = _table(model, "params")
        unet = _table(_table(params, "unet_config"), "params")
        taken = ("linear_start", "linear_end", "timesteps", "scale_factor", "use_ema")
        taken += ("parameterization", "beta_schedule")
        values = {**unet, **{name: params[name] for name in taken if name in params}}
    its = {n: v for n, v in values.items() if str(n).startswith(OF_CLASSIFIER)}
    if not classifier:
        return settings({n: v for n, v in values.items() if n not in its})
    plain = {n.removeprefix(OF_CLASSIFIER): v for n, v in its.items() if n != "classifier_scale"}
    return settings({RENAMED_THERE.get(n, n): v for n, v in plain.items()})


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under our names. Errors: ValueError, as `read_config`."""
    found: dict[str, Any] = {}
    for given, value in values.items():
        name = RENAMED.get(given, given)
        if name in FIXED and value != FIXED[name]:
            raise ValueError(f"{name} must be {FIXED[name]!r} here, got {shown(value)}")
        if name in FIXED or name in WITHOUT_EFFECT or value is None:
            continue
        if name not in KNOWN:
            near = difflib.get_close_matches(str(name), KNOWN, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"there is no setting {shown(name)}{hint}")
        kind = KNOWN[name]
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            wanted = kind.__name__ if isinstance(kind, type) else "text or a list"
            raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
        found[name] = value
    return found


def of_shapes(shapes: Shapes) -> dict[str, Any]:
    """What the shapes say, as fields of `fewstep.networks.adm.ADMConfig`.

    Errors: ValueError where the names and shapes are not those of this family.
    """
    try:
        return _of_shapes(shapes)
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from None
    except IndexError:
        raise ValueError("its tensors have too few dimensions") from None


def _of_shapes(shapes: Shapes) -> dict[str, Any]:
    first, embedding = shapes["input_blocks.0.0.weight"], shapes["time_embed.0.weight"]
    count = _stages(shapes, "input_blocks")
    pooled = "out.2.positional_embedding" in shapes
    if pooled:
        blocks, ups = _blocks_of_encoder(shapes, count), []
        levels = count // (blocks + 1)
    else:
        decoder = _stages(shapes, "output_blocks")
        ups = [j for j in range(decoder) if _up(shapes, j)]
        blocks, levels = (ups[0] if ups else decoder - 1), len(ups) + 1
        if decoder != count:
            raise ValueError(f"it has {count} stages in the encoder and {decoder} in the decoder")
    if blocks < 1 or levels * (blocks + 1) != count:
        raise ValueError(f"{count} stages do not make {levels} levels of {blocks} blocks")
    begins = [1 + level * (blocks + 1) for level in range(levels)]
    rows = shapes["input_blocks.1.0.emb_layers.1.weight"][0]
    widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in begins]
    attention = [
        level for level, i in enumerate(begins) if f"input_blocks.{i}.1.norm.weight" in shapes
    ]
    transformer = "middle_block.1.transformer_blocks.{}.attn2.to_k.weight"
    context = shapes.get(transformer.format(0), (0, 0))[1]
    depth = sum(transformer.format(i) in shapes for i in range(64))
    outputs = shapes["out.2.c_proj.weight" if pooled else "out.2.weight"][0]
    size = 8 * 2 ** (levels - 1)  # the lowest map of all published networks but one is 8 x 8
    if pooled:
        places = shapes["out.2.positional_embedding"][1] - 1
        size = round(places**0.5) * 2 ** (levels - 1)
    return {
        "size": size,
        "width": embedding[1],
        "widths": tuple(widths),
        "blocks": blocks,
        "attention": tuple(attention),
        "channels": first[1],
        "outputs": outputs,
        "classes": shapes.get("label_emb.weight", (0,))[0],
        "scale_shift": rows == 2 * widths[0],
        "resample_blocks": not any(f"input_blocks.{i}.0.op.weight" in shapes for i in range(count)),
        "context": context,
        "depth": max(depth, 1),
    }


def _stages(shapes: Shapes, part: str) -> int:
    numbers = [name.split(".")[1] for name in shapes if name.startswith(f"{part}.")]
    return 1 + max((int(n) for n in numbers if n.isdecimal() and len(n) < 4), default=-1)


def _up(shapes: Shapes, j: int) -> bool:
    """Whether a decoder's stage ends by doubling the map."""
    ends = (f"output_blocks.{j}.{k}." for k in (1, 2))
    return any(f"{end}{part}.weight" in shapes for end in ends for part in ("conv", "in_layers.0"))


def _blocks_of_encoder(shapes: Shapes, count: int) -> int:
    """Residual blocks per level of a network without a decoder, where one number alone fits.

    Errors: ValueError where none or several fit.
    """

    if halving := [i for i in range(count) if f"input_blocks.{i}.0.op.weight" in shapes]:
        return halving[0] - 1

    def fits(blocks: int) -> bool:
        stages = [f"input_blocks.{i}.0.skip_connection.weight" in shapes for i in range(count)]
        attends = [f"input_blocks.{i}.1.qkv.weight" in shapes for i in range(count)]
        inner = {i for i in range(1, count) if i % (blocks + 1)}
        level = [i // (blocks + 1) for i in range(count)]
        alike = all(attends[i] == attends[j] for i in inner for j in inner if level[i] == level[j])
        plain = not any(stages[i] or attends[i] for i in range(1, count) if i not in inner)
        later = not any(stages[i] for i in inner if (i - 1) % (blocks + 1))
        return alike and plain and later

    found = [b for b in range(1, count) if count % (b + 1) == 0 and fits(b)]
    if len(found) != 1:
        raise ValueError(f"{count} stages could be levels of {found or 'no number of'} blocks")
    return found[0]


def fitting(derived: Mapping[str, Any], kind: str) -> list[str]:
    """The presets of a kind whose shapes are these."""
    found = []
    for name, values in PRESETS.items():
        try:
            if values["kind"] == kind:
                check_against(values, derived, name)
                found.append(name)
        except ValueError:
            continue
    return found


def check_against(given: Mapping[str, Any], derived: Mapping[str, Any], where: str) -> None:
    """Errors: ValueError that names a setting which the weights contradict."""
    said: dict[str, Any] = {
        "num_channels": derived["width"],
        "num_res_blocks": derived["blocks"],
        "in_channels": derived["channels"],
        "out_channels": derived["outputs"],
        "use_scale_shift_norm": derived["scale_shift"],
        "resblock_updown": derived["resample_blocks"],
        "class_cond": derived["classes"] > 0,
        "context_dim": derived["context"] or None,
        "use_spatial_transformer": derived["context"] > 0,
        "learn_sigma": derived["outputs"] == 2 * derived["channels"],
    }
    if not derived["context"]:
        said["num_classes"] = derived["classes"] or None
    if given.get("kind") == "classifier":
        said |= {"num_classes": derived["outputs"]}
        del said["class_cond"], said["learn_sigma"], said["out_channels"]
    if given.get("class_cond") is False:
        del said["num_classes"]  # the number is then of no class
    levels = len(derived["widths"])
    for name, value in said.items():
        if (
            name in given
            and given[name] != value
            and not (name == "resblock_updown" and levels == 1)
        ):
            raise ValueError(
                f"{where} says {name} = {shown(given[name])}, and the weights have {shown(value)}"
            )
    if "channel_mult" in given and (mult := numbers(given["channel_mult"], "channel_mult")):
        widths = tuple(int(factor * derived["width"]) for factor in mult)
        if widths != derived["widths"]:
            raise ValueError(
                f"{where} says channel_mult = {shown(given['channel_mult'])}, so widths {widths}, "
                f"and the weights have {derived['widths']}"
            )
    if "attention_resolutions" in given:
        size = given.get("image_size", derived["size"])
        marks = numbers(given["attention_resolutions"], "attention_resolutions")
        pixels = isinstance(given["attention_resolutions"], str)
        scale = {size // 2**i if pixels else 2**i: i for i in range(levels)}
        wanted = tuple(sorted(scale[mark] for mark in marks if mark in scale))
        if wanted != tuple(derived["attention"]):
            raise ValueError(
                f"{where} says attention_resolutions = {shown(given['attention_resolutions'])}, so "
                f"attention at levels {wanted}, and the weights have it at {derived['attention']}"
            )


def numbers(value: Any, name: str) -> list[float]:
    """The numbers of "1,2,2" or of a list. Errors: ValueError where they are none."""
    parts = value.strip("() ").split(",") if isinstance(value, str) else value
    try:
        return [float(part) for part in parts if str(part).strip()]
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, got {shown(value)}") from None


def _read_file(path: Path) -> dict[str, Any]:
    if path.suffix not in (".yaml", ".yml"):
        return read_json(path, "settings of a network")
    import yaml

    from fewstep.records import LARGEST

    with open(path, "rb") as file:
        text = file.read(LARGEST + 1)
    try:
        if len(text) > LARGEST or any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text)):
            raise ValueError("it is too long, or has aliases")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a table of settings")
    return values


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} must be a table, got {shown(found)}")
    return found
