"""AMED-Solver and AMED-Plugin against loops written out by hand, and the laws of their training."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

import fewstep
from fewstep.grid import GRIDS, make_grid
from fewstep.learned import LearnedSolver, train
from fewstep.learned.amed import Amed
from fewstep.learned.ops import base_of, bases
from fewstep.learned.predictor import Predictor, Values
from fewstep.learned.teacher import Frozen, Teacher, fine_grid
from fewstep.models.exact import Gaussian, GaussianMixture
from fewstep.plan import Program
from fewstep.sampling.choose import choose
from fewstep.sampling.settings import Settings
from fewstep.schedule import VP
from tests.support.command import command, defaults
from tests.support.testbed import Counted, Mixture, eps_of, largest, noise

BASES = [None, "dpm-solver-2", "ddim", "ipndm-3", "ipndm-4", "dpmpp-2m", "dpmpp-3m"]
GRID = (20.0, 6.0, 1.7, 0.4, 0.05)
CPU = torch.device("cpu")


class Tapped(Mixture):
    """The mixture with a feature map [b, 5, 2, 2] that depends on x and sigma."""

    def with_features(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        turned = torch.tensordot(x / (1 + sigma[:, None]), TURN.to(x), dims=1)  # [b, 5, 2, 2]
        return self(x, sigma), turned


TURN = torch.randn(3, 5, 2, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def predictor(features: int, dtype: torch.dtype = torch.float64, time: float = 0.2) -> Predictor:
    """With random heads, so that its values differ between samples and steps."""
    fresh = Predictor.fresh(features, 0.1, time, 3, CPU)
    gen = torch.Generator().manual_seed(4)
    weights = {
        name: (torch.randn(w.shape, generator=gen) if name.startswith("head") else w).to(dtype)
        for name, w in fresh.weights.items()
    }
    return replace(fresh, weights=weights)


def solver(base: str | None, afs: str = "none", features: int = 4, **kwargs: Any) -> Amed:
    kind = "amed" if base is None else "amed-plugin"
    return Amed(kind, base, GRID, afs, predictor(features, **kwargs))


def hand_values(weights: dict[str, Tensor], features: np.ndarray, cur: float, nxt: float):
    """r, c, a by the formulas of the paper, in numpy."""
    w = {name: value.double().numpy() for name, value in weights.items()}

    def sigmoid(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    def layer(name: str, z: np.ndarray) -> np.ndarray:
        return z @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    hidden = layer("hidden", features)
    code = layer("code", hidden * sigmoid(hidden))
    levels = []
    for sigma in (cur, nxt):
        angles = np.array([1.0, 2.0, 4.0, 8.0]) * math.log(sigma) / 4
        level = layer("level", np.concatenate((np.cos(angles), np.sin(angles))))
        levels.append(level * sigmoid(level))
    joined = np.concatenate((code, np.tile(np.concatenate(levels), (len(code), 1))), axis=1)
    share = sigmoid(layer("head", joined))
    return share[:, 0], 1 + 0.1 * (2 * share[:, 1] - 1), 1 + 0.2 * (2 * share[:, 2] - 1)


def hand_features(seen: Tensor, sigma: float) -> np.ndarray:
    level = torch.full((len(seen),), sigma, dtype=seen.dtype)
    return Tapped().with_features(seen, level)[1].mean(1).flatten(1).numpy()


def told(denoiser: Any, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
    """eps of a network that is told cond: divided by sigma."""
    return (x - denoiser(x, cond)) / sigma[:, None]


UNIFORM = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def hand_loop(base: str | None, afs: str, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The whole solver as its papers have it, over eps and sigma; multistep bases but for dpmpp
    keep eps, dpmpp-2m keeps D and log sigma."""
    denoiser, outputs, levels = Tapped(), [], []
    for i, (cur, nxt) in enumerate(pairwise(GRID)):
        analytic = i == 0 and afs != "none"
        features = np.zeros((len(x), 4)) if analytic else hand_features(x, cur)
        r, c, a = (
            torch.from_numpy(np.asarray(v))[:, None]
            for v in hand_values(weights, features, cur, nxt)
        )
        if analytic and afs == "zero":
            eps = x / math.sqrt(1 + cur**2)
        elif analytic:
            eps = (x - denoiser.far_mean) / cur
        else:
            eps = eps_of(denoiser, x, cur)
        mid = nxt**r * cur ** (1 - r)
        if base in (None, "dpm-solver-2"):
            x_mid = x + (mid - cur) * eps
            eps_mid = told(denoiser, x_mid, mid[:, 0], (a * mid)[:, 0])
            if base is not None:
                eps_mid = eps_mid / (2 * r) + (1 - 1 / (2 * r)) * eps
            x = x + c * (nxt - cur) * eps_mid
        elif base.startswith("ipndm"):
            order = int(base[-1])
            outputs = [eps, *outputs][:order]
            sums = [w * e for w, e in zip(UNIFORM[len(outputs) - 1], outputs, strict=True)]
            x = x + (mid - cur) * sum(sums)
            outputs = [told(denoiser, x, mid[:, 0], (a * mid)[:, 0]), *outputs][:order]
            sums = [w * e for w, e in zip(UNIFORM[len(outputs) - 1], outputs, strict=True)]
            x = x + c * (nxt - mid) * sum(sums)
        else:  # dpmpp-2m: x_t = (t/s) x - (e^-h - 1) D, D = (1 + 1 / 2q) D_0 - D_1 / 2q
            outputs, levels = [x - cur * eps, *outputs], [torch.full_like(r, cur), *levels]
            for to, scale in ((mid, 1.0), (torch.full_like(r, nxt), c)):
                h = (levels[0] / to).log()
                mixed = outputs[0]
                if len(outputs) > 1:
                    q = (levels[1] / levels[0]).log() / h
                    mixed = (1 + 1 / (2 * q)) * outputs[0] - outputs[1] / (2 * q)
                x = (to / levels[0]) * x - scale * torch.expm1(-h) * mixed
                if to is mid:
                    eps = told(denoiser, x, mid[:, 0], (a * mid)[:, 0])
                    outputs, levels = [x - mid * eps, *outputs], [mid, *levels]
    return x


@pytest.mark.parametrize("afs", ["none", "zero", "mean"])
@pytest.mark.parametrize("base", [None, "dpm-solver-2", "ipndm-3", "ipndm-4", "dpmpp-2m"])
def test_a_learned_solver_is_the_loop_written_by_hand(base, afs):
    x, method = noise(5, GRID[0]), solver(base, afs)
    ours = fewstep.solve(Tapped(), x, method)
    theirs = hand_loop(base, afs, x, method.predictor.weights)
    # [b] coefficients are float64, but their sums come in another order: D-form, see the loop
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
def test_gradients_pass_through_the_loop(base):
    x, inserted = noise(2, GRID[0]), base_of(base)
    means = torch.tensor([[0.6, -0.3, 0.2], [-0.5, 0.4, 0.5]])
    denoiser = GaussianMixture(torch.tensor([0.4, 0.6]), means, 0.2)
    leaves = [
        torch.full((2,), value, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
        for value in (0.4, 0.97, 1.05)
    ]

    def end(*rows: Tensor) -> Tensor:
        def ops():
            return inserted.ops(
                GRID[:4], lambda i, seen: Values(*rows[3 * i : 3 * i + 3]), "zero", False
            )

        program = Program(ops, inserted.prediction, inserted.depth, GRID[:4], 5, adapts=True)
        return fewstep.solve(denoiser, x, program)

    assert torch.autograd.gradcheck(end, leaves, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("afs", ["none", "zero"])
def test_it_spends_what_it_says(base, afs):
    counted, method = Counted(Mixture()), solver(base, afs, features=0)
    fewstep.solve(counted, noise(2, GRID[0]), method)
    assert counted.calls == method.program().evaluations == 8 - (afs == "zero")


def test_one_sample_is_alone_in_its_batch():
    x, method = noise(6, GRID[0]), solver("ipndm-3")
    alone = torch.cat([fewstep.solve(Tapped(), one[None], method) for one in x])
    torch.testing.assert_close(fewstep.solve(Tapped(), x, method), alone, rtol=0, atol=1e-12)


def test_an_untrained_solver_is_dpm_solver_2_with_its_midpoint():
    method = Amed("amed-plugin", "dpm-solver-2", GRID, "none", Predictor.fresh(4, 0.1, 0.1, 0, CPU))
    x = noise(3, GRID[0])
    ours = fewstep.solve(Tapped(), x, method)
    theirs = fewstep.solve(Tapped(), x, "dpm-solver-2", grid=GRID)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_predictor_is_small():
    weights = Predictor.fresh(64, 0.01, 0.2, 0, CPU).weights
    assert 8_500 < sum(w.numel() for w in weights.values()) < 9_500


def test_plans_are_the_solver_itself_where_it_reads_no_features():
    for base in BASES:
        method, x = solver(base, "mean", features=0), noise(3, GRID[0])
        plan = LearnedSolver(method).plan()
        ours, theirs = fewstep.solve(Mixture(), x, method), fewstep.solve(Mixture(), x, plan)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="differ between samples"):
        LearnedSolver(solver(None)).plan()


# -- the teacher ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize("inner", [0, 1, 3])
def test_the_teacher_visits_the_students_points(name, inner):
    schedule = VP.linear()
    sigmas = make_grid(name, 4, 80.0, 0.05, schedule)
    fine = fine_grid(name, sigmas, inner, schedule)
    assert fine[:: inner + 1] == sigmas
    exact = make_grid(name, 3 * (inner + 1) + 1, 80.0, 0.05, schedule)
    np.testing.assert_allclose(fine, exact, rtol=1e-12)


@pytest.mark.parametrize("name", ["heun", "dpm-solver-2", "deis-3", "unipc-2"])
def test_the_teachers_states_are_those_of_the_plain_solver(name):
    sigmas = (20.0, 4.0, 0.5)
    fine, x = fine_grid(None, sigmas, 2), noise(3, 20.0)
    states = Teacher(name, sigmas, fine).path(Mixture(), x).states
    seen = {20.0: x} | {s.sigma: s.x for s in fewstep.iterate(Mixture(), x, name, grid=fine)}
    assert all(torch.equal(state, seen[s]) for state, s in zip(states, sigmas, strict=True))


@pytest.mark.parametrize("tapped", [True, False])
@pytest.mark.parametrize("method, afs", [("amed", "zero"), ("amed-plugin", "mean")])
def test_what_the_teacher_saw_is_not_evaluated_again(method, afs, tapped):
    calls: list[int] = []

    class Counting(Tapped):
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            calls.append(len(x))
            return super().__call__(x, sigma)

    after: list[int] = []
    train(
        Counting(),
        (3,),
        method=method,
        grid="karras",
        afs=afs,
        trajectories=12,
        batch=4,
        validation_seeds=1,
        validate_every=100,
        features=tapped,
        report=lambda progress: after.append(len(calls)),
    )
    # 3 intervals: 9 evaluations of deis-3, one in each interval, and those at its start where the
    # student does not stand where the teacher did
    assert after[1] - after[0] == (9 + 3 if method == "amed" else 9 + 5)


def test_frozen_networks_keep_no_gradient_and_checkpoints_change_none():
    net = torch.nn.Linear(3, 3).double()
    calls = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(len(x))
        return net(x) / (1 + sigma[:, None])

    gradients = []
    for checkpointed in (False, True):
        frozen = Frozen(denoiser, checkpointed)
        x = noise(2, 1.0).requires_grad_()
        sigma = torch.ones(2, dtype=torch.float64)
        frozen(frozen(x, sigma), sigma).square().sum().backward(inputs=[x])
        gradients.append(x.grad)
    assert len(calls) == 2 + 4  # twice forward; checkpointed, twice more
    assert torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]
    assert net.weight.grad is None
    assert not Frozen(denoiser)(noise(2, 1.0), torch.ones(2)).requires_grad


# -- training ---------------------------------------------------------------------------------

TOY = GaussianMixture(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.tensor([[0.6, -0.3, 0.2], [-0.5, 0.4, 0.5], [0.1, 0.5, -0.7]]),
    0.1,
    sigma_min=0.01,
    sigma_max=20.0,
)
SHORT = {
    "method": "amed",
    "trajectories": 96,
    "batch": 16,
    "validation_seeds": 16,
    "validate_every": 2,
}
SHORT |= {"fallback": False}


def short(out: Path | None = None, denoiser: Any = TOY, **more: Any) -> LearnedSolver:
    return train(denoiser, (3,), **{**SHORT, "grid": "karras", "out": out, **more})


def test_r_is_the_root_of_a_gaussians_step():
    cur, nxt, variance = 2.0, 0.5, 0.25
    exact = math.sqrt((variance + nxt**2) / (variance + cur**2))

    def off(r: float) -> float:
        s = nxt**r * cur ** (1 - r)
        at_s = 1 + (s - cur) * cur / (variance + cur**2)
        return 1 + (nxt - cur) * s / (variance + s**2) * at_s - exact

    root = brentq(off, 0.05, 0.95)
    found = train(
        Gaussian(torch.zeros(3), rest=variance),
        (3,),
        method="amed",
        nfe=2,
        grid=(cur, nxt),
        scale_dir=0.0,
        teacher="deis-4",
        inner=40,
        trajectories=1600,
        batch=4,
        lr=0.01,
        validation_seeds=8,
        validate_every=50,
    )
    r, c, a = found.method.rows()[0]  # type: ignore[attr-defined]
    assert (c, a) == (1, 1)
    assert abs(r - root) < 1e-3


@pytest.mark.parametrize("base", [None, "dpm-solver-2", "ipndm-3", "dpmpp-2m"])
def test_training_lowers_the_error_and_keeps_the_best(base):
    method = "amed" if base is None else "amed-plugin"
    measured = []
    found = short(
        method=method,
        base=base,
        trajectories=640,
        lr=0.02,
        report=lambda p: measured.append(p.validation and p.validation["error"]),
    )
    reported = [one for one in measured if one] + [found.validation["error_untrained"]]
    assert found.validation["error"] == min(reported) < 0.9 * found.validation["error_untrained"]
    seeds = range(*found.validation["seeds"])
    x = 20.0 * fewstep.noise.normal(seeds, (3,), "prior")
    exact = fewstep.solve(TOY, x, "deis-4", 40)
    error = (fewstep.solve(TOY, x, found) - exact).square().mean(1).sqrt().mean().item()
    assert math.isclose(error, found.validation["error"], rel_tol=1e-5)


def test_conditions_see_training_and_validation_seeds_alone():
    seen: set[int] = set()

    def conditions(seeds: Any) -> Any:
        seen.update(seeds)
        return TOY

    short(conditions=conditions, seed=1)
    validation, training = range(1_000_000, 1_000_016), range(2_000_096, 2_000_192)
    assert seen == {*validation, *training}


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", ["amed", "amed-plugin"])
@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_run_that_was_stopped_ends_where_the_other_does(method, at, tmp_path):
    def stop(progress: Any) -> None:
        if progress.step == at:
            raise Stop

    whole = short(tmp_path / "whole", method=method, checkpoint_every=2)
    with pytest.raises(Stop):
        short(tmp_path / "cut", method=method, checkpoint_every=2, report=stop)
    again = short(tmp_path / "cut", method=method, checkpoint_every=2)
    assert again.digest == whole.digest
    for name in ("solver.json", "predictor.safetensors", "log.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_settings_do_not_go_on_with_a_run(tmp_path):
    short(tmp_path)
    with pytest.raises(ValueError, match=r"lr=0.02 \(now 0.01\)"):
        short(tmp_path, lr=0.01)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match="cannot be read"):
        short(tmp_path)
    (tmp_path / "checkpoint.safetensors").unlink()
    with pytest.raises(ValueError, match="so it is another's"):
        short(tmp_path)


def test_a_run_goes_on_with_its_own_denoiser_alone(tmp_path):
    """Where no hash tells networks apart, D at one start does."""
    short(tmp_path)

    wider = GaussianMixture(TOY.weights, TOY.means, 0.2, sigma_min=0.01, sigma_max=20.0)

    def second(seeds: Any) -> Any:
        return wider if 1_000_001 in seeds else TOY

    for change in ({"denoiser": wider}, {"conditions": second}):
        with pytest.raises(ValueError, match="of a run on another denoiser, conditions or noise"):
            short(tmp_path, **change)
    nearly = GaussianMixture(TOY.weights, TOY.means + 1e-3, 0.1, sigma_min=0.01, sigma_max=20.0)
    assert short(tmp_path, denoiser=nearly).digest == short(tmp_path).digest
    hashed: dict[str, Any] = {"model": {"name": "toy", "weights": "abc"}}
    known = short(tmp_path / "hashed", **hashed)
    assert short(tmp_path / "hashed", denoiser=wider, **hashed).digest == known.digest


def test_other_runs_are_told_by_what_can_be_typed(tmp_path):
    short(tmp_path)
    with pytest.raises(ValueError, match=r"nfe=5 \(now 7\), seed=0 \(now 3\), batch=") as caught:
        short(tmp_path, nfe=7, seed=3, batch=4)
    assert len(str(caught.value)) < 150 + len(str(tmp_path))
    with pytest.raises(ValueError, match=r"scale_dir=0.01 \(now 0.1\)"):
        short(tmp_path, scale_dir=0.1)
    searched: dict[str, Any] = {"method": "tuned", "grid": "search"}
    short(tmp_path / "tuned", **searched)
    for change in ({"sigma_min": 0.02}, {"sigma_max": 10.0}, {"end": "zero"}):
        with pytest.raises(ValueError, match=f"is of a run with {next(iter(change))}="):
            short(tmp_path / "tuned", **searched, **change)


def test_a_folder_is_looked_at_before_any_work(tmp_path):
    """Its refusals come before the search for a grid, and a wrong loss leaves nothing behind."""
    begun = []
    short(tmp_path / "a", method="tuned", grid="search", note=begun.append)
    assert begun == ["searching for the grid", "solving the validation seeds finely"]
    begun.clear()
    short(tmp_path / "a", method="tuned", grid="search", note=begun.append)
    with pytest.raises(ValueError, match="seed=0"):
        short(tmp_path / "a", method="tuned", grid="search", seed=1, note=begun.append)
    with pytest.raises(ValueError, match="no solver called 'hoin'"):
        short(tmp_path / "b", method="tuned", grid="search", teacher="hoin", note=begun.append)
    with pytest.raises(ValueError, match="leave out loss_features"):
        short(tmp_path / "c", loss_features=torch.sin, note=begun.append)
    with pytest.raises(ValueError, match="cache needs model"):
        short(tmp_path / "c", method="tuned", grid="search", cache=tmp_path, note=begun.append)
    assert begun == []
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["tuned", "amed"])
def test_a_denoiser_without_gradients_is_refused(mode, method):
    with pytest.raises(ValueError, match="no gradient goes through the denoiser"):
        short(denoiser=mode()(lambda x, sigma: TOY(x, sigma)), method=method)
    scale = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="no gradient goes through the denoiser"):
        short(denoiser=lambda x, sigma: scale * TOY(x.detach(), sigma), method=method)
    short(denoiser=mode()(lambda x, sigma: TOY(x, sigma)), method="grid", base="ddim")


def test_an_untrained_solver_that_ends_nowhere_is_one_line():
    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where((sigma - 5).abs()[:, None] < 1e-6, math.nan, TOY(x, sigma))

    with pytest.raises(FloatingPointError, match="untrained solver ends in NaN or infinity"):
        short(denoiser=broken, method="tuned", nfe=3, afs="none", grid=(20.0, 5.0, 1.0, 0.05))


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("no folder")
    run: dict[str, Any] = {"method": "tuned", "model": {"name": "toy", "weights": "abc"}}
    with pytest.warns(UserWarning, match="nothing is kept in .*file"):
        without = short(cache=tmp_path / "file", **run)
    assert without.plan() == short(**run).plan()


UNSET = {"label", "prompts", "prompt", "negative", "guidance", "afs", "squared"}  # off unless given


def test_the_help_has_every_default():
    text = command("train", "solver", "--help", env={"COLUMNS": "400"}).stdout
    plain = re.sub(r"[\s│]+", " ", text)
    for name, value in defaults("train", "solver").items():
        if name not in UNSET and value is not False:
            said = plain.split(f" --{name.replace('_', '-')} ", 1)[1].split(" --", 1)[0]
            said = said if value is not True else "Default"
            assert "default: " in said.lower() or value is True, name


def bad_shape(x: Tensor, sigma: Tensor) -> Tensor:
    return x[:, :1]


def bad_values(x: Tensor, sigma: Tensor) -> Tensor:
    return x * math.nan


def bad_below_one(x: Tensor, sigma: Tensor) -> Tensor:
    return TOY(x, sigma) + torch.where(sigma < 1, math.nan, 0.0)[:, None]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "amid"}, "no method is called 'amid'"),
        ({"nfe": 6, "afs": "zero"}, "an odd number of evaluations, got nfe=6"),
        ({"nfe": 5, "afs": "none"}, "an even number of evaluations, got nfe=5"),
        ({"nfe": 0}, "nfe must be a whole number, at least 1, got 0"),
        ({"afs": "one"}, "afs must be one of none, zero, mean"),
        ({"base": "ddim"}, "amed has no base"),
        ({"method": "amed-plugin", "base": "heun"}, "no way into 'heun'"),
        ({"method": "amed-plugin", "base": "hoin"}, "no solver called 'hoin'"),
        ({"teacher": "ddim-eta"}, "a teacher must be a deterministic solver"),
        ({"inner": -1}, "inner must be a whole number, at least 0"),
        ({"grid": (20.0, 1.0)}, "spent on 4 sigmas here, got 2"),
        ({"grid": (20.0, 5.0, 1.0, 0.0)}, "must end above 0"),
        ({"scale_dir": 1.5}, "scale_dir must be at least 0 and below 1, got 1.5"),
        ({"scale": 0.1}, "amed has no option 'scale'; it has: scale_dir, scale_time, features"),
        ({"features": True}, "with_features"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"batch": 0}, "batch must be a whole number, at least 1"),
        ({"loss_features": torch.sin}, "leave out loss_features"),
        ({"denoiser": bad_shape}, "the shape of x"),
        ({"denoiser": lambda x, sigma: (x, sigma)}, "the shape of x"),
        ({"denoiser": bad_values}, "NaN or infinity at sigma"),
        ({"prior": lambda seeds: torch.zeros(len(seeds), 4)}, "prior must return"),
    ],
)
def test_what_cannot_be_trained_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        short(**arguments)
    assert "\n" not in str(caught.value)


def test_a_network_that_fails_on_the_way_is_one_line():
    with pytest.raises(FloatingPointError, match="NaN or infinity in a reference solve; try"):
        short(denoiser=bad_below_one)


# -- files and use ----------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, "ipndm-3"])
def test_a_folder_is_the_solver(base, tmp_path):
    method = "amed" if base is None else "amed-plugin"
    found = short(tmp_path, denoiser=Tapped(), method=method, base=base, model={"name": "toy"})
    again, x = LearnedSolver.load(tmp_path), noise(4, 20.0).float()
    assert again.program().name == found.program().name
    assert (again.nfe, again.sigmas, again.model) == (5, found.sigmas, {"name": "toy"})
    assert re.fullmatch(r"<LearnedSolver: amed.* [0-9a-f]{12}, 5 evaluations>", repr(again))
    ours = fewstep.solve(Tapped(), x, found)
    for theirs in (again, str(tmp_path), tmp_path):
        assert torch.equal(ours, fewstep.solve(Tapped(), x, theirs))
    assert torch.equal(ours, fewstep.solve(Tapped(), x, again, nfe=5))
    for state in fewstep.iterate(Tapped(), x, str(tmp_path)):
        last = state
    assert torch.equal(ours, last.x)
    with pytest.raises(ValueError, match="was trained for nfe=5, got nfe=7"):
        fewstep.solve(Tapped(), x, str(tmp_path), 7)


def test_files_that_were_cut_short_are_one_line(tmp_path):
    short(tmp_path, denoiser=Tapped())
    for name in ("solver.json", "predictor.safetensors"):
        data = (tmp_path / name).read_bytes()
        for size in (0, 1, len(data) // 2, len(data) - 3):
            (tmp_path / name).write_bytes(data[:size])
            with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as caught:
                LearnedSolver.load(tmp_path)
            assert "\n" not in str(caught.value)
        (tmp_path / name).write_bytes(data)
    LearnedSolver.load(tmp_path)
    (tmp_path / "predictor.safetensors").unlink()
    with pytest.raises(ValueError, match=r"predictor.safetensors is missing"):
        LearnedSolver.load(tmp_path)
    with pytest.raises(ValueError, match=r"there is no such folder"):
        LearnedSolver.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "fewstep-solver/2"}, "update fewstep"),
        ({"method": "amed-2030"}, "update fewstep"),
        ({"nfe": 7}, "nfe is 7, but it spends 5"),
        ({"sigmas": [20.0, 30.0, 1.0, 0.01]}, "strictly decrease"),
        ({"afs": "other"}, "afs must be one of"),
        ({"settings": {"features": 5, "scale_dir": 0.01, "scale_time": 0.0}}, "do not fit"),
        ({"settings": None}, "cannot be used"),
        ({"base": "ddim"}, "base must not be given"),
        ({"predictor_sha256": "0" * 64}, "damaged or of another solver"),
    ],
)
def test_a_file_that_was_changed_is_one_line(change, message, tmp_path):
    short(tmp_path, denoiser=Tapped())
    path = tmp_path / "solver.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        LearnedSolver.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_network_without_its_features_is_one_line():
    found = short(denoiser=Tapped())
    with pytest.raises(ValueError, match="the denoiser has no with_features"):
        fewstep.solve(Mixture(), noise(2, 20.0), found)

    class Other(Tapped):
        def with_features(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            return self(x, sigma), x.reshape(len(x), 1, 1, 3)

    with pytest.raises(ValueError, match="reads 4 features and the network gives 3"):
        fewstep.solve(Other(), noise(2, 20.0), found)


def test_another_model_is_warned_of():
    found = short(model={"name": "toy", "weights": "aaa"})
    card = SimpleNamespace(
        name="other", weights_sha256="bbb", sigma_max=20.0, distilled=None, auto={}
    )
    with pytest.warns(UserWarning, match="trained on other weights than those of other"):
        settings = choose(SimpleNamespace(card=card), Settings(found))  # type: ignore[arg-type]
    assert settings.nfe == 5
    same = SimpleNamespace(card=SimpleNamespace(**{**vars(card), "weights_sha256": "aaa"}))
    record = choose(same, Settings(found)).record()  # type: ignore[arg-type]
    assert record["solver"] == f"amed {found.digest}"
    assert record["nfe"] == 5


def test_the_command_trains_and_its_folder_is_a_solver(tmp_path):
    def run(*arguments: Any) -> str:
        result = command(*arguments)
        if result.exit_code:
            raise ValueError(result.stderr.strip())
        return result.stdout

    out, pictures = tmp_path / "solver", tmp_path / "pictures"
    short_run = ("--trajectories", 8, "--batch", 4, "--validation-seeds", 2, "--nfe", 3)
    told = run(
        *("train", "solver", "fashion-mnist", "--method", "amed-plugin", "--base", "ipndm-2"),
        *("--grid", "karras", "--label", "all", "--guidance", 1.5, "--not-fallback"),
        *("--out", out, *short_run),
    )
    assert re.search(r"amed-plugin on ipndm-2 \w+, 3 evaluations, error 0\.\d+", told)
    assert "3 evaluations each" in run(
        *("sample", "--solver", out, "--out", pictures, "--seeds", "0-1", "--json")[:-1]
    )
    assert json.loads((out / "solver.json").read_text())["model"]["name"] == "fashion-mnist"
    with pytest.raises(ValueError, match="was trained for nfe=3, got nfe=4"):
        run("sample", "--solver", out, "--nfe", 4, "--out", pictures)


def test_a_grid_that_starts_below_has_no_analytic_first_step(tmp_path):
    short_run = ("--trajectories", "2", "--batch", "2", "--validation-seeds", "1", "--inner", "3")
    solver = ("train", "solver", "fashion-mnist", "--nfe", "2", "--out", str(tmp_path))
    result = command(*solver, "--grid", "20,1,0.002", "--not-fallback", *short_run)
    assert result.exit_code == 0, result.output
    assert LearnedSolver.load(tmp_path).method.afs == "none"


def test_every_linear_multistep_solver_is_a_base():
    assert {"ddim", "ipndm-1", "ipndm-4", "dpmpp-2m", "dpmpp-3m", "dpm-solver-2"} <= set(bases())
    assert largest(torch.tensor([base_of(name).states for name in bases()])) == 2
