"""Network pickles of NVlabs/edm and NVlabs/edm2: settings and weights, of data alone.

The settings are in the file, as the arguments that its objects were made with. A preset names the
settings of a published file; it must agree with what the file says.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from fewstep.models.edm_spec import Spec
from fewstep.networks.edm_config import EDM2Config, EDMConfig
from fewstep.pickles import Pickled, Record, Tensor, floats, module_tensors
from fewstep.records import shown

__all__ = ["CLASSES", "PRESETS", "network_of", "preset_of", "read"]

COMMON = ("img_resolution", "img_channels", "label_dim", "use_fp16")
# the class: our name of the preconditioning, the order of its arguments, its network by default
CLASSES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "EDMPrecond": ("edm", ("sigma_min", "sigma_max", "sigma_data", "model_type"), "DhariwalUNet"),
    "VPPrecond": ("vp", ("beta_d", "beta_min", "M", "epsilon_t", "model_type"), "SongUNet"),
    "VEPrecond": ("ve", ("sigma_min", "sigma_max", "model_type"), "SongUNet"),
    "iDDPMPrecond": ("iddpm", ("C_1", "C_2", "M", "model_type"), "DhariwalUNet"),
    "Precond": ("edm", ("sigma_data", "logvar_channels"), ""),
}
INNER = ("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim")
VE_RANGE = {"sigma_min": 0.02, "sigma_max": 100.0}
DHARIWAL = {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3}
DHARIWAL |= {"attn_resolutions": (32, 16, 8)}
WITHOUT_EFFECT = {"dropout", "label_dropout", "C_1", "C_2", "in_channels"}
LATENT = "StabilityVAEEncoder"
NETWORKS = ("ema", "net", "model")  # keys under which a snapshot may hold its network

_SONG = {"model_type": "SongUNet", "num_blocks": 4, "attn_resolutions": (16,), "augment_dim": 9}
_VE = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
_VE |= {"resample_filter": (1.0, 3.0, 3.0, 1.0)}
_32 = {**_SONG, "img_resolution": 32, "channel_mult": (2, 2, 2)}
_64 = {**_SONG, "img_resolution": 64, "channel_mult": (1, 2, 2, 2), "label_dim": 0}
_EDM2 = {"img_resolution": 64, "channel_mult": (1, 2, 3, 4), "num_blocks": 3}
_EDM2 |= {"attn_resolutions": (16, 8), "channels_per_head": 64}
WIDTHS = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
# Settings of the published files.
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10-ddpmpp": {**_32, "label_dim": 0, "model_channels": 128},
    "cifar10-ddpmpp-cond": {**_32, "label_dim": 10, "model_channels": 128},
    "cifar10-ncsnpp": {**_32, **_VE, "label_dim": 0, "model_channels": 128},
    "cifar10-ncsnpp-cond": {**_32, **_VE, "label_dim": 10, "model_channels": 128},
    "ffhq64-ddpmpp": {**_64, "model_channels": 128},  # and AFHQv2
    "ffhq64-ncsnpp": {**_64, **_VE, "model_channels": 128},
    "imagenet64-dhariwal": {
        **DHARIWAL,
        "model_type": "DhariwalUNet",
        "img_resolution": 64,
        "label_dim": 1000,
    },
    **{
        f"edm2-img512-{size}": {**_EDM2, "img_channels": 4, "model_channels": width}
        for size, width in WIDTHS.items()
    },
    **{
        f"edm2-img64-{size}": {**_EDM2, "img_channels": 3, "model_channels": width}
        for size, width in WIDTHS.items()
    },
}


def network_of(root: Any) -> Record | None:
    """The network in what was read of a file; None where it holds none of these."""
    found = [root, *(root.get(key) for key in NETWORKS if isinstance(root, dict))]
    networks = (one for one in found if isinstance(one, Record) and one.persistent)
    return next((one for one in networks if one.kind in CLASSES), None)


def read(file: Pickled, preset: str | None = None) -> tuple[Spec, dict[str, Tensor]]:
    """The settings of the network in a file, and its tensors by our names.

    Raises:
        ValueError: where the file holds no such network, a setting is unknown or wrong, or the
            preset says otherwise.
    """
    where, outer = file.path, network_of(file.root)
    if outer is None:
        raise ValueError(
            f"{where} holds no network of NVlabs ({', '.join(CLASSES)}); if it is a published "
            "solver, fewstep convert makes a folder of it"
        )
    try:
        spec, tensors = _edm2(outer, file) if outer.kind == "Precond" else _edm(outer, file)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())[:300]}") from None
    found = preset_of(spec)
    if preset is not None:
        _check_preset(spec, preset, str(where))
    return replace(spec, how=f"the file ({preset or found or 'no published one'})"), tensors


def preset_of(spec: Spec) -> str | None:
    """The published settings that these are."""
    return next((name for name in PRESETS if _differing(spec, name) is None), None)


def _differing(spec: Spec, name: str) -> str | None:
    """A setting that is not as a preset has it."""
    values = asdict(spec.unet)
    kind = "edm2" if name.startswith("edm2-") else "edm"
    if spec.kind != kind:
        return "kind"
    return next((key for key, value in PRESETS[name].items() if values[key] != value), None)


def _check_preset(spec: Spec, name: str, where: str) -> None:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4) or list(PRESETS)
        raise ValueError(f"no preset for {where} is called {name!r}; there are {', '.join(near)}")
    key = _differing(spec, name)
    if key == "kind":
        raise ValueError(f"{where} is of {spec.kind}, and preset {name} is not")
    if key is not None:
        raise ValueError(
            f"preset {name} says {key} = {shown(PRESETS[name][key])}, and {where} has "
            f"{shown(asdict(spec.unet)[key])}"
        )


def _arguments(module: Record, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments that an object was made with, by name."""
    positional, named = module.get("_init_args") or (), module.get("_init_kwargs")
    if not isinstance(positional, tuple | list) or not isinstance(named, dict):
        raise ValueError(f"its {module.kind} does not say what it was made with")
    if len(positional) > len(names):
        raise ValueError(f"its {module.kind} was made with {len(positional)} arguments")
    values = dict(zip(names, positional, strict=False))
    return {**values, **{str(key): _plain(value) for key, value in named.items()}}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _child(module: Record, name: str) -> Record:
    children = module.get("_modules")
    child = children.get(name) if isinstance(children, dict) else None
    if not isinstance(child, Record):
        raise ValueError(f"its {module.kind} lacks the module {name}")
    return child


def _taken(given: dict[str, Any], kind: Any) -> dict[str, Any]:
    """The fields of a configuration among settings, which are taken out."""
    names = {one.name for one in fields(kind)}
    found = {name: given.pop(name) for name in list(given) if name in names}
    if "resample_filter" in found:
        found["resample_filter"] = tuple(map(float, found["resample_filter"]))
    return {name: value for name, value in found.items() if value is not None}


def _refuse_rest(given: Mapping[str, Any], module: Record) -> None:
    if left := sorted(set(given) - WITHOUT_EFFECT):
        raise ValueError(f"its {module.kind} has the setting {shown(left[0])}, which is not known")


def _edm(outer: Record, file: Pickled) -> tuple[Spec, dict[str, Tensor]]:
    what, order, standard = CLASSES[outer.kind]
    given, inner = _arguments(outer, (*COMMON, *order)), _child(outer, "model")
    kind = given.setdefault("model_type", standard)
    if inner.kind != kind:
        raise ValueError(f"its {outer.kind} says model_type = {shown(kind)}, and has {inner.kind}")
    own = _arguments(inner, INNER)
    for name in set(own) & set(given):
        if _plain(own[name]) != given[name]:
            raise ValueError(f"{name} is {shown(given[name])} and {shown(own[name])} in one file")
    channels = given.get("img_channels")
    values = {**(DHARIWAL if kind == "DhariwalUNet" else {}), **own, **given}
    twice = 2 if what == "iddpm" else 1
    if type(channels) is int:
        values.setdefault("out_channels", twice * channels)
    known = _taken(values, EDMConfig)
    unet = EDMConfig(**known)
    wanted = twice * unet.img_channels
    if unet.out_channels != wanted or own.get("in_channels", channels) != channels:
        raise ValueError(f"a network with {what} writes {wanted} channels, not {unet.out_channels}")
    process = _process(values, VE_RANGE if what == "ve" else {})
    if what == "iddpm":
        process["levels"] = _levels(outer, file)
    _refuse_rest(values, outer)
    return Spec(unet, what, **process), module_tensors(inner)  # type: ignore[arg-type]


def _process(values: dict[str, Any], standard: Mapping[str, float]) -> dict[str, Any]:
    """What a Spec says beside the network, taken out of the settings."""
    found: dict[str, Any] = dict(standard)
    for name in ("sigma_min", "sigma_max", "sigma_data", "beta_d", "beta_min", "epsilon_t"):
        if name in values:
            value = float(values.pop(name))
            found[name] = None if value == float("inf") else value
    if "M" in values:
        found["count"] = values.pop("M")
    found["half"] = bool(values.pop("use_fp16", False))
    return found


def _levels(outer: Record, file: Pickled) -> tuple[float, ...]:
    """The table of iDDPM, which the file holds."""
    buffers = outer.get("_buffers")
    u = buffers.get("u") if isinstance(buffers, dict) else None
    if not isinstance(u, Tensor) or len(u.shape) != 1 or not 3 <= u.numel <= 100_001:
        raise ValueError("its iDDPMPrecond lacks the table u of levels")
    return tuple(floats(file, u))


def _edm2(outer: Record, file: Pickled) -> tuple[Spec, dict[str, Tensor]]:
    given = _arguments(outer, (*COMMON, *CLASSES["Precond"][1]))
    given.setdefault("use_fp16", True)
    inner = _arguments(_child(outer, "unet"), COMMON[:3])
    values = {**inner, **given}
    known = _taken(values, EDM2Config)
    if values.get("clip_act", 0) is None:
        known["clip_act"] = 0.0
    values.pop("clip_act", None)
    for name, value in known.items():
        if type(value) is int and EDM2Config.__annotations__[name] == "Real":
            known[name] = float(value)
    unet = EDM2Config(**known)
    process = _process(values, {})
    _refuse_rest(values, outer)
    return Spec(unet, "edm", **process, **_latents(file.root)), module_tensors(outer)


def _latents(root: Any) -> dict[str, Any]:
    """How the states of a network of EDM2 are made of latents, where they are."""
    encoder = root.get("encoder") if isinstance(root, dict) else None
    if not isinstance(encoder, Record) or encoder.kind != LATENT:
        return {}
    given = encoder.get("_init_kwargs")
    values = given if isinstance(given, dict) else {}
    found: dict[str, Any] = {"latent": True}
    for name, key in (("raw_mean", "latent_mean"), ("raw_std", "latent_std")):
        if isinstance(values.get(name), list | tuple):
            found[key] = tuple(map(float, values[name]))
    return found
