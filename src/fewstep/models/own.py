"""A model of one's own network, for `sample`, `compare` and `learned.train`.

model = fewstep.models.of(denoiser, name="mine", shape=(3, 64, 64), net=net)
fewstep.sample(model, solver="dpmpp-2m", nfe=5, seeds=range(4))
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fewstep.arguments import function, sides, text
from fewstep.models.card import Card
from fewstep.models.network import NetworkModel
from fewstep.networks.taps import has_module
from fewstep.schedule import Schedule

__all__ = ["fingerprint", "of"]


def of(
    denoiser: Callable[..., Tensor],
    *,
    name: str,
    shape: Sequence[int],
    net: nn.Module | None = None,
    classes: Sequence[str] = (),
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    sigma_data: float = 0.5,
    schedule: Schedule | None = None,
    far_mean: Tensor | None = None,
    feature_module: str = "",
    with_features: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> NetworkModel:
    """A model of any denoiser.

    Args:
        denoiser: D(x, sigma) = E[x_0 | x], of x = x_0 + sigma eps, [b, *shape], and sigma [b];
            with classes it is D(x, sigma, label), label [b] integers, `len(classes)` for no class
        name: letters, digits and . _ + -
        shape: of one sample; (c, h, w) for pictures, whose values lie in [-1, 1]
        net: the module behind the denoiser, which says device, dtype and the hash of the weights;
            the denoiser itself where that is a module
        classes: their names, in order
        sigma_min: the lowest level at which the denoiser may be called; the schedule's, or 0.002,
            where left out
        sigma_max: the highest one; the schedule's, or 80, where left out
        schedule: the network's own, which gives grids that are uniform in its time
        sigma_data: standard deviation of the data
        far_mean: mean of D at sigma_max, [classes + 1, *shape]; allows the first step afs="mean"
        feature_module: dotted name of the module of `net` whose output solvers may read
        with_features: in place of it, called as the denoiser is; returns (D, features)

    Raises:
        ValueError: where a value does not fit, or there is no such module.
    """
    text("name", name)
    sizes = sides("shape", shape)
    function("denoiser", denoiser, "D(x, sigma)")
    if net is not None and not isinstance(net, nn.Module):
        raise ValueError(f"net must be the torch module behind the denoiser, got {net!r:.80}")
    module = denoiser if net is None and isinstance(denoiser, nn.Module) else net
    if feature_module and (module is None or not has_module(module, feature_module)):
        raise ValueError(f"feature_module {feature_module!r} is not a module of the network")
    low, high = (0.002, 80.0) if schedule is None else (schedule.sigma_min, schedule.sigma_max)
    card = Card(
        name=name,
        summary="a network of one's own",
        classes=tuple(classes),
        sigma_min=low if sigma_min is None else sigma_min,
        sigma_max=high if sigma_max is None else sigma_max,
        grid="karras" if schedule is None else "trailing",
        end="sigma_min" if schedule is None else "zero",
        sigma_data=sigma_data,
        feature_module=feature_module,
        weights_sha256=fingerprint({"network": module}) if module is not None else "",
        kind="own",
    )
    stats = _statistics(far_mean, (len(classes) + 1, *sizes))
    plain = module if module is not None else nn.Module()

    def denoise(
        forward: Callable[..., Tensor],
        x: Tensor,
        sigma: Tensor,
        label: Tensor,
        sigma_data: float,
        dtype: torch.dtype,
    ) -> Tensor:
        return forward(x, sigma, label) if classes else forward(x, sigma)

    def features(x: Tensor, sigma: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        assert with_features is not None
        return with_features(x, sigma, label) if classes else with_features(x, sigma)

    tap = None if with_features is None else features
    return NetworkModel(
        card, plain, stats, denoiser, sizes, denoise, features=tap, schedule=schedule
    )


def _statistics(far_mean: Tensor | None, wanted: tuple[int, ...]) -> dict[str, Tensor]:
    if far_mean is None:
        return {}
    if tuple(far_mean.shape) != wanted:
        raise ValueError(f"far_mean must have shape {wanted}, got {tuple(far_mean.shape)}")
    return {"far_mean": far_mean}


@torch.no_grad()
def fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """SHA-256 of the weights of some modules in memory: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for part, module in sorted(modules.items()):
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name} {value.dtype} {list(value.shape)}\n".encode())
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(data.numpy().data)
    return digest.hexdigest()
