"""Solvers that others published: read without running them, and equal to their loops."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep import pickles
from fewstep.cli.run import run
from fewstep.learned import LearnedSolver, published
from fewstep.learned.ops import PUBLISHED, dpm_multistep
from fewstep.models.convert import convert
from fewstep.noise import normal
from fewstep.plan import Combine, Eval
from fewstep.solver.rules import dpmpp_2m, dpmpp_3m
from tests.models.test_adm import GUIDED, SAID
from tests.support.adm_files import tensors
from tests.support.edm_files import write_edm
from tests.support.nvlabs import Persistent, write
from tests.support.testbed import Mixture

POINTS = 4


class Bed:
    """The exact D of a mixture times a gain, with a map of features that depends on x."""

    def __init__(self, gain: float = 1.0) -> None:
        self.mixture, self.gain = Mixture(), gain

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.gain * self.mixture(x, sigma)

    def with_features(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.flatten(1)
        rows = flat.repeat(1, 64 // flat.shape[1] + 1)[:, :64].reshape(-1, 1, 8, 8)
        return self(x, sigma), torch.tanh(rows)


def module(name: str, numbers: dict[str, Tensor], **state: Any) -> Persistent:
    parts: dict[str, Any] = {"_parameters": OrderedDict(numbers), "_buffers": OrderedDict()}
    return Persistent(name, {**parts, "_modules": OrderedDict(), **state})


def table(gen: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=gen)


def dyweight(
    path: Path, afs: bool, window: int = 3, gain: float = 1.0, **change: Any
) -> tuple[Path, dict[str, Any]]:
    gen = torch.Generator().manual_seed(3)
    n = POINTS - 1
    weights = gain * (torch.eye(n) + 0.1 * table(gen, n, n))
    mask = torch.tensor([[float(0 <= i - j < window) for j in range(n)] for i in range(n)])
    scale = 1 + 0.1 * table(gen, n - afs)
    state = {"num_steps": POINTS, "max_history_steps": window, "afs": afs}
    predictor = module("DyWeight_predictor", {"hybrid_weights": weights, "t_scale": scale}, **state)
    predictor.state["_buffers"] = OrderedDict(mask=mask)
    loss = {"num_steps": POINTS, "teacher_steps": 35, "schedule_type": "polynomial"}
    loss |= {"schedule_rho": 7.0, "afs": afs, "sigma_min": 0.002, "sigma_max": 80.0, **change}
    write(path, {"predictor": predictor, "loss_fn": Persistent("DyWeight_loss", loss)})
    return path, {"w": (weights * mask).double(), "s": scale.double()}


def parallel(path: Path, kind: str, **change: Any) -> tuple[Path, dict[str, Tensor]]:
    gen = torch.Generator().manual_seed(4)
    names = ["r_params", "scale_dir_params", "scale_time_params", "weight_s"]
    names += ["gamma_params"] if kind == "adasde" else []
    numbers = {name: table(gen, POINTS - 1, 2) for name in names}
    state: dict[str, Any] = {"num_steps": POINTS, "num_points": 2, "afs": True, "M": 3}
    state |= {"dataset_name": "cifar10", "sampler_stu": kind, "schedule_type": "time_uniform"}
    state |= {"schedule_rho": 1.0, "scale_dir": 0.05, "scale_time": 0.2, "max_order": None}
    state |= {"gamma": 0.02} if kind == "adasde" else {}
    write(path, {"model": module(f"{kind}_predictor", numbers, **{**state, **change})})
    return path, {name: value.double() for name, value in numbers.items()}


def amed(path: Path, **change: Any) -> tuple[Path, dict[str, Tensor]]:
    gen = torch.Generator().manual_seed(5)
    layers = {"map_layer0": (8, 8), "enc_layer0": (128, 64), "enc_layer1": (4, 128)}
    layers |= {"fc_r": (1, 20), "fc_scale_dir": (1, 20), "fc_scale_time": (1, 20)}
    state: dict[str, Any] = {"num_steps": POINTS, "dataset_name": "cifar10", "afs": True, "M": 1}
    state |= {"sampler_stu": "amed", "schedule_type": "polynomial", "schedule_rho": 7.0}
    state |= {"scale_dir": 0.01, "scale_time": 0.2, "max_order": 3, "predict_x0": True}
    state |= {"lower_order_final": True, **change}
    if not state.get("scale_time", True):
        del layers["fc_scale_time"]
    found, inside = {}, OrderedDict()
    for name, shape in layers.items():
        weight, bias = table(gen, *shape) / shape[1] ** 0.5, 0.1 * table(gen, shape[0])
        found |= {f"{name}.weight": weight, f"{name}.bias": bias}
        inside[name] = module("Linear", {"weight": weight, "bias": bias})
    predictor = module("AMED_predictor", {}, **state)
    predictor.state["_modules"] = inside
    write(path, {"model": predictor, "loss_fn": Persistent("AMED_loss", {"num_steps": 4})})
    return path, found


def read(path: Path) -> LearnedSolver:
    file = pickles.read(path)
    assert published.is_solver(file)
    return published.read(file)


def start(count: int = 3) -> Tensor:
    return 80.0 * torch.randn(count, 3, generator=torch.Generator().manual_seed(1)).double()


def slope(bed: Bed, x: Tensor, told: float, level: float) -> Tensor:
    return (x - bed(x, torch.full((len(x),), told, dtype=x.dtype))) / level


@pytest.mark.parametrize(("afs", "gain"), [(False, 1.0), (True, 1.0), (False, 1.5)])
def test_dyweight_is_a_plan_equal_to_its_loop(tmp_path, afs, gain):
    """Weights that add up to more than 1 may carry the level below 0; its size is told."""
    path, numbers = dyweight(tmp_path / "d.pkl", afs, gain=gain)
    solver, bed, x = read(path), Bed(), start()
    sigmas, past, level = fewstep.grid.karras(POINTS, 80.0, 0.002), [], 80.0
    ours = fewstep.solve(bed, x, solver)
    for i, nxt in enumerate(sigmas[1:]):
        if afs and i == 0:
            past.append(x / math.sqrt(1 + level**2))
        else:
            told = abs(float(numbers["s"][i - afs]) * level)
            past.append(slope(bed, x, told, level + 1e-8))
        row = numbers["w"][i, : i + 1]
        x = x + (nxt - level) * sum(w * d for w, d in zip(row, past, strict=True))
        level = level + float(row.sum()) * (nxt - level)
    assert solver.nfe == POINTS - 1 - afs
    below = [op for op in solver.plan().ops if isinstance(op, Eval) and float(op.sigma) < 0]
    assert bool(below) == (gain > 1)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-9)


def shares(numbers: dict[str, Tensor], temperature: float) -> dict[str, Any]:
    return {
        "r": torch.sigmoid(numbers["r_params"]),
        "w": torch.softmax(numbers["weight_s"], -1),
        "c": 1 + 0.05 * torch.tanh(numbers["scale_dir_params"] / temperature),
        "a": 1 + 0.2 * torch.tanh(numbers["scale_time_params"] / temperature),
    }


@pytest.mark.parametrize("kind", ["epd", "adasde"])
def test_side_by_side_evaluations_are_a_plan_equal_to_their_loop(tmp_path, kind):
    path, numbers = parallel(tmp_path / "e.pkl", kind)
    solver, bed, x, seeds = read(path), Bed(), start(), [7, 8, 9]
    assert solver.nfe == (POINTS - 1) * 3 - 1
    assert "2 of each step side by side" in published.describe(solver)
    part = shares(numbers, 4.0 if kind == "epd" else 2.0)
    sigmas, draws = solver.sigmas, 0
    ideal = fewstep.grid.time_uniform(POINTS, 80.0, 0.002)
    assert sigmas == pytest.approx(ideal, rel=0.01)  # theirs is computed in float32
    assert sigmas[-1] == pytest.approx(0.00201324, rel=1e-5)
    ours = fewstep.solve(bed, x, solver, seeds=seeds)
    for i, (level, nxt) in enumerate(pairwise(sigmas)):
        if kind == "adasde" and i:
            b = 2 * math.log(0.6 / 0.4)
            rise = 2e-4 + (0.02 - 2e-4) * torch.sigmoid((numbers["gamma_params"][i] + b) / 2)
            raised = level * (1 + float((rise * part["w"][i]).sum()))
            fresh = normal(seeds, (3,), "step", draws, x.dtype)
            x, level, draws = x + math.sqrt(raised**2 - level**2) * fresh, raised, draws + 1
        d = x / math.sqrt(1 + level**2) if i == 0 else slope(bed, x, level, level)
        total = x
        for k in range(2):
            mid = nxt ** float(part["r"][i, k]) * level ** (1 - float(part["r"][i, k]))
            inner = slope(bed, x + (mid - level) * d, float(part["a"][i, k]) * mid, mid)
            total = total + (nxt - level) * part["w"][i, k] * part["c"][i, k] * inner
        x = total
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-8)


def predicted(w: dict[str, Tensor], features: Tensor, cur: float, nxt: float) -> dict[str, Any]:
    def linear(name: str, y: Tensor) -> Tensor:
        return y @ w[f"{name}.weight"].T.double() + w[f"{name}.bias"].double()

    def embed(t: float) -> Tensor:
        freqs = (1 / 10_000) ** (torch.arange(4, dtype=torch.float64) / 3)
        waves = torch.cat([(t * freqs).sin(), (t * freqs).cos()])
        return torch.nn.functional.silu(linear("map_layer0", waves)).expand(len(features), 8)

    code = linear("enc_layer1", torch.nn.functional.silu(linear("enc_layer0", features.double())))
    out = torch.cat([code, embed(cur), embed(nxt)], 1)
    heads = ("fc_r", "fc_scale_dir", "fc_scale_time")
    rows = {n: torch.sigmoid(linear(n, out))[:, 0] for n in heads if f"{n}.weight" in w}
    return {
        "r": rows["fc_r"],
        "c": 1 + 0.01 * (2 * rows["fc_scale_dir"] - 1),
        "a": 1 + 0.2 * (2 * rows["fc_scale_time"] - 1) if "fc_scale_time" in rows else 1.0,
    }


def published_loop(bed: Bed, x: Tensor, w: Any, student: str, order: int) -> Tensor:
    """The published AMED loop: two evaluations a step, the first one analytic."""
    sigmas = fewstep.grid.karras(POINTS, 80.0, 0.002)
    past: list[tuple[Tensor, Tensor]] = []  # slopes with their levels
    uniform = {1: (1.0,), 2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12)}
    uniform[4] = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
    for i, (cur, nxt) in enumerate(pairwise(sigmas)):
        if i == 0:
            d, features = x / math.sqrt(1 + cur**2), torch.zeros(len(x), 64)
        else:
            denoised, maps = bed.with_features(x, torch.full((len(x),), cur, dtype=x.dtype))
            d, features = (x - denoised) / cur, maps.mean(1).flatten(1)
        value = predicted(w, features, cur, nxt)
        r, c, a = (torch.as_tensor(value[n]).reshape(-1, 1) for n in ("r", "c", "a"))
        mid = nxt**r * cur ** (1 - r)

        def evaluate(y: Tensor, mid: Tensor = mid, a: Tensor = a) -> Tensor:
            return (y - bed(y, (a * mid).expand(len(y), 1)[:, 0])) / mid

        if student == "amed":
            x = x + c * (nxt - cur) * evaluate(x + (mid - cur) * d)
        elif student == "dpm":
            inner = evaluate(x + (mid - cur) * d)
            x = x + c * (nxt - cur) * (inner / (2 * r) + (1 - 1 / (2 * r)) * d)
        elif student == "euler":
            y = x + (mid - cur) * d
            x = y + c * (nxt - mid) * evaluate(y)
        else:  # ipndm
            past = [(d, d), *past]
            b = uniform[min(order, len(past))]
            y = x + (mid - cur) * sum(v * p[0] for v, p in zip(b, past, strict=False))
            inner = evaluate(y)
            past = [(inner, inner), *past]
            b = uniform[min(order, len(past))]
            x = y + c * (nxt - mid) * sum(v * p[0] for v, p in zip(b, past, strict=False))
    return x


@pytest.mark.parametrize(
    ("student", "order", "scale_time"),
    [("amed", 3, 0.0), ("amed", 3, 0.2), ("dpm", 2, 0.2), ("euler", 1, 0.2)]
    + [("ipndm", order, 0.2) for order in (2, 3, 4)],
)
def test_amed_is_a_learned_solver_equal_to_its_loop(tmp_path, student, order, scale_time):
    change = {"sampler_stu": student, "max_order": order, "scale_time": scale_time}
    path, weights = amed(tmp_path / "a.pkl", **change)
    solver, bed, x = read(path), Bed(), start()
    assert solver.nfe == 2 * (POINTS - 1) - 1
    ours = fewstep.solve(bed, x, solver)
    theirs = published_loop(bed, x, weights, student, order)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)  # its weights are float32


def published_dpm(past: Any, levels: Any, x: Tensor, t: Any, order: int, eps: bool) -> Tensor:
    """One step of multistep DPM-Solver, outputs and levels oldest first."""
    t, levels = torch.as_tensor(t).double(), [torch.as_tensor(one).double() for one in levels]
    lam = [-level.log() for level in levels]
    h = -t.log() - lam[-1]
    phi_1 = h.expm1() if eps else (-h).expm1()
    phi_2 = phi_1 / h - 1 if eps else phi_1 / h + 1
    phi_3 = phi_2 / h - 0.5
    scale, keep = (t, 1.0) if eps else (1.0, t / levels[-1])
    if order == 1:
        return keep * x - scale * phi_1 * past[-1]
    r0 = (lam[-1] - lam[-2]) / h
    d10 = (past[-1] - past[-2]) / r0
    if order == 2:
        return keep * x - scale * (phi_1 * past[-1] + 0.5 * phi_1 * d10)
    r1 = (lam[-2] - lam[-3]) / h
    d11 = (past[-2] - past[-3]) / r1
    d1 = d10 + r0 / (r0 + r1) * (d10 - d11)
    d2 = (d10 - d11) / (r0 + r1)
    sign = 1 if eps else -1
    return keep * x - scale * (phi_1 * past[-1] + sign * phi_2 * d1 + phi_3 * d2)


@pytest.mark.parametrize("eps", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_published_multistep_rule_is_dpm_solver(order, eps):
    levels, t = [9.0, 4.0, 1.5], 0.4
    past = [torch.tensor([value], dtype=torch.float64) for value in (1.0, -2.0, 0.7)]
    x = torch.tensor([3.0], dtype=torch.float64)
    a, b = dpm_multistep(levels[::-1], t, order, eps)
    ours = a * x + sum(weight * y for weight, y in zip(b, past[::-1], strict=False))
    torch.testing.assert_close(ours, published_dpm(past, levels, x, t, order, eps))


@pytest.mark.parametrize(("order", "rule"), [(2, dpmpp_2m), (3, dpmpp_3m)])
def test_on_d_it_is_dpmpp(order, rule):
    theirs = rule([1.5, 4.0, 9.0][:order], 0.4)
    ours = dpm_multistep([1.5, 4.0, 9.0], 0.4, order, eps=False)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-12)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("final", [True, False])
def test_the_plugin_on_dpm_solver_lowers_its_order_where_told(tmp_path, data, final):
    change = {"sampler_stu": "dpmpp", "predict_x0": data, "lower_order_final": final}
    solver = read(amed(tmp_path / "a.pkl", **change)[0])
    assert solver.method.base in PUBLISHED
    seen = []
    x = start()
    for state in fewstep.iterate(Bed(), x, solver):
        seen.append(state.x)
    assert len(seen) == 2 * (POINTS - 1)
    assert all(y.isfinite().all() for y in seen)
    base = PUBLISHED[str(solver.method.base)]
    row = solver.method.rows()  # type: ignore[attr-defined]
    ops = list(base.ops(solver.sigmas, lambda i, _: row[i], "none", False))
    orders = [len(op.b) for op in ops if isinstance(op, Combine)]
    assert orders == ([1, 2, 3, 3, 2, 1] if final else [1, 2, 3, 3, 3, 3])


def test_the_plugin_on_d_thresholds_each_d(tmp_path):
    path, w = amed(tmp_path / "a.pkl", sampler_stu="dpmpp", predict_x0=True, scale_time=0.2)
    solver, bed = read(path), Bed(gain=20.0)
    x = begun = start()

    def held(denoised: Tensor) -> Tensor:
        s = denoised.abs().quantile(0.995, dim=1, keepdim=True).clamp(min=1)
        return denoised.clamp(-s, s) / s

    sigmas, orders, past, levels = solver.sigmas, [1, 2, 3, 3, 2, 1], [], []
    for i, (cur, nxt) in enumerate(pairwise(sigmas)):
        features = torch.zeros(len(x), 64)
        denoised = x - cur * x / math.sqrt(1 + cur**2)
        if i:
            denoised, maps = bed.with_features(x, torch.full((len(x),), cur, dtype=x.dtype))
            features = maps.mean(1).flatten(1)
        value = predicted(w, features, cur, nxt)
        r, a, c = (value[name].reshape(-1, 1) for name in "rac")
        mid = nxt**r * cur ** (1 - r)
        past, levels = [*past, held(denoised)], [*levels, torch.full_like(r, cur)]
        x = published_dpm(past, levels, x, mid, orders[2 * i], False)
        inner = bed(x, (a * mid).expand(len(x), 1)[:, 0])
        assert (inner.abs() > 1).any()  # or nothing is thresholded
        past, levels = [*past, held(inner)], [*levels, mid]
        keep = nxt / mid * x
        x = keep + c * (published_dpm(past, levels, x, nxt, orders[2 * i + 1], False) - keep)
    torch.testing.assert_close(fewstep.solve(bed, begun, solver), x, rtol=0, atol=2e-5)
    assert "D thresholded" in published.describe(solver)
    with pytest.raises(ValueError, match="thresholds D, which no plan says"):
        solver.plan(bed, begun)


@pytest.mark.parametrize("kind", ["dyweight", "epd", "adasde", "amed"])
def test_a_folder_of_it_runs_as_the_solver_does(tmp_path, kind):
    make = {
        "dyweight": lambda: dyweight(tmp_path / "x.pkl", True)[0],
        "epd": lambda: parallel(tmp_path / "x.pkl", "epd")[0],
        "adasde": lambda: parallel(tmp_path / "x.pkl", "adasde")[0],
        "amed": lambda: amed(tmp_path / "x.pkl")[0],
    }
    solver = read(make[kind]())
    solver.save(tmp_path / "out")
    again = LearnedSolver.load(tmp_path / "out")
    assert again.digest == solver.digest
    assert again.training["source"] == kind
    assert published.describe(again) == published.describe(solver)
    bed, x, seeds = Bed(), start(), [1, 2, 3]
    one = fewstep.solve(bed, x, str(tmp_path / "out"), seeds=seeds)
    assert torch.equal(one, fewstep.solve(bed, x, solver, seeds=seeds))
    if kind != "amed":
        assert again.plan() == solver.plan()
        with pytest.raises(ValueError, match="not trained here"):
            next(again.method.losses(None))  # type: ignore[arg-type]


def test_without_scales_in_the_file_those_of_older_files_hold(tmp_path):
    path, _ = amed(tmp_path / "a.pkl")
    file = pickles.read(path)
    del file.root["model"].state["scale_dir"]
    file.root["model"].state["scale_time"] = True
    predictor = published.read(file).method.predictor  # type: ignore[attr-defined]
    assert (predictor.scale_dir, predictor.scale_time) == (0.01, 0.2)


REFUSED = {
    "num_steps": (10**9, "num_steps must be an integer from 2"),
    "schedule_type": ("polynomial2", "none that fewstep knows"),
    "schedule_rho": (0.0, "schedule_rho must be positive"),
    "dataset_name": ("lsun_bedroom_ldm", "name the network"),
    "sampler_stu": ("ipndm", "sampler_stu must be epd"),
    "num_points": (3, "must be finite numbers of shape"),
    "afs": ("yes", "afs must be true or false"),
    "scale_dir": ("much", "scale_dir must be a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_has_no_counterpart_is_refused_in_one_line(tmp_path, name):
    value, message = REFUSED[name]
    path, _ = parallel(tmp_path / "e.pkl", "epd", **{name: value})
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_discrete_grid_goes_by_the_networks_time(tmp_path):
    change = {"dataset_name": "lsun_bedroom_ldm", "schedule_type": "discrete"}
    path, _ = parallel(tmp_path / "e.pkl", "epd", **change)
    schedule = fewstep.schedule.VP.scaled_linear(1000, 0.0015, 0.0195)
    solver = published.read(pickles.read(path), schedule)
    assert solver.sigmas == fewstep.grid.discrete(POINTS, schedule)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path, numbers = parallel(tmp_path / "e.pkl", "epd")
    broken = {name: value.float() for name, value in numbers.items()}
    broken["r_params"][0, 0] = math.nan
    state = {k: v for k, v in pickles.read(path).root["model"].state.items() if k[:1] != "_"}
    write(path, {"model": module("epd_predictor", broken, **state)})
    with pytest.raises(ValueError, match="r_params must be finite"):
        read(path)


def test_other_pickles_are_no_solvers(tmp_path):
    for value in ({"ema": Persistent("EDMPrecond", {})}, [1, 2], {"model": 3}, {"model": {}}):
        path = write(tmp_path / "x.pkl", value)
        assert not published.is_solver(pickles.read(path))
        with pytest.raises(ValueError, match="no learned solver"):
            published.read(pickles.read(path))


def test_a_damaged_folder_is_refused(tmp_path):
    solver = read(dyweight(tmp_path / "x.pkl", False)[0])
    solver.save(tmp_path / "out")
    path = tmp_path / "out" / "solver.json"
    values = json.loads(path.read_text())
    values["settings"]["plan"]["ops"][0]["op"] = "run"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="cannot be used"):
        LearnedSolver.load(tmp_path / "out")


@pytest.mark.parametrize("kind", ["dyweight", "epd", "adasde", "amed"])
def test_convert_makes_a_folder_of_it_and_says_what_it_is(tmp_path, capsys, kind):
    path = tmp_path / "x.pkl"
    made = {"dyweight": lambda: dyweight(path, True), "amed": lambda: amed(path)}
    made.get(kind, lambda: parallel(path, kind))()
    out = tmp_path / "out"
    assert run(["models", str(path)]) == 2
    assert "a published solver, fewstep convert makes a folder of it" in capsys.readouterr().err
    assert run(["convert", str(path), "--out", str(out)]) == 0
    assert published.describe(read(path)) in " ".join(capsys.readouterr().out.split())
    assert LearnedSolver.load(out).digest == read(path).digest
    assert run(["convert", str(path), "--out", str(out)]) == 2
    assert "is not empty; name another folder" in capsys.readouterr().err
    options = ["--out", str(tmp_path / "other"), "--preset", "imagenet64-adm"]
    assert run(["convert", str(path), *options]) == 2
    assert "leave out --preset" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_convert_takes_the_levels_of_the_network_that_is_named(tmp_path, capsys):
    change = {"dataset_name": "lsun_bedroom_ldm", "schedule_type": "discrete"}
    path, _ = parallel(tmp_path / "e.pkl", "epd", **change)
    torch.save(tensors(GUIDED), tmp_path / "net.pt")
    convert(tmp_path / "net.pt", tmp_path / "net", config=SAID, draws=0)
    words = ["convert", str(path), "--out", str(tmp_path / "out")]
    assert run(words) == 2
    assert "name the network (--model)" in capsys.readouterr().err
    assert run([*words, "--model", str(tmp_path / "net")]) == 0
    model: Any = fewstep.load(tmp_path / "net")
    solver = LearnedSolver.load(tmp_path / "out")
    assert solver.sigmas == fewstep.grid.discrete(POINTS, model.schedule)
    assert solver.model["weights"] == model.card.weights_sha256
    edm = str(write_edm(tmp_path / "edm.pkl")[0])
    assert run([*words[:2], "--out", str(tmp_path / "no"), "--model", edm]) == 2
    assert "the discrete grid is uniform in a network's own time" in capsys.readouterr().err
    assert run(["convert", edm, "--out", str(tmp_path / "no"), "--model", edm]) == 2
    assert "holds a network, and --model goes with a solver" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
