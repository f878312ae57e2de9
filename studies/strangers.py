"""Learned solvers with their defaults on networks that fewstep does not know.

    python studies/strangers.py                 (about 2 minutes on one core)
    python studies/strangers.py --networks mlp --methods amed --set grid=karras lr=0.005

Two denoisers in EDM's form that nothing here was tuned on:

    mlp       a small network of 2-D data, a pinwheel of five arms, trained here for a minute
    mixture   the exact D of 20 narrow Gaussians in 16 dimensions

Each row is a network and a budget. "best training-free" is the best of ten solvers on all grids,
chosen on the validation seeds, as every training does it. All columns are then measured on the test
seeds 0 to 1,023: the mean over seeds of the root mean square distance to a fine solve, which no
training and no choice has seen. `--seeds` trains with several seeds and prints each.
"""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fewstep
from fewstep.learned import train
from fewstep.models.exact import GaussianMixture
from fewstep.networks.preconditioning import denoise
from fewstep.noise import generator, normal

TEST = 1024  # seeds
FINE = {"solver": "deis-4", "nfe": 100, "grid": "log-snr"}
LEVELS = (0.002, 80.0)  # EDM's
METHODS = ("amed", "amed-plugin", "tuned")


class Layers(nn.Module):
    """A raw network of 2-D data, in EDM's preconditioning: F(x [b, 2], log(sigma) / 4 [b])."""

    def __init__(self, width: int) -> None:
        super().__init__()
        parts = [nn.Linear(2 + 16, width), nn.SiLU()]
        for _ in range(3):
            parts += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*parts, nn.Linear(width, 2))

    def forward(self, x: Tensor, noise: Tensor, label: Tensor) -> Tensor:
        angles = noise[:, None] * 2.0 ** torch.arange(8)
        return self.layers(torch.cat((x, angles.cos(), angles.sin()), 1))


def pinwheel(count: int, gen: torch.Generator) -> Tensor:
    """Five arms, standard deviation about 0.5, [count, 2]."""
    arm = torch.randint(5, (count,), generator=gen)
    x = torch.randn(count, 2, generator=gen) * torch.tensor([0.3, 0.05]) + torch.tensor([1.0, 0.0])
    turn = arm * (2 * math.pi / 5) + 0.5 * torch.exp(x[:, 0])
    along, across = x.unbind(1)
    points = (along * turn.cos() - across * turn.sin(), along * turn.sin() + across * turn.cos())
    return 0.68 * torch.stack(points, 1)


def mlp(updates: int, width: int = 128) -> Callable[[Tensor, Tensor], Tensor]:
    """D of a network that was trained by EDM's loss, half of it at log-uniform levels."""
    gen = generator(0, "mlp")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        net = Layers(width)
    adam = torch.optim.Adam(net.parameters(), lr=2e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, updates)
    low, high = math.log(LEVELS[0]), math.log(LEVELS[1])
    for _ in range(updates):
        x_0 = pinwheel(512, gen)
        usual = torch.randn(256, generator=gen) * 1.2 - 1.2
        sigma = torch.cat((usual, low + (high - low) * torch.rand(256, generator=gen))).exp()
        x = x_0 + sigma[:, None] * torch.randn(512, 2, generator=gen)
        weight = (sigma.square() + 0.25) / (0.5 * sigma).square()
        error = denoise(net, x, sigma, sigma) - x_0
        loss = (weight * error.square().mean(1)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
    net.requires_grad_(False)
    return lambda x, sigma: denoise(net, x, sigma, sigma)


def mixture() -> GaussianMixture:
    means = torch.randn(20, 16, generator=generator(0, "mixture")).tanh() / 1.5
    return GaussianMixture(torch.ones(20), means, 0.05)


@torch.no_grad()
def errors(denoiser: Any, shape: tuple[int, ...], solvers: Sequence[Any], test: int) -> list[float]:
    """Mean root mean square distance to fine solves on the test seeds. solvers: keywords of
    `fewstep.solve`."""
    ends: dict[str, Any] = {"sigma_min": LEVELS[0], "sigma_max": LEVELS[1]}
    x_T = LEVELS[1] * normal(range(test), shape, "prior")
    exact = fewstep.solve(denoiser, x_T, **FINE, **ends)
    found = []
    for how in solvers:
        given = ends if "grid" in how else {}
        gap = (fewstep.solve(denoiser, x_T, **how, **given) - exact).double()
        found.append(gap.square().flatten(1).mean(1).sqrt().mean().item())
    return found


def main(arguments: Sequence[str] | None = None) -> list[list[str]]:
    """Returns the table's rows as they are printed."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    head = ["network", "nfe", "best training-free", *(f"`{name}`" for name in options.methods)]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
    for network in options.networks:
        denoiser = mlp(options.updates) if network == "mlp" else mixture()
        shape = (2,) if network == "mlp" else (16,)
        for nfe in options.budgets:
            trained = {
                name: [learn(denoiser, shape, name, nfe, seed, options) for seed in options.seeds]
                for name in options.methods
            }
            rival = next(iter(trained.values()))[0].validation["training_free"]
            how = {name: rival[name] for name in ("solver", "grid", "afs")}
            every = [{"solver": one} for each in trained.values() for one in each]
            found = errors(denoiser, shape, [{**how, "nfe": nfe}, *every], options.test)
            figures = [f"{value:.2g}" for value in found]
            count = len(options.seeds)
            cells = [figures[1:][i : i + count] for i in range(0, len(every), count)]
            rows.append(
                [network, str(nfe), f"{figures[0]} {how['solver']}", *map(", ".join, cells)]
            )
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
    return rows


def learn(denoiser: Any, shape: Any, method: str, nfe: int, seed: int, options: Any) -> Any:
    settings = {"trajectories": options.trajectories, "validation_seeds": options.validation}
    settings["fallback"] = options.fallback
    return train(
        denoiser, shape, method=method, nfe=nfe, seed=seed, **settings, **dict(options.set)
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def setting(text: str) -> tuple[str, Any]:
        name, _, value = text.partition("=")
        try:
            return name, ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return name, value

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--networks", nargs="+", default=["mlp", "mixture"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[3, 5, 7])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--trajectories", type=int, default=4096)
    parser.add_argument("--validation", type=int, default=128)
    parser.add_argument("--fallback", action="store_true", help="as a training does by itself")
    parser.add_argument("--test", type=int, default=TEST)
    parser.add_argument("--updates", type=int, default=6000, help="of the mlp")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", type=setting, default=[], help="settings of training")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
