"""`tuned`: its table is the base solver's until it learns, and what it learns is what runs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import fewstep
from fewstep.learned import LearnedSolver, train
from fewstep.learned.method import Lesson
from fewstep.learned.teacher import Path
from fewstep.learned.tuned import PARTS, TUNED, Tuned
from fewstep.plan import flatten, stages
from fewstep.solver import get, names
from tests.support.testbed import Mixture, noise

SIGMAS = (20.0, 6.0, 2.0, 0.5, 0.05)  # from the mixture's sigma_max
SHAPE = (3,)


def short(**changes):
    values = {
        "method": "tuned",
        "fallback": False,
        "nfe": 3,
        "trajectories": 64,
        "batch": 16,
        "grid": "log-snr",
        "sigma_min": 0.05,
        "sigma_max": 10.0,
        "inner": 15,
        "validation_seeds": 16,
        "validate_every": 1,
    }
    return {**values, **changes}


def moved(tuned: Tuned, seed: int = 0) -> Tuned:
    """The same with every learned number away from 0."""
    generator = torch.Generator().manual_seed(seed)
    for value in tuned.learned.values():
        value += 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return tuned


@pytest.mark.parametrize("solver", list(names(stochastic=False)))
def test_last_stage_is_the_flattened_plan(solver):
    plan = get(solver).plan(SIGMAS)
    np.testing.assert_array_equal(stages(plan)[-1], flatten(plan))


@pytest.mark.parametrize("afs", ["none", "zero", "mean"])
@pytest.mark.parametrize("base", ["ddim", "ipndm-3", "unipc-2", "dpmpp-3m", "heun", "dpm-solver-2"])
def test_untrained_table_is_the_base_solver(base, afs, mixture):
    x = noise(4, 20.0).double()
    ours = fewstep.solve(mixture, x, Tuned.start(base, SIGMAS, afs))
    theirs = fewstep.solve(mixture, x, base, grid=SIGMAS, afs=afs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def by_hand(mixture, tuned: Tuned, x):
    """The states as the docstring has them, from x_T and the D's, no step in between."""
    p, r, q = (tuned.learned[part] for part in ("times", "told", "weights"))
    outputs = []
    k_all = len(tuned.sources)
    for k in range(k_all + 1):
        moves = 0 < k < k_all and tuned.sources[k] == "net"
        alpha = tuned.alphas[k] * (math.exp(p[k]) if moves else 1.0)
        state = alpha * x
        for j in range(k):
            n = float(tuned.weights[k, j])
            for i in range(k):  # D_{k-1-m} has (-1)^m C(i, m) in the i-th difference
                m = k - 1 - j
                if m <= i:
                    n += float(q[k, i]) * (-1) ** m * math.comb(i, m)
            state = state + (1 - alpha) * n * outputs[j]
        if k == k_all:
            return state
        if tuned.sources[k] == "mean":
            outputs.append(mixture.far_mean.to(x).expand_as(x))
        else:
            told = alpha * tuned.sigmas[0] * torch.exp(r[k])  # sigma_k = alpha_k sigma_T
            outputs.append(mixture(state, told.expand(len(x)).to(x)))


@pytest.mark.parametrize("afs", ["none", "mean"])
def test_moved_table_runs_as_written_by_hand(afs, mixture):
    x = noise(4, 20.0).double()
    tuned = moved(Tuned.start("ipndm-3", SIGMAS, afs))
    ours = fewstep.solve(mixture, x, tuned)
    torch.testing.assert_close(ours, by_hand(mixture, tuned, x), rtol=0, atol=1e-10)


def test_gradients_through_the_chain(mixture):
    x = noise(2, 20.0).double()
    tuned = moved(Tuned.start("ipndm-2", SIGMAS[:3], "mean"))

    def end(times, told, weights):
        from dataclasses import replace

        from fewstep.plan import Program

        one = replace(tuned, learned={"times": times, "told": told, "weights": weights})
        program = Program(one.ops, "x0", len(one.sources), one.sigmas, 1, adapts=True)
        return fewstep.solve(mixture, x, program)

    inputs = [tuned.learned[part].clone().requires_grad_() for part in PARTS]
    assert torch.autograd.gradcheck(end, inputs, atol=1e-6)


def test_training_lowers_the_error_by_half(mixture):
    solver = train(mixture, SHAPE, **short(trajectories=1600, lr=0.05, validate_every=20))
    found = solver.validation
    assert found["error"] < 0.5 * found["error_untrained"]
    x = noise(64, 10.0, seed=5)
    exact = fewstep.solve(mixture, x, "exp-adams-4", 200, sigma_min=0.05, sigma_max=10.0)

    def error(end):
        return (end - exact).square().mean().sqrt().item()

    untrained = fewstep.solve(
        mixture, x, "ipndm-2", 3, grid="log-snr", sigma_min=0.05, sigma_max=10.0
    )
    assert error(fewstep.solve(mixture, x, solver)) < 0.6 * error(untrained)


@pytest.mark.parametrize("part", PARTS)
def test_only_the_part_that_is_named_moves(part, mixture):
    solver = train(mixture, SHAPE, **short(parts=(part,)))
    method = solver.method
    assert list(method.parameters()) == [part]
    assert any(value.abs().max() > 0 for value in method.parameters().values())


def test_result_is_a_plan_that_survives_its_file(mixture, tmp_path):
    solver = train(mixture, SHAPE, **short(out=tmp_path))
    again = LearnedSolver.load(tmp_path)
    assert again.plan() == solver.plan()
    assert again.nfe == fewstep.nfe(again.plan()) == 3
    x = noise(3, 10.0)
    torch.testing.assert_close(
        fewstep.solve(mixture, x, str(tmp_path), 3), fewstep.solve(mixture, x, solver)
    )


class Stopped(Exception):
    pass


def test_resumed_run_ends_with_the_same_file(mixture, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(mixture, SHAPE, **short(out=whole, checkpoint_every=1))

    def stop(progress):
        if progress.step == 2:
            raise Stopped

    with pytest.raises(Stopped):
        train(mixture, SHAPE, **short(out=parts, checkpoint_every=1, report=stop))
    train(mixture, SHAPE, **short(out=parts, checkpoint_every=1))
    assert (whole / "solver.json").read_bytes() == (parts / "solver.json").read_bytes()


def test_kept_teacher_ends_are_not_solved_again(tmp_path, mixture):
    calls = []

    class Spy(Mixture):
        def __call__(self, x, sigma):
            calls.append(len(x))
            return super().__call__(x, sigma)

    spy = Spy()
    run = short(cache=tmp_path, model={"name": "toy", "weights": "abc"})
    afs = train(spy, SHAPE, **run)
    once = len(calls)
    calls.clear()
    second = train(spy, SHAPE, **run)
    teacher, fine = 4 * 16, 41  # evaluations: of four batches, and of the validation seeds
    assert once - len(calls) == teacher + fine
    assert second.plan() == afs.plan()
    with pytest.raises(ValueError, match="weights"):
        train(spy, SHAPE, **short(cache=tmp_path))


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("features", [None, lambda x: x[:, :1]], ids=["pixels", "features"])
def test_the_loss_is_the_distance_at_the_end(squared, shift, features, mixture):
    """Of each sample, root mean square, and then the mean, or its square's mean; and a multiple of
    that of the means."""
    table = moved(Tuned.start("ddim", SIGMAS, "none", squared=squared, shift=shift))
    x = noise(5, SIGMAS[0])
    end = 3 * noise(5, 1.0, seed=1)
    gap = (fewstep.solve(mixture, x, table.plan()) - end).numpy()
    seen = gap if features is None else gap[:, :1]
    (loss,) = table.losses(Lesson(mixture, x, Path((x, end), ()), features))
    distances = np.sqrt(np.square(seen).mean(1))
    wanted = np.square(distances).mean() if squared else distances.mean()
    wanted += shift * np.sqrt(np.square(seen.mean(0)).mean())
    np.testing.assert_allclose(loss.value.item() / 3, wanted, rtol=1e-9)


@pytest.mark.parametrize(("features", "shift"), [(None, 0.0), (lambda x: x, 2.0)])
def test_the_shift_counts_in_features_unless_told_otherwise(features, shift, mixture):
    run = short(loss_features=features, trajectories=8)
    usual = {"parts": ["times", "told", "weights"], "squared": False}
    assert train(mixture, SHAPE, **run).training["options"] == {**usual, "shift": shift}
    told = train(mixture, SHAPE, **run, shift=1.0, squared=True, parts=("told",))
    assert told.training["options"] == {"parts": ["told"], "squared": True, "shift": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": -1.0}, "shift must be finite and at least 0, got -1"),
        ({"shift": float("inf")}, "shift must be finite and at least 0, got inf"),
        ({"parts": ()}, "parts must be some of times, told, weights, each once, got none"),
        ({"parts": ("told", "told")}, "each once, got told, told"),
        ({"parts": ("foo",)}, "each once, got foo"),
    ],
)
def test_an_option_out_of_range_is_named(options, message, mixture):
    with pytest.raises(ValueError, match=message):
        train(mixture, SHAPE, **short(), **options)


def test_at_no_distance_there_is_no_slope(mixture):
    table = Tuned.start("ddim", SIGMAS, "none")
    weights = [value.requires_grad_() for value in table.learned.values()]
    x = noise(2, SIGMAS[0])
    end = fewstep.solve(mixture, x, table)
    (loss,) = table.losses(Lesson(mixture, x, Path((x, end.detach()), ()), None))
    loss.value.backward(inputs=weights)
    assert all(torch.isfinite(w.grad).all() for w in weights)  # type: ignore[arg-type]


def test_without_checkpoints_the_same_comes_of_fewer_calls(mixture):
    calls, solvers = [], []
    for checkpointed in (True, False):
        seen = []

        def spy(x, sigma, seen=seen):
            seen.append(len(x))
            return mixture(x, sigma)

        solvers.append(train(spy, SHAPE, **short(checkpointed=checkpointed)))
        calls.append(len(seen))
    batches, nfe = 4, 3
    assert calls[0] - calls[1] == batches * nfe
    assert solvers[0].digest == solvers[1].digest


def test_loss_in_features_keeps_the_best_in_features(mixture):
    def features(x):
        return x[:, :1]  # all that this network sees is the first number

    solver = train(mixture, SHAPE, **short(trajectories=800, loss_features=features))
    assert solver.validation["features"] > 0
    assert solver.training["loss"] == "features"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parts": ("times", "hats")}, "hats"),
        ({"parts": ()}, "parts"),
        ({"base": "churn"}, "deterministic"),
        ({"base": "heun", "nfe": 3, "afs": "none"}, "cannot spend exactly 3"),
        ({"afs": "later"}, "afs must be"),
    ],
)
def test_refusals_name_the_value(changes, message, mixture):
    with pytest.raises(ValueError, match=message):
        train(mixture, SHAPE, **short(**changes))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda s: s["settings"].update(alphas=[1.0]),
        lambda s: s["settings"]["learned"].update(hats=[0.0]),
        lambda s: s["settings"].update(sources=["net", "net", "moon"]),
        lambda s: s["settings"].pop("weights"),
        lambda s: s.update(nfe=7),
    ],
)
def test_a_broken_file_is_one_clear_line(break_it, mixture, tmp_path):
    train(mixture, SHAPE, **short(out=tmp_path, trajectories=16))
    path = tmp_path / "solver.json"
    values = json.loads(path.read_text())
    break_it(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"solver\.json cannot be used"):
        LearnedSolver.load(tmp_path)


def test_kind_reads_back_what_it_wrote():
    tuned = moved(Tuned.start("ipndm-3", SIGMAS, "mean"))
    again = TUNED.read("ipndm-3", SIGMAS, "mean", json.loads(json.dumps(tuned.settings())), {})
    assert again.plan() == tuned.plan()
