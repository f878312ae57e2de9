"""Where the parts meet: levels as tensors, aliasing denoisers, programs, seeds, budgets, starts."""

from __future__ import annotations

import functools
import gc
import time
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.data.images import write_png
from fewstep.loop import Ledger
from fewstep.models import BUILTIN
from fewstep.models.formats.native import load_folder
from fewstep.models.network import NetworkModel
from fewstep.noise import key
from fewstep.plan import Combine, Eval, Program, flatten
from fewstep.solver import Solver, get, intervals_for
from fewstep.solver.multistep import linear_multistep, unipc
from fewstep.solver.rules import adams_log, adams_sigma, dpmpp_2m, dpmpp_3m, exp_adams, ipndm
from fewstep.solver.singlestep import dpm_solver_2, dpm_solver_3, dpmpp_2s, heun

GENERATORS = {
    "heun": heun,
    "dpm-solver-2": dpm_solver_2,
    "dpm-solver-3": dpm_solver_3,
    "dpmpp-2s": dpmpp_2s,
    "unipc": functools.partial(unipc, order=2),
    **{
        rule.__name__: functools.partial(linear_multistep, rule=rule, order=3)
        for rule in (adams_sigma, adams_log, exp_adams, dpmpp_2m, dpmpp_3m, ipndm)
    },
}
ON_EPS = {"heun", "dpm-solver-2", "dpm-solver-3", "adams_sigma", "adams_log", "ipndm"}


def pull(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser that depends on x and sigma."""
    return torch.tanh(x / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1))))


@pytest.fixture(scope="module")
def model() -> NetworkModel:
    return load_folder(BUILTIN / "fashion-mnist")


@pytest.mark.parametrize("name", GENERATORS)
def test_levels_per_sample_equal_each_sample_on_its_own_grid(name: str) -> None:
    """Learned times: a grid whose levels are [b] tensors, with gradients."""
    grids = [[9.0, 3.0, 1.1, 0.3], [7.0, 2.5, 0.7, 0.2]]
    levels = [
        torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in zip(*grids, strict=True)
    ]
    x = 8 * torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prediction = "eps" if name in ON_EPS else "x0"

    def run(sigmas, x):
        start = functools.partial(GENERATORS[name], sigmas)
        return fewstep.solve(pull, x, Program(start, prediction, 4, (), 0))

    together = run(levels, x)
    for i, grid in enumerate(grids):
        torch.testing.assert_close(together[i], run(grid, x[i : i + 1])[0], rtol=0, atol=1e-12)
    together.sum().backward()
    assert all(level.grad is not None and torch.isfinite(level.grad).all() for level in levels[1:])


ALIASES = {
    "x itself": lambda x, sigma: x,
    "a view": lambda x, sigma: x[:],
    "a view further in": lambda x, sigma: x[1:2].expand_as(x),
}


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("name", fewstep.solvers(stochastic=False))
def test_a_denoiser_may_return_memory_of_x(name: str, alias: str) -> None:
    x_T, nfe = torch.randn(3, 4), 6
    with torch.no_grad():
        ours = fewstep.solve(ALIASES[alias], x_T, name, nfe)
        safe = fewstep.solve(lambda x, sigma: ALIASES[alias](x, sigma).clone(), x_T, name, nfe)
    torch.testing.assert_close(ours, safe, rtol=0, atol=0)


def test_an_adaptive_solver_may_keep_what_it_saw() -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def ops(sigmas):
        for cur, nxt in pairwise(sigmas):
            seen = yield Eval(cur)
            kept.append((seen.x, seen.x.clone()))
            yield Combine((1 - nxt / cur,), nxt, a=nxt / cur)

    solver = Solver("keeps", ops, "x0", 1, 1, evaluations=lambda intervals: intervals)
    with torch.no_grad():
        fewstep.solve(pull, torch.randn(2, 3), solver, 6)
    assert len(kept) == 6
    assert all(torch.equal(x, copy) for x, copy in kept)


def test_noise_may_be_one_number_per_sample() -> None:
    def ops(noise):
        yield Eval(3.0)
        yield Combine((0.5,), 1.0, a=0.5, noise=noise)

    def end(noise):
        program = Program(functools.partial(ops, noise), "x0", 1, (3.0, 1.0), 1)
        return fewstep.solve(pull, torch.ones(2, 3), program, seeds=(4, 5))

    quiet, loud, mixed = end(0.0), end(2.0), end(torch.tensor([0.0, 2.0]))
    assert torch.equal(mixed[0], quiet[0])
    torch.testing.assert_close(mixed[1], loud[1], rtol=0, atol=1e-6)
    assert not torch.equal(quiet, loud)


def test_anything_with_a_program_stands_for_a_solver(model: NetworkModel) -> None:
    class Learned:
        """As a learned solver will be: its own grid, first step and budget."""

        def program(self) -> Program:
            return get("ipndm-2").on((80.0, 9.0, 1.0, 0.002), afs="zero")

    x_T = model.prior((1, 2))
    ours = fewstep.solve(model.denoiser(), x_T, Learned())
    same = fewstep.solve(model.denoiser(), x_T, "ipndm-2", grid=(80.0, 9.0, 1.0, 0.002), afs="zero")
    assert torch.equal(ours, same)
    samples = fewstep.sample(model, solver=Learned(), seeds=(1, 2))
    assert samples.nfe == samples.provenance["nfe"] == 2
    with pytest.raises(ValueError, match="its own grid"):
        fewstep.solve(model.denoiser(), x_T, Learned(), grid="karras")
    with pytest.raises(ValueError, match="own ends"):
        fewstep.solve(pull, x_T, "ddim", grid=(9.0, 1.0), sigma_max=9.0)


def test_a_plan_samples_a_model_and_is_known_by_its_numbers(model: NetworkModel) -> None:
    plans = [get("ddim").plan((80.0, middle, 0.002)) for middle in (9.0, 5.0)]
    made = [fewstep.sample(model, solver=plan, seeds=(1,)).provenance["solver"] for plan in plans]
    assert made[0] != made[1]
    assert all(name.startswith("ddim, plan ") for name in made)


def test_a_grid_that_does_not_start_at_the_prior_is_refused(model: NetworkModel) -> None:
    with pytest.raises(ValueError, match="starts at sigma 10, but sampling at 80"):
        fewstep.sample(model, seeds=(0,), solver="ddim", grid=(10.0, 1.0, 0.002))
    with pytest.raises(ValueError, match="sampling at 20"):
        fewstep.sample(model, seeds=(0,), solver="ddim", grid=(80.0, 1.0), head_start=20.0)
    made = fewstep.sample(model, seeds=(0,), solver="ddim", grid=(20.0, 1.0, 0.1), head_start=20.0)
    assert made.nfe == made.provenance["nfe"] == 2


def test_seeds_may_come_from_numpy_and_torch(model: NetworkModel) -> None:
    assert (
        key(3, "a") == key(np.int64(3), "a") == key(np.uint8(3), "a") == key(torch.tensor(3), "a")
    )
    assert torch.equal(model.prior(range(3)), model.prior(np.arange(3)))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        key(1.5)  # type: ignore[arg-type]


def test_a_solver_with_learned_numbers_has_no_stale_plan() -> None:
    weight = torch.tensor(0.5, requires_grad=True)

    def ops(sigmas, weight):
        for cur, nxt in pairwise(sigmas):
            yield Eval(cur)
            yield Combine((weight,), nxt, a=nxt / cur)

    solver = Solver("learned", functools.partial(ops, weight=weight), "x0", 1, 1)
    for _ in range(2):  # a plan kept from the first time would have no graph left
        fewstep.solve(pull, torch.ones(1, 2), solver, 3).sum().backward()
    held = weakref.ref(weight)
    del weight, solver
    gc.collect()
    assert held() is None


def test_budgets_are_found_at_once_and_bounded() -> None:
    begun = time.perf_counter()
    assert intervals_for(get("unipc-3"), 2000) == 2000
    assert intervals_for(get("heun"), 2001, final=True) == 1000
    assert time.perf_counter() - begun < 5
    with pytest.raises(ValueError, match="from 1 to 10000"):
        intervals_for(get("ddim"), 1_000_000_000)


def test_a_count_that_is_not_even_is_found_too() -> None:
    """Heun on the first two intervals only: 2, 4, 5, 6, ... evaluations."""

    def ops(sigmas):
        for i, (cur, nxt) in enumerate(pairwise(sigmas)):
            yield Eval(cur)
            yield Combine((nxt - cur,), nxt, accept=i >= 2)
            if i < 2:
                yield Eval(nxt)
                yield Combine(((nxt - cur) / 2, (nxt - cur) / 2), nxt)

    solver = Solver("heun-first", ops, "eps", 2, 1)
    assert [intervals_for(solver, n) for n in (2, 4, 5, 9)] == [1, 2, 3, 7]
    with pytest.raises(ValueError, match="2, 4, 5"):
        intervals_for(solver, 3)


def test_the_ledger_writes_a_step_as_flatten_does() -> None:
    """Heun's second combination from sigma 1e5, over [anchor, D_0, D_1], without cancellation."""
    cur, nxt = 1e5, 4.0
    ops = list(heun((cur, nxt)))
    ledger = Ledger(depth=2)
    ledger.evaluated(torch.zeros(1), cur)
    euler, heuns = (op for op in ops if isinstance(op, Combine))
    assert ledger.combined(euler) == pytest.approx((nxt / cur, 1 - nxt / cur), rel=1e-12)
    ledger.evaluated(torch.zeros(1), nxt)
    row = ledger.combined(heuns)
    plan = fewstep.freeze(ops, prediction="eps", depth=2)
    assert row == pytest.approx(tuple(flatten(plan)), rel=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_solver_waits_for_the_device() -> None:
    x_T = torch.randn(2, 1, 8, 8, device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for name in fewstep.solvers():
                fewstep.solve(lambda x, sigma: x * 0.5, x_T, name, 6, seeds=(1, 2))
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_a_foreign_contact_sheet_is_kept(tmp_path: Path, model: NetworkModel) -> None:
    from fewstep.sampling.folder import sample_to_folder
    from fewstep.sampling.request import Request
    from fewstep.sampling.settings import Settings

    write_png(tmp_path / "sheet.png", np.zeros((4, 4), dtype=np.uint8))
    before = (tmp_path / "sheet.png").read_bytes()
    with pytest.raises(ValueError, match=r"sheet\.png .*not made by fewstep"):
        sample_to_folder(model, tmp_path, Request((0,)), Settings(nfe=2))
    assert (tmp_path / "sheet.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"sigma": 80.0', '"sigma": "x"'), "finite"),
        (('"sigma": 80.0', '"sigma": NaN'), "finite"),
        (('"depth": 1', '"depth": -1'), "depth"),
        (('"op": "eval"', '"op": "eval", "source": "afs"'), "source"),
        (('"op": "eval"', '"op": "evil"'), "not a plan"),
    ],
)
def test_a_plan_from_a_stranger_is_checked(change: tuple[str, str], message: str) -> None:
    text = get("ddim").plan((80.0, 1.0)).to_json()
    assert change[0] in text
    with pytest.raises(ValueError, match=message):
        fewstep.Plan.from_json(text.replace(*change))
