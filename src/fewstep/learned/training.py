"""Training a solver: noise in, a teacher's path, and Adam on a method's losses.

No data are needed. Trajectory i of a run starts from the noise of a seed of its own, 2,000,000 and
up; every few batches the solver is measured on seeds from 1,000,000 on, against fine solves, and
the best so far is what comes out. All draws are functions of a seed, so a run that was killed and
resumes from its checkpoint takes the path of one that was not, to the bit.
"""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.files import write_whole
from fewstep.grid import GRIDS, check_grid, make_grid
from fewstep.learned.grid_search import FINE, SEARCH, SEARCHED, search_grid
from fewstep.learned.kinds import kind_of
from fewstep.learned.method import Kind, Lesson, Method, Setup
from fewstep.learned.predictor import feature_count
from fewstep.learned.record import CHECKPOINT, check_folder, check_same, facts_in, plain
from fewstep.learned.solver import LearnedSolver
from fewstep.learned.teacher import (
    Frozen,
    Kept,
    Teacher,
    check_teacher,
    fine_grid,
    whole_grid,
)
from fewstep.loop import DEFAULT_RANGE, solve
from fewstep.noise import normal
from fewstep.provenance import VERSION
from fewstep.schedule import Schedule
from fewstep.solver import end_at
from fewstep.train.interrupts import between_steps

__all__ = ["Progress", "train"]

TRAINING, VALIDATION = 2_000_000, 1_000_000  # first seeds; those below are for final tests
# within 4e-4 of the exact solution on the built-in network
REFERENCE, REFERENCE_INTERVALS = "deis-4", 40
WARM_UP = 20  # updates of a rate that decays
LOOKED_AT, SAME = 4, 0.02  # samples by whose D a denoiser is known again, and how nearly
LOG = "log.jsonl"

Conditions = Callable[[Sequence[int]], Denoiser]
Prior = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Progress:
    """One batch, as `train` reports it.

    loss: mean over the batch's losses, per number of a sample; of tuned the mean distance, and what
        `shift` adds to it
    learned: what the method has to show of its numbers
    seconds_left: an estimate
    validation: after a batch that was followed by one, "error" and what else was measured
    """

    step: int
    total_steps: int
    trajectories: int
    loss: float
    learned: dict[str, float]
    seconds_left: float
    validation: dict[str, float] | None = None


def train(
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    method: str = "tuned",
    base: str | None = None,
    nfe: int = 5,
    trajectories: int = 10_000,
    batch: int = 128,
    grid: str | Sequence[float] | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    seed: int = 0,
    loss_features: Callable[[Tensor], Tensor] | None = None,
    conditions: Conditions | None = None,
    out: Path | str | None = None,
    afs: str | None = None,
    end: str | None = None,
    teacher: str | None = None,
    inner: int | None = None,
    lr: float | None = None,
    prior: Prior | None = None,
    device: str | torch.device = "cpu",
    model: dict[str, Any] | None = None,
    cache: Path | str | None = None,
    validation: int = 64,
    validate_every: int = 10,
    checkpoint_every: int = 5,
    checkpointed: bool = True,
    report: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> LearnedSolver:
    """Train a solver for one denoiser and one budget.

    denoiser: any callable D(x [b, ...], sigma [b]) -> [b, ...]; its parameters do not change
    shape: of one sample
    method: "tuned", "amed" or "amed-plugin"; or "grid", which trains nothing and puts the base on
        a grid that is searched for it
    base: the solver that is improved on, the method's own unless given
    nfe: the budget
    trajectories, batch: how many starts the run sees, and how many at a time
    grid: a name, or sigmas; "search" has it found, see `grid_search`; the method's own unless
        given, which depends on whether the network has a time of its own (VP, flow)
    sigma_min, sigma_max: the denoiser's own where left out, else 0.002 and 80
    seed: decides the first weights and the noise
    loss_features: a network for methods with a loss at the end of the path; None is pixels. One
        that is to see pictures needs `fewstep.networks.features.Clamped`, or the like
    conditions: conditions(seeds) draws one condition per seed and returns the denoiser bound to
        them; it must be a function of the seeds alone
    out: a folder for checkpoint, log and the result; a run that finds its checkpoint there resumes
    afs: the analytic first step: "none", "zero" as published, or "mean"
    end: where a named grid ends: "sigma_min", or "zero", which tuned can reach, and does unless
        told otherwise where the network has a time of its own
    teacher, inner: the teacher, a deterministic solver's name, and how many points it adds inside
        each interval ("heun" with 1 is AMED's), or on its whole way where the method looks at its
        end alone; "deis-3" with 2, and "deis-4" with 30, unless given
    lr: of Adam; 0.005 for the AMED methods and 0.02 for tuned, where it rises over the first 20
        updates and then falls as a half cosine, unless given
    prior: prior(seeds) -> x_T; sigma_max times normal noise unless given
    model: facts about the network for the record, above all "name" and "weights", their hash
    cache: a folder where fine solves of the validation seeds, and the ends of a teacher that is
        looked at only there, are kept for other runs; needs a `model` with the hash of its weights
        and all that its conditions and its prior depend on, for that and the seeds are what an end
        is known by
    validation: how many validation seeds
    validate_every, checkpoint_every: in batches
    checkpointed: of a loss that spans several calls of the denoiser, compute each call again for
        its gradient, so that memory does not grow with nfe; without, the same numbers come sooner
    report: called after each batch
    note: called with what begins now, where it takes long
    options: of the method. amed and amed-plugin: scale_dir (0.01), scale_time (0), features (True
        where there are any); tuned: parts (all), squared (False), shift (2 in features, else 0)

    Returns the solver that did best on the validation seeds, in float32 on the CPU.
    Errors: ValueError for what cannot be trained, all before the first batch; FloatingPointError
    where the denoiser or a loss is not finite (the last checkpoint stays).
    """
    hashed = bool((model or {}).get("weights"))
    if cache is not None and not hashed:
        raise ValueError("cache needs model['weights'], the hash of the network's weights")
    _check_counts(
        trajectories=(trajectories, 1),
        batch=(batch, 1),
        seed=(seed, 0),
        validation=(validation, 1),
        validate_every=(validate_every, 1),
        checkpoint_every=(checkpoint_every, 1),
        nfe=(nfe, 1),
    )
    shape = tuple(int(size) for size in shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must be that of one sample, like (1, 32, 32), got {shape}")
    kind, schedule = kind_of(method), getattr(denoiser, "schedule", None)
    if grid is not None and not isinstance(grid, str):
        if (end, sigma_min, sigma_max) != (None, None, None):
            raise ValueError("sigmas have their own ends: leave out end, sigma_min and sigma_max")
        grid = check_grid(grid)
        end = "sigma_min" if grid[-1] > 0 else "zero"
    recipe = kind.recipe(base, nfe, afs, end, schedule is not None and schedule.own_time)
    if loss_features is not None and not recipe.whole:
        raise ValueError(
            f"{method} compares states step by step, in pixels: leave out loss_features (--loss)"
        )
    lr = recipe.lr if lr is None else lr
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive, got {lr}")
    named = recipe.grid if grid is None else grid if isinstance(grid, str) else None
    low = getattr(denoiser, "sigma_min", DEFAULT_RANGE[0]) if sigma_min is None else sigma_min
    high = getattr(denoiser, "sigma_max", DEFAULT_RANGE[1]) if sigma_max is None else sigma_max
    points = recipe.intervals + 1
    if named is None:
        sigmas = _counted(grid, recipe.intervals, nfe)  # type: ignore[arg-type]
    else:
        usual = "karras" if named == SEARCH else named  # until it is found, for its ends
        sigmas = end_at(make_grid(usual, points, high, low, schedule), recipe.end)
    whole = partial(
        whole_grid,
        sigma_max=sigmas[0],
        sigma_min=sigmas[-1] or min(low, sigmas[-2]),
        end=sigmas[-1],
        schedule=schedule,
    )
    inner = recipe.inner if inner is None else inner
    begin = TRAINING + seed * trajectories
    if inner < 0:
        raise ValueError(f"inner must be at least 0, got {inner}")

    place = torch.device(device)
    bound = conditions if conditions is not None else lambda seeds: denoiser
    noise = Noise(shape, sigmas[0], place, prior)
    held_out = range(VALIDATION, VALIDATION + validation)
    x = noise(held_out[:1])
    size = _features(bound(held_out[:1]), x, sigmas[0])
    if loss_features is not None:
        with torch.no_grad():
            loss_features(x)  # speaks up now about a shape that it does not take
    _check_options(kind, options)

    def fresh(levels: tuple[float, ...]) -> Method:
        in_features = loss_features is not None
        setup = Setup(recipe.base, levels, recipe.afs, size, seed, place, in_features)
        return kind.fresh(setup, **options)

    student = untrained = fresh(sigmas)
    mentor = teacher or recipe.teacher
    check_teacher(mentor)
    few = held_out[: min(LOOKED_AT, batch)]
    middle = math.sqrt(sigmas[0] * (sigmas[-1] or sigmas[-2]))
    look = _look(bound(few), noise(few) * (middle / sigmas[0]), middle, bool(student.parameters()))
    facts = {
        "method": method,
        "nfe": nfe,
        "grid": named or "sigmas",
        "afs": recipe.afs,
        "seed": seed,
        "trajectories": trajectories,
        "batch": batch,
        "lr": lr,
        "loss": _name_of(loss_features),
        "options": plain(student.options()),
        "base": recipe.base,
        "sigma_max": high,
        "sigma_min": low,
        "end": recipe.end,
        "teacher": mentor,
        "inner": inner,
        "shape": list(shape),
        "validation": validation,
        "validate_every": validate_every,
        "model": model or {},
    }
    there = None if out is None else check_folder(Path(out), facts)
    if named == SEARCH and there is not None:  # a run goes on with the grid that it found
        sigmas = check_grid(there["sigmas"])
        student = fresh(sigmas)
    elif named == SEARCH:
        note("searching for the grid")
        some = range(begin, begin + min(SEARCHED, trajectories))
        parts = [(bound(part), noise(part)) for part in _split(some, batch)]
        rivals = _named(points, high, low, recipe.end, schedule)
        found = search_grid(parts, whole(FINE), rivals, recipe.afs, fresh, loss_features)
        sigmas, student, untrained = found[0], *map(fresh, found)
    if recipe.whole:  # on a grid of its own, from end to end
        guide = Teacher(mentor, (sigmas[0], sigmas[-1]), whole(inner + 1))
    else:  # through the student's levels
        by = None if named == SEARCH else named
        guide = Teacher(mentor, sigmas, fine_grid(by, sigmas, inner, schedule), size > 0)
    facts |= {
        "sigmas": list(sigmas),
        "settings": plain(student.settings()),
        "teacher_nfe": guide.evaluations,
    }
    run = Run(student, lr, facts, None if hashed else look, recipe.decay)
    kept = None if cache is None else Path(cache) / "teachers"
    known = {"model": model, "shape": list(shape)}
    folder = None if out is None else _open(Path(out), run)
    if run.step < len(run.batches) or not run.measured:
        on = f"going on from batch {run.step} of {len(run.batches)}, " if run.step else ""
        note(f"{on}solving the validation seeds finely")
        fine = Teacher(REFERENCE, (sigmas[0], sigmas[-1]), whole(REFERENCE_INTERVALS))
        exact = Kept(fine, kept, known)
        ruler = Ruler(bound, noise, held_out, exact, batch, loss_features)
        paths = Kept(guide, kept if recipe.whole else None, known)

        def lesson(seeds: range) -> Lesson:
            frozen, x_T = Frozen(bound(seeds)), noise(seeds)
            path = paths.path(frozen, x_T, seeds)
            return Lesson(frozen, x_T, path, loss_features, checkpointed)

        _train(run, untrained, lesson, ruler, folder, checkpoint_every, report)
    solver = run.solver(kind)
    if folder is not None:
        solver.save(folder)
    return solver


@dataclass(frozen=True)
class Noise:
    """Starts by seed, in float32 on the device."""

    shape: tuple[int, ...]
    sigma: float
    device: torch.device
    prior: Prior | None

    def __call__(self, seeds: Sequence[int]) -> Tensor:
        if self.prior is None:
            return (self.sigma * normal(seeds, self.shape, "prior")).to(self.device)
        x = self.prior(seeds).to(self.device)
        if x.shape != (len(seeds), *self.shape):
            raise ValueError(f"prior must return {[len(seeds), *self.shape]}, got {list(x.shape)}")
        return x


class Ruler:
    """Validation: the distance of a solver's ends to fine solves of the same seeds."""

    @torch.no_grad()
    def __init__(
        self,
        bound: Conditions,
        noise: Noise,
        seeds: range,
        exact: Kept,
        batch: int,
        features: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.features = features
        self.parts: list[tuple[Denoiser, Tensor, Tensor]] = []
        for part in _split(seeds, batch):
            denoiser, x_T = bound(part), noise(part)
            end, levels = exact.path(denoiser, x_T, part).states[-1], exact.teacher.sigmas
            if not torch.isfinite(end).all():
                raise FloatingPointError(
                    f"the denoiser returned NaN or infinity between sigma {levels[0]:g} and "
                    f"{levels[-1]:g}; try dtype float32, or another guidance"
                )
            self.parts.append((denoiser, x_T, end))

    @torch.no_grad()
    def measure(self, method: Method) -> dict[str, float]:
        """Mean over the seeds of each one's root mean square distance, "error", and, where the loss
        is taken in features, "features", the same there; infinite where it is not a number."""
        spaces = {"error": lambda x: x, **({"features": self.features} if self.features else {})}
        found = {name: [] for name in spaces}
        for denoiser, x_T, exact in self.parts:
            x = solve(denoiser, x_T, method)
            for name, space in spaces.items():
                gap = (space(x) - space(exact)).double().square().flatten(1)
                found[name].append(gap.mean(1).sqrt())
        means = {name: torch.cat(each).mean().item() for name, each in found.items()}
        return {name: mean if math.isfinite(mean) else math.inf for name, mean in means.items()}


class Run:
    """The state of a run: the method's parameters, Adam's moments, the best so far, the step."""

    def __init__(
        self,
        method: Method,
        lr: float,
        facts: dict[str, Any],
        look: Tensor | None = None,
        decay: bool = False,
    ) -> None:
        """look: D somewhere, by which a denoiser without a hash, and its conditions, are known
        again"""
        self.method, self.facts, self.look, self.step = method, facts, look, 0
        self.lr, self.decay = lr, decay
        self.weights = {n: w.requires_grad_() for n, w in method.parameters().items()}
        self.adam = torch.optim.Adam([{"params": list(self.weights.values())}], lr=lr)
        self.updates = 0
        for w in self.weights.values():
            self.adam.state[w] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(w),
                "exp_avg_sq": torch.zeros_like(w),
            }
        self.best = {name: w.detach().clone() for name, w in self.weights.items()}
        self.measured: dict[str, float] = {}

    @property
    def batches(self) -> list[int]:
        """Where each batch ends, in trajectories; none where nothing learns."""
        total, size = self.facts["trajectories"] if self.weights else 0, self.facts["batch"]
        return [min(total, start + size) for start in range(0, total, size)]

    def seeds(self) -> range:
        """Of the batch after `step` earlier ones; runs of different `seed` share none."""
        total, size = self.facts["trajectories"], self.facts["batch"]
        start = TRAINING + self.facts["seed"] * total + self.step * size
        return range(start, start + self.batches[self.step] - self.step * size)

    def update(self, lesson: Lesson) -> tuple[float, dict[str, float]]:
        """All losses of a batch, a step of Adam for each; the mean loss and what is to be shown."""
        total, count, learned, numbers = 0.0, 0, {}, lesson.x_T[0].numel()
        for loss in self.method.losses(lesson):
            value = loss.value.item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"a loss is {value} in batch {self.step + 1}; the last checkpoint stays, try "
                    "a lower lr or dtype float32, in another folder"
                )
            self.adam.zero_grad()
            loss.value.backward(inputs=list(self.weights.values()))
            if self.decay:
                done = self.step / len(self.batches)
                slow = min(1.0, (self.updates + 1) / WARM_UP) * (1 + math.cos(math.pi * done)) / 2
                self.adam.param_groups[0]["lr"] = self.lr * slow
            self.adam.step()
            self.updates += 1
            total, count, learned = total + value / numbers, count + 1, loss.learned
        self.step += 1
        return total / count, learned

    def measure(self, found: dict[str, float]) -> None:
        """Take note of a validation, and of the parameters where they are the best so far: in the
        features of the loss, if it has any."""
        by = list(found)[-1]
        if found[by] < self.measured.get(by, math.inf):
            self.measured = {**self.measured, **found, "step": self.step}
            self.best = {name: w.detach().clone() for name, w in self.weights.items()}

    def tensors(self) -> dict[str, Tensor]:
        out = {} if self.look is None else {"look": self.look}
        for name, w in self.weights.items():
            state = self.adam.state[w]
            out |= {f"weights.{name}": w.detach(), f"best.{name}": self.best[name]}
            out |= {f"{moment}.{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
        return out

    def save(self, path: Path) -> None:
        state = {"step": self.step, "updates": self.updates, "measured": self.measured}
        metadata = {"run": json.dumps(self.facts), "state": json.dumps(state)}
        write_whole(path, safetensors.torch.save(self.tensors(), metadata))

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Take up the state in `path`. Errors: ValueError where it is cut short or of another
        run."""
        check_same(path, facts_in(path), self.facts)
        try:
            with safe_open(path, "pt") as file:
                if self.look is not None and not _alike(file.get_tensor("look"), self.look):
                    raise ValueError(
                        f"{path} is of a run on another denoiser, or with other conditions or "
                        "noise; give another folder"
                    )
                for name, tensor in self.tensors().items():
                    tensor.copy_(file.get_tensor(name))
                state = json.loads(file.metadata()["state"])
        except (SafetensorError, RuntimeError, KeyError) as error:
            raise ValueError(f"{path} cannot be read ({error}); remove it to start again") from None
        self.step, self.updates, self.measured = (state[k] for k in ("step", "updates", "measured"))
        for adam in self.adam.state.values():
            adam["step"].fill_(self.updates)

    def solver(self, kind: Kind) -> LearnedSolver:
        """What came out: the best parameters, on the CPU."""
        with torch.no_grad():
            for name, w in self.weights.items():
                w.copy_(self.best[name])
        method, facts = self.method, dict(self.facts)
        tensors = {name: w.detach().cpu().clone() for name, w in method.tensors().items()}
        best = kind.read(method.base, method.sigmas, method.afs, method.settings(), tensors)
        validation = {"seeds": [VALIDATION, VALIDATION + facts.pop("validation")], **self.measured}
        model = facts.pop("model")
        known = ("method", "base", "nfe", "afs", "sigmas", "settings")
        training = {k: v for k, v in facts.items() if k not in known}
        return LearnedSolver(best, model, {**training, "fewstep": VERSION}, validation)


@torch.enable_grad()
def _train(
    run: Run,
    untrained: Method,
    lesson: Callable[[range], Lesson],
    ruler: Ruler,
    folder: Path | None,
    checkpoint_every: int,
    report: Callable[[Progress], None],
) -> None:
    """From the run's step to its end.

    untrained: what it is measured against
    """
    ends = run.batches
    lines = _lines(folder, run.step) if run.measured else []
    if not run.measured:
        found = ruler.measure(run.method)
        if not all(map(math.isfinite, found.values())):
            raise FloatingPointError(
                "the untrained solver ends in NaN or infinity on the validation seeds; try another "
                "grid, or dtype float32"
            )
        run.measure(found)
        _log(folder, lines, {"step": 0, "error": run.measured["error"]})
        usual = found if untrained is run.method else ruler.measure(untrained)
        run.measured["error_untrained"] = usual["error"]
        if folder is not None:
            run.save(folder / CHECKPOINT)
    begun, since = time.perf_counter(), run.step
    with between_steps() as stopping:
        while run.step < len(ends):
            loss, learned = run.update(lesson(run.seeds()))
            last, validation = run.step == len(ends), None
            if last or run.step % run.facts["validate_every"] == 0:
                validation = ruler.measure(run.method)
                run.measure(validation)
                _log(folder, lines, {"step": run.step, "loss": loss, **validation, **learned})
            stop = stopping()
            if folder is not None and (last or stop or run.step % checkpoint_every == 0):
                run.save(folder / CHECKPOINT)
            each = (time.perf_counter() - begun) / (run.step - since)
            left, done = each * (len(ends) - run.step), ends[run.step - 1]
            report(Progress(run.step, len(ends), done, loss, learned, left, validation))
            if stop:
                raise KeyboardInterrupt


def _named(
    points: int, high: float, low: float, end: str, schedule: Schedule | None
) -> dict[str, tuple[float, ...]]:
    """The grids that go with these ends, by name."""
    found = {}
    for name in GRIDS:
        try:
            found[name] = end_at(make_grid(name, points, high, low, schedule), end)
        except ValueError:
            continue  # one of the network's own time, and it has none
    return found


def _counted(sigmas: tuple[float, ...], intervals: int, nfe: int) -> tuple[float, ...]:
    """Errors: ValueError where the budget is spent on another number of them."""
    if len(sigmas) != intervals + 1:
        raise ValueError(
            f"nfe={nfe} is spent on {intervals + 1} sigmas here, got {len(sigmas)}; "
            "give as many, or another nfe or afs"
        )
    return sigmas


def _split(seeds: range, size: int) -> list[range]:
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


def _check_counts(**counts: tuple[object, int]) -> None:
    """Each a value and the least that it may be."""
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer, at least {least}, got {value!r}")


def _check_options(kind: Kind, options: dict[str, Any]) -> None:
    parameters = inspect.signature(kind.fresh).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise ValueError(
                f"{kind.name} has no option {name!r}; it has: {', '.join(known) or 'none'}"
            )


@torch.no_grad()
def _features(denoiser: Denoiser, x: Tensor, sigma: float) -> int:
    """Evaluate once; how many features there are. Errors: ValueError for what is no denoiser."""
    level, count = x.new_full((len(x),), sigma), 0
    with_features = getattr(denoiser, "with_features", None)
    if with_features is not None:
        denoised, features = with_features(x, level)
        count = feature_count(features)
    else:
        denoised = denoiser(x, level)
    if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
        got = list(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
        raise ValueError(
            f"the denoiser must return D of the shape of x, {list(x.shape)}, got {got}"
        )
    if not torch.isfinite(denoised).all():
        raise ValueError(f"the denoiser returns NaN or infinity at sigma {sigma:g}")
    return count


@torch.enable_grad()
def _look(denoiser: Denoiser, x: Tensor, sigma: float, slope: bool) -> Tensor:
    """D, in float32 on the CPU. slope: whether its gradient is needed. Errors: ValueError where no
    gradient goes through."""
    x = x.detach().clone().requires_grad_(slope)
    denoised = denoiser(x, x.new_full((len(x),), sigma))
    if slope:
        graph = denoised.requires_grad
        found = torch.autograd.grad(denoised.sum(), x, allow_unused=True) if graph else (None,)
        if found[0] is None:
            raise ValueError(
                "no gradient goes through the denoiser: it must run outside torch.no_grad and "
                "torch.inference_mode, and detach neither x nor D"
            )
    return denoised.detach().float().cpu().clone()


def _alike(look: Tensor, other: Tensor) -> bool:
    """The same D but for the arithmetic of another machine."""
    if look.shape != other.shape:
        return False
    return bool((look - other).norm() <= SAME * other.norm())


def _name_of(loss_features: Callable[[Tensor], Tensor] | None) -> str:
    return "pixels" if loss_features is None else str(getattr(loss_features, "name", "features"))


def _open(folder: Path, run: Run) -> Path:
    """The folder, with the run at its checkpoint's state, if there is one."""
    if (folder / CHECKPOINT).exists():
        run.restore(folder / CHECKPOINT)
    return folder


def _lines(folder: Path | None, step: int) -> list[dict[str, Any]]:
    """The log so far, up to `step`; a log that cannot be read starts anew."""
    if folder is None or not (folder / LOG).exists():
        return []
    try:
        lines = [json.loads(text) for text in (folder / LOG).read_text().splitlines()]
        return [line for line in lines if line["step"] <= step]
    except (KeyError, TypeError, ValueError):
        return []


def _log(folder: Path | None, lines: list[dict[str, Any]], line: dict[str, Any]) -> None:
    lines.append(line)
    if folder is not None:
        write_whole(folder / LOG, "".join(json.dumps(one) + "\n" for one in lines).encode())
