"""Your own noise-predicting network, from its table of betas to samples in a few evaluations.

    python examples/own_network.py

A small network learns to predict eps on a 1000-entry DDPM table, for points on a spiral.
`Predicted` makes it a denoiser, which any solver can run. `Guided` or `Thresholded` can wrap it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fewstep
from fewstep.denoiser import Predicted
from fewstep.schedule import VP


def spiral(count: int, generator: torch.Generator) -> Tensor:
    """Points on a spiral in the plane, of standard deviation about 1 a coordinate, [count, 2]."""
    turn = 3 * math.pi * torch.rand(count, generator=generator).sqrt()
    points = torch.stack((turn * turn.cos(), turn * turn.sin()), dim=1) / 4.5
    return points + 0.02 * torch.randn(count, 2, generator=generator)


class Network(nn.Module):
    """eps_net(x_t [b, 2], t [b]) -> [b, 2], t a float index into the table."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(6))
        self.layers = nn.Sequential(
            nn.Linear(2 + 12, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] / 1000 * self.frequencies
        return self.layers(torch.cat((x_t, angles.sin(), angles.cos()), dim=1))


def train(network: Network, schedule: VP, updates: int, batch: int = 512) -> None:
    """Plain DDPM training: predict the noise at a random entry of the table."""
    generator = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(updates):
        x_0 = spiral(batch, generator)
        eps = torch.randn(batch, 2, generator=generator)
        t = torch.randint(0, 1000, (batch,), generator=generator).float()
        sigma = schedule.sigma(t)[:, None]
        x_t = schedule.alpha(sigma) * (x_0 + sigma * eps)
        loss = (network(x_t, t) - eps).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|, which is 0 for equal laws."""
    between, within_a, within_b = torch.cdist(a, b), torch.cdist(a, a), torch.cdist(b, b)
    return (2 * between.mean() - within_a.mean() - within_b.mean()).item()


def main(
    updates: int = 1500,
    solvers: Sequence[str] = ("ddim", "dpmpp-2m", "unipc-2"),
    nfe: int = 8,
    points: int = 1000,
) -> dict[str, float]:
    """Train, sample, print and return each solver's energy distance to fresh points."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network()
    schedule = VP.linear()
    train(network, schedule, updates)

    denoiser = Predicted(network.eval(), schedule, "eps")
    generator = torch.Generator().manual_seed(1)
    x_T = denoiser.sigma_max * torch.randn(points, 2, generator=generator)
    fresh = spiral(points, generator)
    distances = {}
    for solver in solvers:
        with torch.no_grad():
            x = fewstep.solve(denoiser, x_T, solver, nfe=nfe, grid="log-snr")
        distances[solver] = energy_distance(x, fresh)
        print(f"{solver:10s} in {nfe} evaluations: energy distance {distances[solver]:.4f}")
    return distances


if __name__ == "__main__":
    main()
