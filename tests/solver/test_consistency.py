"""Sampling of consistency functions along the principal directions of the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.denoiser import Bound, Counted, Covariance
from fewstep.plan import Combine, Eval, Plan
from fewstep.sampling.choose import plan_for
from fewstep.sampling.settings import Settings
from tests.support.students import in_one_segment

F64 = torch.float64
GRID = (80.0, 9.0, 1.0, 0.1, 0.0)


def gaussian(seed: int, k: int, tied: bool = False) -> tuple[Tensor, Tensor, Covariance]:
    """Mean, covariance [d, d], and what is known of it: k directions, a number for the rest."""
    d = 6
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=F64)).Q
    variances = torch.rand(d, generator=generator, dtype=F64) ** 4 * 30
    variances[k:] = 0.0 if tied else 0.05
    known = Covariance(vectors.T[None, :k], variances[None, :k], variances[-1:] * (k < d))
    return (
        torch.randn(d, generator=generator, dtype=F64),
        vectors @ torch.diag(variances) @ vectors.T,
        known,
    )


class Perfect:
    """The end of the path of Gaussian data through x, by matrix functions of the covariance."""

    sigma_max = GRID[0]

    def __init__(self, mean: Tensor, matrix: Tensor, covariance: Covariance | None = None) -> None:
        self.mean, self.matrix, self.covariance = mean, matrix, covariance

    def carry(self, x: Tensor, sigma: float, to: float) -> Tensor:
        one = torch.eye(len(self.matrix), dtype=F64)
        rows = (x.flatten(1) - self.mean).T
        moved = (
            root(self.matrix + to**2 * one) @ root(self.matrix + sigma**2 * one).inverse() @ rows
        )
        return (self.mean + moved.T).reshape(x.shape)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.carry(x, float(sigma[0]), 0.0)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def start(count: int = 3, shape: tuple[int, ...] = (1, 2, 3)) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return GRID[0] * torch.randn(count, *shape, generator=generator, dtype=F64)


@pytest.mark.parametrize("tied", [False, True], ids=["spread", "no spread"])
@pytest.mark.parametrize("k", [0, 2, 6])
@pytest.mark.parametrize("grid", [GRID, (80.0, 3.0, 0.5), (80.0, 0.0)])
def test_pca_follows_the_path_of_gaussian_data_of_any_covariance(k, grid, tied) -> None:
    f = Perfect(*gaussian(1, k, tied=tied))
    x_T = start()
    states = list(fewstep.iterate(f, x_T, "consistency-pca", grid=grid))
    assert len(states) == states[-1].nfe == len(grid) - 1
    for state, nxt in zip(states, grid[1:], strict=True):
        for found, level in ((state.x, nxt), (state.denoised, 0.0)):  # the last D is no state
            exact = f.carry(x_T, grid[0], level)
            # the test's root of a variance of 0, which eigh finds to 1e-16, is off by 1e-8
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-7)


def test_one_variance_for_all_directions_is_kappa() -> None:
    f = Perfect(*gaussian(2, 6))
    f.covariance = Covariance(torch.empty(1, 0, 6), torch.empty(1, 0), torch.tensor([0.09]))
    ours = fewstep.solve(f, start(), "consistency-pca", grid=GRID)
    kappa = fewstep.solve(f, start(), "consistency-kappa:c=0.3", grid=GRID)
    torch.testing.assert_close(ours, kappa, rtol=0, atol=1e-7)  # 0.09 in float32


def test_each_picture_of_a_batch_has_the_covariance_of_its_class() -> None:
    mean, matrix, one = gaussian(3, 2)
    other = gaussian(4, 2)[2]
    both = Covariance(*(torch.cat([getattr(c, n) for c in (one, other)]) for n in FIELDS))
    x_T, f = start(2), Perfect(mean, matrix)
    f.covariance = both
    ours = fewstep.solve(f, x_T, "consistency-pca", grid=GRID)
    for i, covariance in enumerate((one, other)):
        f.covariance = covariance
        alone = fewstep.solve(f, x_T[i : i + 1], "consistency-pca", grid=GRID)
        torch.testing.assert_close(ours[i : i + 1], alone, rtol=0, atol=1e-12)


FIELDS = ("basis", "variances", "rest")


def test_a_plan_of_it_is_json_and_samples_alike(tmp_path: Path) -> None:
    model = fewstep.load(in_one_segment(tmp_path / "student"))
    plan = plan_for(Settings("consistency-pca", 2), model)
    again = Plan.from_json(plan.to_json())
    assert [op.get("source") for op in json.loads(plan.to_json())["ops"]].count("path") == 1
    ours, theirs = (
        fewstep.sample(model, solver=s, nfe=2, seeds=[0, 1]) for s in ("consistency-pca", again)
    )
    assert (ours.images == theirs.images).all()
    assert ours.nfe == theirs.nfe == ours.network_calls == 2


def test_a_denoiser_without_the_statistics_is_refused_before_it_is_called() -> None:
    f = Counted(Perfect(*gaussian(1, 2)[:2]))
    with pytest.raises(ValueError, match=r"denoiser.covariance.*take consistency-kappa"):
        fewstep.solve(f, start(), "consistency-pca", grid=GRID)
    model = fewstep.models.of(lambda x, sigma: x, name="mine", shape=(1, 4, 4))
    with pytest.raises(ValueError, match="take consistency-kappa"):
        fewstep.sample(model, solver="consistency-pca", nfe=2, seeds=[0])


@pytest.mark.parametrize(
    "ops",
    [
        (Eval(9.0, 1.0, "path"), Combine((1.0,), 1.0, 0.0)),
        (Eval(9.0), Eval(9.0, source="path"), Combine((1.0,), 1.0, 0.0)),
        (Eval(0.0, 0.0, "path"), Combine((1.0,), 0.0, 0.0)),
    ],
    ids=["no end yet", "leads nowhere", "from 0"],
)
def test_a_path_from_nowhere_is_refused(ops) -> None:
    f = Perfect(*gaussian(1, 2))
    with pytest.raises(ValueError, match="a path leads from"):
        fewstep.solve(f, start(), Plan("x0", 1, "mine", "custom", (9.0, 1.0), ops))


def test_a_condition_and_its_covariance_are_seen_through_wrappers() -> None:
    covariance = gaussian(1, 2)[2]
    bound = Bound(lambda x, sigma, label: x, None, covariance=covariance)
    assert Counted(bound).covariance is covariance


def test_the_models_statistics_are_those_of_the_class(tmp_path: Path) -> None:
    model: Any = fewstep.load(in_one_segment(tmp_path / "student"))
    found = model.denoiser(["bag", 0]).covariance
    torch.testing.assert_close(found.variances, model.stats["variances"][[8, 0]])
    assert len(found[1:].basis) == 1
    assert model.denoiser("bag", guidance=3.0).denoiser is not None
    with pytest.raises(ValueError, match="take consistency-kappa"):
        fewstep.sample(model, solver="consistency-pca", nfe=2, seeds=[0], label="bag", guidance=3)
