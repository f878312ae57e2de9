"""Learned solvers that others published, as ours: read as data, and run by the same loop.

    AMED       a predictor on the network's features; a learned solver of method amed, amed-plugin
    DyWeight   x <- x + (t' - u) sum_j w_j d_j, u <- u + (sum_j w_j)(t' - u), told |s u|
    EPD        K evaluations side by side at u_k = t'^r_k t^(1-r_k), all from the slope at t;
               x <- x + (t' - t) sum_k w_k c_k d_k, told a_k u_k
    AdaSDE     the same from t + gamma t, after fresh noise up to there

with d = (x - D) / u. All but AMED are linear in the state and the D's, the same for every sample,
and so become plans. The side-by-side evaluations of EPD and AdaSDE count as evaluations.

Sources: Zhou et al. 2023 (AMED), arXiv:2312.00094; arXiv:2603.11607 (DyWeight); Zhu et al. 2025
(EPD), arXiv:2507.14797; AdaSDE, arXiv:2510.23285. The transforms of the raw parameters are those of
the published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep import pickles
from fewstep.files import file_hash
from fewstep.grid import check_grid, discrete, karras, log_snr
from fewstep.learned.amed import Amed
from fewstep.learned.fixed import Fixed
from fewstep.learned.method import Method
from fewstep.learned.predictor import CODE, EMBEDDING, Predictor
from fewstep.learned.solver import LearnedSolver
from fewstep.learned.training import known_of
from fewstep.models import Model
from fewstep.plan import Combine, Eval, Op, Plan
from fewstep.records import shown
from fewstep.schedule import EDM, Schedule

__all__ = ["describe", "is_solver", "read", "read_for"]

EDM_DATA = ("cifar10", "ffhq", "afhqv2", "imagenet64", "lsun_bedroom")  # on networks of 0.002 to 80
EDM_RANGE = 0.002, 80.0
TINY = 1e-8  # DyWeight divides by u + TINY
GAMMA_MIN, GAMMA_SHARE = 2e-4, 0.6  # AdaSDE: raw 0 is GAMMA_SHARE of the way to the largest gamma
MOST_POINTS = 200  # of a grid
TEMPERATURE = {"epd": 4.0, "adasde": 2.0}
KEPT = (
    *("dataset_name", "img_resolution", "num_steps", "sampler_stu", "sampler_tea", "M", "afs"),
    *("schedule_type", "schedule_rho", "max_order", "predict_x0", "lower_order_final"),
    *("guidance_type", "guidance_rate", "num_points", "scale_dir", "scale_time", "gamma"),
)


@dataclass(frozen=True)
class Settings:
    """What the file says beside its numbers: the state of its predictor, checked as it is asked.

    values: plain ones by name
    numbers: tensors by name
    """

    values: Mapping[str, Any]
    numbers: Mapping[str, Tensor]

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name} must be an integer from {low} to {high}, got {shown(value)}")
        return value

    def real(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise ValueError(f"{name} must be a number >= 0, got {shown(value)}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {shown(value)}")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.values.get(name, default)
        if not isinstance(value, str) or len(value) > 80:
            raise ValueError(f"{name} must be a name, got {shown(value)}")
        return value

    def table(self, name: str, *shape: int) -> list[list[float]]:
        """Numbers of this shape, as Python's."""
        value = self.numbers.get(name)
        if value is None or tuple(value.shape) != shape or not value.isfinite().all():
            found = None if value is None else tuple(value.shape)
            raise ValueError(f"{name} must be finite numbers of shape {shape}, got {found}")
        return value.double().tolist()


def is_solver(file: pickles.Pickled) -> bool:
    """Whether a file is one of these."""
    return _kind(file) is not None


def read(
    file: pickles.Pickled,
    schedule: Schedule | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> LearnedSolver:
    """The learned solver in a file.

    Args:
        file: as `fewstep.pickles.read` gives it
        schedule: of the network, which grids that are uniform in its own time need
        sigma_min, sigma_max: ends of the grid; what the file says, else those of its data set, else
            the schedule's

    Raises:
        OSError: where the file cannot be read.
        ValueError: that names the file and the setting, where it is no such solver, or one that has
            no counterpart here.
    """
    kind = _kind(file)
    if kind is None:
        raise ValueError(f"{file.path} is no learned solver (AMED, DyWeight, EPD, AdaSDE)")
    predictor = file.root["predictor" if kind == "dyweight" else "model"]
    try:
        chosen = pickles.module_tensors(predictor)
        if sum(tensor.numel for tensor in chosen.values()) > 2**24:
            raise ValueError("it has more numbers than a solver has")
        settings = Settings(_plain(predictor.state), pickles.load(file, chosen))
        rest = _record(file.root.get("loss_fn")) if kind == "dyweight" else {}
        settings = Settings({**_plain(rest), **settings.values}, settings.numbers)
        sigmas = _grid(settings, schedule, sigma_min, sigma_max)
        afs = "zero" if settings.flag("afs") else "none"
        method = READERS[kind](settings, sigmas, afs)
    except ValueError as error:
        raise ValueError(f"{file.path} cannot be used: {error}") from None
    facts = {name: settings.values[name] for name in KEPT if name in settings.values}
    training = {"source": kind, "file_sha256": file_hash(file.path), **facts}
    return LearnedSolver(method, {}, training, {})


def read_for(model: Model, file: pickles.Pickled) -> LearnedSolver:
    """The learned solver in a file, with the schedule or the levels of the network that it was
    learned on, whose weights it then names. Errors: as `read`."""
    card = model.card
    schedule = getattr(model, "schedule", None) or EDM(card.sigma_min, card.sigma_max)
    about = {"name": card.name, "weights": card.weights_sha256, **known_of(model)}
    return replace(read(file, schedule), model=about)


def describe(solver: LearnedSolver) -> str:
    """What such a solver is, in a line."""
    method, count = solver.method, solver.nfe
    grid = f"{count} evaluations on {len(method.sigmas)} levels"
    grid += f" from {method.sigmas[0]:g} to {method.sigmas[-1]:g}"
    first = ", analytic first step" if method.afs != "none" else ""
    if not isinstance(method, Fixed):
        on = f" on {method.base}" if method.base else ""
        held = ", D thresholded" if method.program().quantile else ""
        return f"{method.kind}{on}: {grid}{first}{held}; reads the network's features"
    extra = ""
    if points := method.facts.get("parallel"):
        extra = f", {points} of each step side by side"
    noise = "; draws fresh noise" if method.program().draws else ""
    return f"{method.kind}: {grid}{extra}{first}; a plan{noise}"


def _kind(file: pickles.Pickled) -> str | None:
    root = file.root
    if not isinstance(root, dict):
        return None
    state = _record(root.get("predictor"))
    if "hybrid_weights" in _names(state):
        return "dyweight"
    state = _record(root.get("model"))
    names = _names(state)
    if {"r_params", "weight_s"} <= names:
        return "adasde" if "gamma_params" in names else "epd"
    modules = state.get("_modules")
    return "amed" if isinstance(modules, dict) and {"fc_r", "enc_layer0"} <= set(modules) else None


def _record(value: Any) -> Mapping[str, Any]:
    """The state of an object in a file; empty for anything else."""
    state = value.state if isinstance(value, pickles.Record) else value
    return state if isinstance(state, dict) else {}


def _names(state: Mapping[str, Any]) -> set[Any]:
    values = state.get("_parameters")
    return set(values) if isinstance(values, dict) else set()


def _plain(state: Any) -> dict[str, Any]:
    values = state if isinstance(state, dict) else {}
    kinds = (str, int, float, bool, type(None))
    return {n: v for n, v in values.items() if isinstance(n, str) and isinstance(v, kinds)}


def _grid(
    settings: Settings, schedule: Schedule | None, low: float | None, high: float | None
) -> tuple[float, ...]:
    points = settings.integer("num_steps", 2, MOST_POINTS)
    kind, rho = settings.text("schedule_type", "polynomial"), settings.real("schedule_rho", 7.0)
    data = settings.values.get("dataset_name")
    ends: tuple[float, float] | None = None
    if settings.values.get("sigma_max"):
        ends = settings.real("sigma_min", 0.0), settings.real("sigma_max", 0.0)
    elif data in EDM_DATA:
        ends = EDM_RANGE
    elif schedule is not None:
        ends = schedule.sigma_min, schedule.sigma_max
    if ends is None and (low is None or high is None):
        raise ValueError(
            f"it was learned on {shown(data)}, whose noise levels it does not say: name the "
            "network (--model)"
        )
    low = ends[0] if low is None and ends else low
    high = ends[1] if high is None and ends else high
    assert low is not None
    assert high is not None
    if schedule is not None:
        low, high = _near(low, schedule.sigma_min), _near(high, schedule.sigma_max)
    if not rho > 0:
        raise ValueError(f"schedule_rho must be positive, got {rho}")
    if kind == "polynomial":
        return karras(points, high, low, rho)
    if kind == "logsnr":
        return log_snr(points, high, low)
    if kind == "time_uniform":
        return _time_uniform(points, high, low, rho)
    if kind == "discrete":
        if rho != 1:
            raise ValueError(f"schedule_rho must be 1 for {kind} here, got {rho}")
        return discrete(points, schedule, high, low)
    raise ValueError(f"schedule_type {shown(kind)} is none that fewstep knows")


def _near(level: float, own: float) -> float:
    """A level of a file, or the network's own end where it is that in the float32 of a table."""
    return own if math.isclose(level, own, rel_tol=1e-3) else level


def _time_uniform(points: int, high: float, low: float, rho: float) -> tuple[float, ...]:
    """The published grid, in the float32 that it was learned in: its last level is 0.7 % above
    0.002, which `fewstep.grid.time_uniform` meets. Time goes as (1 + u (e^(1/rho) - 1))^rho."""
    end = 1e-3
    at_end, at_start = (torch.log(torch.tensor(sigma) ** 2 + 1) for sigma in (low, high))
    beta_d = 2 * (at_end / end - at_start) / (end - 1)
    beta_min = at_start - 0.5 * beta_d
    u = torch.arange(points) / (points - 1)
    t = (1 + u * (end ** (1 / rho) - 1)) ** rho
    return check_grid((torch.exp(0.5 * beta_d * t**2 + beta_min * t) - 1).sqrt().tolist())


# -- AMED ----------------------------------------------------------------------------------------


def _amed(settings: Settings, sigmas: tuple[float, ...], afs: str) -> Method:
    student, order = settings.text("sampler_stu", ""), settings.values.get("max_order")
    data_form = settings.values.get("predict_x0", True) is not False
    widths = settings.numbers.get("enc_layer0.weight")
    if widths is None or widths.ndim != 2:
        raise ValueError("it lacks enc_layer0.weight")
    scale_dir, scale_time = _amed_scales(settings, student == "dpmpp" and data_form)
    weights = {
        "hidden.weight": settings.numbers["enc_layer0.weight"],
        "hidden.bias": settings.numbers.get("enc_layer0.bias"),
        "code.weight": settings.numbers.get("enc_layer1.weight"),
        "code.bias": settings.numbers.get("enc_layer1.bias"),
        "level.weight": settings.numbers.get("map_layer0.weight"),
        "level.bias": settings.numbers.get("map_layer0.bias"),
        **_heads(settings),
    }
    if missing := [name for name, value in weights.items() if value is None]:
        raise ValueError(f"it lacks the weights of {missing[0]}")
    found = {name: value.float() for name, value in weights.items() if value is not None}
    if not all(value.isfinite().all() for value in found.values()):
        raise ValueError("its weights must be finite")
    features = widths.shape[1]
    predictor = Predictor(features, scale_dir, scale_time, found, "sigma")
    if student == "amed":
        return Amed("amed", None, sigmas, afs, predictor)
    return Amed("amed-plugin", _base(settings, student, order, data_form), sigmas, afs, predictor)


def _base(settings: Settings, student: str, order: Any, data_form: bool) -> str:
    """Our name of the solver that the plugin stands in."""
    if student == "dpm":
        return "dpm-solver-2"
    if student == "euler":
        return "ipndm-1"
    if student not in ("ipndm", "dpmpp") or type(order) is not int:
        raise ValueError(f"sampler_stu {shown(student)} of max_order {shown(order)} is not known")
    if student == "ipndm":
        return f"ipndm-{settings.integer('max_order', 1, 4)}"
    falls = settings.flag("lower_order_final", True)
    kind = "dpmpp" if data_form else "dpm"
    return f"{kind}-{settings.integer('max_order', 1, 3)}-multistep{'-final' if falls else ''}"


def _amed_scales(settings: Settings, wide: bool) -> tuple[float, float]:
    """Ranges of c and a. Older files have them fixed: c within 0.01, or 0.05 of DPM-Solver++ on D,
    and a within 0.2 where it has one."""
    if "scale_dir" not in settings.values:
        told = settings.flag("scale_time", True)
        return (0.05 if wide else 0.01), (0.2 if told else 0.0)
    return settings.real("scale_dir", 0.0), settings.real("scale_time", 0.0)


def _heads(settings: Settings) -> dict[str, Tensor]:
    """The three heads as rows of one; a missing one has a scale of 0, and any weights."""
    rows, biases = [], []
    for name in ("fc_r", "fc_scale_dir", "fc_scale_time"):
        weight, bias = (settings.numbers.get(f"{name}.{part}") for part in ("weight", "bias"))
        if weight is None or bias is None:
            if name == "fc_r":
                raise ValueError("it lacks the weights of fc_r")
            weight, bias = torch.zeros(1, CODE + 2 * EMBEDDING), torch.zeros(1)
        if tuple(weight.shape) != (1, CODE + 2 * EMBEDDING) or tuple(bias.shape) != (1,):
            raise ValueError(f"{name} must read {CODE + 2 * EMBEDDING} numbers")
        rows.append(weight)
        biases.append(bias)
    return {"head.weight": torch.cat(rows), "head.bias": torch.cat(biases)}


# -- plans ---------------------------------------------------------------------------------------


def _plan(kind: str, sigmas: tuple[float, ...], ops: Iterable[Op], depth: int, facts: Any) -> Fixed:
    listed = tuple(ops)
    afs = next((op.source for op in listed if isinstance(op, Eval)), "net")
    plan = Plan("eps", depth, kind, "learned", sigmas, listed)
    return Fixed(kind, check_grid(sigmas), "none" if afs == "net" else afs, plan, facts)


def _dyweight(settings: Settings, sigmas: tuple[float, ...], afs: str) -> Method:
    count = len(sigmas) - 1
    weights = settings.table("hybrid_weights", count, count)
    mask = settings.table("mask", count, count)
    skipped = int(afs != "none")
    scales = [1.0] * count
    if "t_scale" in settings.numbers:
        have = len(settings.numbers["t_scale"].flatten())
        if have not in (count, count - skipped):
            raise ValueError(f"t_scale must have {count - skipped} numbers, got {have}")
        row: Any = settings.table("t_scale", have)
        scales = [1.0] * skipped + row[: count - skipped]

    def ops() -> Iterable[Op]:
        level, past = sigmas[0], []
        for i, nxt in enumerate(sigmas[1:]):
            if level == 0 or not math.isfinite(level):
                raise ValueError(f"its step {i} stands at level {level}, where no slope is")
            analytic = i == 0 and skipped
            yield Eval(level, source="zero") if analytic else Eval(level, abs(scales[i] * level))
            past.append(1.0 if analytic else level / (level + TINY))
            row = [w * m for w, m in zip(weights[i][: i + 1], mask[i], strict=False)]
            step = nxt - level
            b = [step * w * factor for w, factor in zip(row, past, strict=True)][::-1]
            while len(b) > 1 and b[-1] == 0:
                b.pop()
            level = level + sum(row) * step
            yield Combine(tuple(b), level)

    return _plan("dyweight", sigmas, ops(), count, {})


def _sigmoid(raw: float) -> float:
    return 1 / (1 + math.exp(-raw)) if raw > -700 else 0.0


def _softmax(row: Sequence[float]) -> list[float]:
    shifted = [math.exp(value - max(row)) for value in row]
    return [value / sum(shifted) for value in shifted]


def _parallel(kind: str) -> Callable[[Settings, tuple[float, ...], str], Method]:
    """The reader of EPD or of AdaSDE."""

    def read_one(settings: Settings, sigmas: tuple[float, ...], afs: str) -> Method:
        count, points = len(sigmas) - 1, settings.integer("num_points", 1, 64)
        if (student := settings.text("sampler_stu", kind)) != kind:
            raise ValueError(f"sampler_stu must be {kind}, got {shown(student)}")
        shape = count, points

        def around_one(name: str, scale: str) -> list[list[float]]:
            reach = settings.real(scale, 0.0)
            if not reach:
                return [[1.0] * points] * count
            reach = min(reach, 0.99)
            rows = settings.table(name, *shape)
            return [[1 + reach * math.tanh(v / TEMPERATURE[kind]) for v in row] for row in rows]

        places = [[_sigmoid(v) for v in row] for row in settings.table("r_params", *shape)]
        shares = [_softmax(row) for row in settings.table("weight_s", *shape)]
        factors = around_one("scale_dir_params", "scale_dir")
        told = around_one("scale_time_params", "scale_time")
        if settings.flag("fcn"):
            factors = [*factors[:-1], [1.0] * points]
        rises = _gammas(settings, shares) if kind == "adasde" else [0.0] * count

        def ops() -> Iterable[Op]:
            for i, (start, nxt) in enumerate(pairwise(sigmas)):
                cur = (1 + rises[i]) * start
                if cur > start:
                    yield Combine((), cur, noise=math.sqrt(cur**2 - start**2))
                analytic = i == 0 and afs != "none"
                yield Eval(cur, source="zero") if analytic else Eval(cur)
                for k in range(points):
                    mid = nxt ** places[i][k] * cur ** (1 - places[i][k])
                    yield Combine((*[0.0] * k, mid - cur), mid, accept=False)
                    yield Eval(mid, told[i][k] * mid)
                b = [(nxt - cur) * shares[i][k] * factors[i][k] for k in range(points)]
                yield Combine(tuple(reversed(b)), nxt)

        return _plan(kind, sigmas, ops(), points + 1, {"parallel": points})

    return read_one


def _gammas(settings: Settings, shares: list[list[float]]) -> list[float]:
    """By how much the level of each step is raised before it: nothing at the first."""
    most = settings.real("gamma", 0.0)
    if not most:
        return [0.0] * len(shares)
    rows = settings.table("gamma_params", len(shares), len(shares[0]))
    offset = 2 * math.log(GAMMA_SHARE / (1 - GAMMA_SHARE))
    found = [
        sum(
            w * (GAMMA_MIN + (most - GAMMA_MIN) * _sigmoid((raw + offset) / 2))
            for w, raw in zip(share, row, strict=True)
        )
        for share, row in zip(shares, rows, strict=True)
    ]
    return [0.0, *found[1:]]


READERS: dict[str, Callable[[Settings, tuple[float, ...], str], Method]] = {
    "amed": _amed,
    "dyweight": _dyweight,
    "epd": _parallel("epd"),
    "adasde": _parallel("adasde"),
}
