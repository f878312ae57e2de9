"""Sampling reads no value off a device: it runs where there are no values at all.

Tensors on torch's meta device have shapes and no numbers, so whatever would wait for a number
(`item`, a branch on a tensor, a copy to the host) raises an error there.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.denoiser import Bound, Clipped, Guided, Predicted
from fewstep.schedule import VP, Flow
from fewstep.serve.together import Share, together

SHAPE = (2, 1, 8, 8)
GRID = (14.0, 6.0, 2.5, 1.0, 0.4, 0.1)


def nowhere(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize("solver", [*fewstep.solvers(), "consistency", "consistency-kappa"])
@pytest.mark.parametrize("grid", [GRID, (*GRID, 0.0)])
def test_no_solver_asks_for_a_value(solver: str, grid: tuple[float, ...]) -> None:
    x_T, seeds = nowhere(*SHAPE), (1, 2)
    x = fewstep.solve(lambda x, sigma: x * 0.5, x_T, solver, grid=grid, seeds=seeds)
    assert x.device.type == "meta"
    assert x.shape == SHAPE


def test_a_denoiser_that_asks_is_found_out() -> None:
    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x * 0.5 if sigma.max() > 1 else x

    with pytest.raises(RuntimeError, match="meta"):
        fewstep.solve(denoiser, nowhere(*SHAPE), "ddim", 3)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
@pytest.mark.parametrize("solver", ["dpmpp-2m", "heun", "unipc-3"])
def test_no_denoiser_of_ours_asks_for_a_value(prediction: str, solver: str) -> None:
    schedule = Flow() if prediction == "flow" else VP.scaled_linear()

    def net(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return x * t[:, None, None, None].to(x) * text.mean(1)[:, None, None, None]

    inner = Predicted(net, schedule, prediction, dtype=torch.float16)
    guided = Guided(inner, 7.5, nowhere(1, 4), nowhere(1, 4))
    denoiser = Clipped(guided, -1.0, 1.0)
    x = fewstep.solve(denoiser, nowhere(*SHAPE), solver, grid=(*GRID, 0.0))
    assert x.dtype == torch.float32


def test_requests_side_by_side_stay_on_their_device() -> None:
    """Scales are plain numbers, and the rows that they belong to are picked on the device."""

    def net(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return x * t[:, None, None, None].to(x) * text.mean(1)[:, None, None, None]

    inner = Predicted(net, VP.scaled_linear(), "eps")
    guided = Guided(inner, 7.5, nowhere(1, 4), nowhere(1, 4))
    shares = [Share(guided, 0, 2), Share(Bound(inner, nowhere(1, 4)), 0, 1), Share(guided, 0, 1)]
    joint = together(shares)
    assert joint.guided.device.type == joint.scale.device.type == "meta"
    assert joint(nowhere(4, 1, 8, 8), nowhere(4)).device.type == "meta"
