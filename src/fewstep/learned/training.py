"""Training a solver: noise in, a teacher's path, and Adam on a method's losses.

No data are needed. Trajectory i of a run starts from the noise of a seed of its own, 2,000,000 and
up; every few batches the solver is measured on seeds from 1,000,000 on, against fine solves, and
the best so far is what comes out. All draws are functions of a seed, so a run that was killed and
resumes from its checkpoint takes the path of one that was not, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.arguments import function, sides
from fewstep.cache import recall
from fewstep.denoiser import Denoiser
from fewstep.grid import check_grid
from fewstep.learned.choices import Choices
from fewstep.learned.grid_search import FINE, SEARCHED, OnGrid, search_grid
from fewstep.learned.method import Kind, Lesson, Method, Setup
from fewstep.learned.rivals import best_rival, best_sampler, unbeaten
from fewstep.learned.settings import VALIDATION, Settings
from fewstep.learned.solver import PREDICTOR_FILE, SOLVER_FILE, LearnedSolver
from fewstep.learned.teacher import Frozen, Kept
from fewstep.learned.validation import (
    Conditions,
    Imitated,
    Noise,
    Prior,
    Ruler,
    count_features,
    look_at,
    split,
)
from fewstep.models import Model
from fewstep.provenance import VERSION
from fewstep.train import loop
from fewstep.train.checkpoint import plain
from fewstep.train.loop import Folder, Progress, Schedule, Step
from fewstep.train.optimiser import Adam, check_finite
from fewstep.train.run import Identity, Run

__all__ = ["School", "SolverTraining", "known_of", "train"]

WARM_UP = 20  # updates of a rate that decays
LOOKED_AT = 4  # samples by whose D a denoiser is known again


def train(
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    conditions: Conditions | None = None,
    prior: Prior | None = None,
    imitated: Imitated | None = None,
    loss_features: Callable[[Tensor], Tensor] | None = None,
    out: Path | str | None = None,
    device: str | torch.device = "cpu",
    model: Model | dict[str, Any] | None = None,
    cache: Path | str | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> LearnedSolver:
    """Train a solver for one denoiser and one budget.

    Args:
        denoiser: any callable D(x [b, ...], sigma [b]) -> [b, ...]; its parameters do not change.
        shape: of one sample.
        conditions: conditions(seeds) draws one condition per seed and returns the denoiser bound to
            them; it must be a function of the seeds alone.
        prior: prior(seeds) -> x_T; sigma_max times normal noise unless given.
        imitated: of a student: its teacher, whose solutions are the target, and its levels.
        loss_features: a network for methods with a loss at the end of the path; None is pixels. One
            that is to see pictures needs `fewstep.networks.features.Clamped`, or the like.
        out: a folder for checkpoint, log and the result; a run that finds its checkpoint there
            resumes.
        model: the model, or facts about it for the record: "name" and "weights", their hash.
        cache: a folder where fine solves of the validation seeds, and the ends of a teacher that is
            looked at only there, are kept for other runs. Needs a `model` with the hash of its
            weights and all that its conditions and its prior depend on: an end is known by these
            and the seeds.
        report: called after each batch.
        note: called with what begins now, where it takes long.
        settings: the fields of `fewstep.learned.settings.Settings`, and options of the method.

    Returns:
        The solver that did best on the validation seeds, in float32 on the CPU: where training did
        not beat the best training-free one, and unless fallback is False, that one.

    Raises:
        ValueError: for what cannot be trained, all before the first batch.
        FloatingPointError: where the denoiser or a loss is not finite; the last checkpoint stays.
        Stopped: on Ctrl-C and SIGTERM, after the batch is finished and a checkpoint saved.
    """
    facts = _facts_of(model)
    hashed = bool(facts.get("weights"))
    if cache is not None and not hashed:
        raise ValueError("cache needs model['weights'], the hash of the network's weights")
    function("denoiser", denoiser, "D(x, sigma)")
    shape = sides("shape", shape)
    kinds = loss_features is not None, imitated is not None
    chosen = Choices.of(Settings.of(settings), denoiser, *kinds)
    place = torch.device(device)
    school = School(
        chosen,
        conditions if conditions is not None else lambda seeds: denoiser,
        Noise(shape, chosen.sigmas[0], place, prior),
        loss_features,
        facts,
        None if cache is None else Path(cache) / "teachers",
        imitated,
    )
    folder = Folder(None if out is None else Path(out), (SOLVER_FILE, PREDICTOR_FILE))
    with folder:
        task, untrained = school.enrol(folder, note)
        plan = task.plan
        folder.resume(task.run, plan.total_steps)
        if task.run.step < plan.total_steps or not task.measured:
            step = task.run.step
            on = f"going on from batch {step} of {plan.total_steps}, " if step else ""
            note(f"{on}solving the validation seeds finely")
            school.open(task)
            if not task.measured:
                task.begin(untrained, folder)
            loop.train(task, folder, plan, report)
        solver = _result(task, chosen, note)
        if folder.path is not None:
            solver.save(folder.path)
        return solver


def _result(task: SolverTraining, chosen: Choices, note: Callable[[str], None]) -> LearnedSolver:
    """What was trained, or the training-free solver that it did not beat."""
    solver = task.solver(chosen.kind)
    line = unbeaten(chosen.settings.method, task.measured)
    if not line:
        return solver
    taken = chosen.settings.fallback
    note(f"{line}; the result is {'that solver' if taken else 'kept as asked'}")
    return settled(solver) if taken else solver


def settled(solver: LearnedSolver) -> LearnedSolver:
    """The best training-free solver in place of one that did not beat it; its `validation` keeps
    the figures of both, those of what was trained under "trained"."""
    validation = dict(solver.validation)
    rival = validation["training_free"]
    figures = {name: rival[name] for name in ("error", "features") if name in rival}
    trained = {name: validation[name] for name in (*figures, "step")}
    method = OnGrid(rival["solver"], tuple(rival["sigmas"]), rival["afs"])
    training = {**solver.training, "method": solver.method.kind}
    return LearnedSolver(
        method, solver.model, training, {**validation, **figures, "step": 0, "trained": trained}
    )


def _facts_of(model: Model | dict[str, Any] | None) -> dict[str, Any]:
    """What the record says of a model."""
    if model is None or isinstance(model, dict):
        return model or {}
    return {"name": model.card.name, "weights": model.card.weights_sha256, **known_of(model)}


def known_of(model: Model) -> dict[str, Any]:
    """What else is known of a loaded model: checksums of its weights, and its settings."""
    sums, facts = getattr(model, "checksums", dict), getattr(model, "facts", dict)
    return {"checksums": sums(), "settings": facts()}


class School:
    """What a solver learns from: the denoiser, its noise, the teacher and the ruler.

    bound: from seeds to the denoiser with their conditions
    kept: the folder of the cache, or None
    imitated: of a student, what it imitates

    Raises:
        ValueError: for a denoiser that cannot be learned on.
    """

    def __init__(
        self,
        chosen: Choices,
        bound: Conditions,
        noise: Noise,
        features: Callable[[Tensor], Tensor] | None,
        model: dict[str, Any],
        kept: Path | None,
        imitated: Imitated | None = None,
    ) -> None:
        self.chosen, self.bound, self.noise = chosen, bound, noise
        self.features, self.model, self.kept = features, model, kept
        self.imitated = imitated
        self.solved = bound if imitated is None else imitated.teacher
        self.held_out = range(VALIDATION, VALIDATION + chosen.settings.validation_seeds)
        x = noise(self.held_out[:1])
        self.size = count_features(bound(self.held_out[:1]), x, chosen.sigmas[0])
        if features is not None:
            with torch.no_grad():
                features(x)  # raises now for a shape that it does not take

    def fresh(self, sigmas: tuple[float, ...]) -> Method:
        """Before training."""
        chosen, in_features = self.chosen, self.features is not None
        base, afs, seed = chosen.recipe.base, chosen.recipe.afs, chosen.settings.seed
        setup = Setup(base, sigmas, afs, self.size, seed, self.noise.device, in_features)
        return chosen.kind.fresh(setup, **chosen.settings.options)

    def enrol(self, folder: Folder, note: Callable[[str], None]) -> tuple[SolverTraining, Method]:
        """The task, its grid found, and what it is measured against.

        Raises:
            ValueError: the folder has another run or another solver.
            OSError: it cannot be written.
        """
        chosen, sigmas = self.chosen, self.chosen.sigmas
        student = untrained = self.fresh(sigmas)
        few = self.held_out[: min(LOOKED_AT, chosen.settings.batch)]
        x = self.noise(few) * (chosen.middle / sigmas[0])
        look = look_at(self.bound(few), x, chosen.middle, bool(student.parameters()))
        loss = "pixels" if self.features is None else getattr(self.features, "name", "features")
        facts = chosen.facts(self.noise.shape, student.options(), str(loss), self.model)
        looks = {} if self.model.get("weights") else {"denoiser, conditions or noise": look}
        identity = Identity("a solver's training", facts, looks=looks)
        folder.check()
        if chosen.searched:
            if head := folder.head(identity):  # a run goes on with the grid that it found
                sigmas = check_grid(head.follows["sigmas"])
                student = self.fresh(sigmas)
            else:
                note("searching for the grid")
                student, untrained = map(self.fresh, self._search())
                sigmas = student.sigmas
        # what a student's teacher sees is not what the student sees
        self.guide = chosen.guide(sigmas, self.size > 0 and self.imitated is None)
        follows = {
            "sigmas": list(sigmas),
            "settings": plain(student.settings()),
            "teacher_nfe": self.guide.evaluations,
        }
        task = SolverTraining(student, chosen, replace(identity, follows=follows))
        return task, untrained

    def _search(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        chosen = self.chosen
        begin, batch = chosen.settings.begin, chosen.settings.batch
        some = range(begin, begin + min(SEARCHED, chosen.settings.trajectories))
        parts = [(self.bound(part), self.noise(part)) for part in split(some, batch)]
        fine, rivals = chosen.whole(FINE), chosen.rivals()
        return search_grid(parts, fine, rivals, chosen.recipe.afs, self.fresh, self.features)

    def open(self, task: SolverTraining) -> None:
        """Solve the validation seeds finely, and give the task its lessons and its ruler."""
        chosen = self.chosen
        known = {"model": self.model, "shape": list(self.noise.shape)}
        reference, end = chosen.reference, int(task.method.sigmas[-1] == 0)

        def exact(denoiser: Denoiser, x_T: Tensor, seeds: range) -> Tensor:
            key = {**known, **asdict(reference), "seeds": list(seeds)}
            solved = partial(reference.ends, self.solved(seeds), x_T)
            if self.kept is None:
                return solved()[:, end]
            return recall(self.kept, key, (len(x_T), 2, *self.noise.shape), solved)[:, end]

        paths = Kept(self.guide, self.kept if chosen.recipe.whole else None, known)
        batch, features = chosen.settings.batch, self.features
        checkpointed = chosen.settings.checkpointed

        def lesson(seeds: range) -> Lesson:
            frozen, x_T = Frozen(self.bound(seeds)), self.noise(seeds)
            if self.imitated is None:
                path = paths.path(frozen, x_T, seeds)
            else:
                path = replace(paths.path(self.solved(seeds), x_T, seeds), seen=())
            return Lesson(frozen, x_T, path, features, checkpointed)

        task.lesson = lesson
        task.imitated = self.imitated
        task.ruler = Ruler(self.bound, self.noise, self.held_out, exact, batch, features)


class SolverTraining:
    """A method's losses, Adam, and the best parameters so far.

    lesson, ruler: see `School.open`
    """

    lesson: Callable[[range], Lesson]
    ruler: Ruler
    imitated: Imitated | None = None

    def __init__(self, method: Method, chosen: Choices, identity: Identity) -> None:
        self.method, self.chosen = method, chosen
        self.weights = {n: w.requires_grad_() for n, w in method.parameters().items()}
        self.adam = Adam(self.weights, betas=(0.9, 0.999), fused=False)
        self.best = {name: w.detach().clone() for name, w in self.weights.items()}
        tensors = {f"weights.{name}": w.detach() for name, w in self.weights.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        state = {"step": 0, "updates": 0, "measured": {}}
        self.run = Run(identity, tensors | self.adam.tensors(), state)

    @property
    def batches(self) -> int:
        """How many there are; none where nothing learns."""
        chosen = self.chosen.settings
        return math.ceil(chosen.trajectories / chosen.batch) if self.weights else 0

    @property
    def plan(self) -> Schedule:
        chosen = self.chosen.settings
        every = chosen.checkpoint_every, chosen.validate_every
        return Schedule(self.batches, chosen.batch, *every, chosen.trajectories, "trajectories")

    @property
    def measured(self) -> dict[str, Any]:
        """Figures of the best parameters; empty before the first validation."""
        return self.run.state["measured"]

    def seeds(self, step: int) -> range:
        """Of the batch after `step` earlier ones."""
        chosen = self.chosen.settings
        whole = range(chosen.begin, chosen.begin + chosen.trajectories)
        return whole[step * chosen.batch : (step + 1) * chosen.batch]

    @torch.enable_grad()
    def update(self, step: int) -> Step:
        """All losses of a batch, a step of Adam for each; the mean loss per number of a sample."""
        lesson = self.lesson(self.seeds(step))
        total, count, learned, numbers = 0.0, 0, {}, lesson.x_T[0].numel()
        lr = self.chosen.lr
        for loss in self.method.losses(lesson):
            value = loss.value.item()
            check_finite(step, value)
            loss.value.backward(inputs=list(self.weights.values()))
            lr = self._lr(step)
            self.adam.step(lr)
            self.run.state["updates"] += 1
            total, count, learned = total + value / numbers, count + 1, loss.learned
        return Step(total / count, lr, learned)

    def _lr(self, step: int) -> float:
        if not self.chosen.recipe.decay:
            return self.chosen.lr
        rise = min(1.0, (self.run.state["updates"] + 1) / WARM_UP)
        return self.chosen.lr * (rise * (1 + math.cos(math.pi * step / self.batches)) / 2)

    def begin(self, untrained: Method, folder: Folder) -> None:
        """Measure the solver before training, and what it is measured against."""
        found = self.validate()
        if not all(map(math.isfinite, found.values())):
            raise FloatingPointError(
                "the untrained solver ends in NaN or infinity on the validation seeds; try another "
                "grid, or dtype float32"
            )
        folder.log.add({"step": 0, "trajectories": 0, "error": found["error"]})
        usual = found if untrained is self.method else self.ruler.measure(untrained)
        also = {"error_untrained": usual["error"], "training_free": self._rival()}
        self.run.state["measured"] = {**self.measured, **also}
        folder.save(self.run)

    def _rival(self) -> dict[str, Any]:
        """The best way to spend the budget without training."""
        measure, levels = self.ruler.measure, self.method.sigmas
        if self.imitated is not None:
            return best_sampler(measure, self.imitated.levels, self.ruler.parts[0][0])
        low = levels[-1] or min(self.chosen.low, levels[-2])
        ends = levels[0], low, "sigma_min" if levels[-1] > 0 else "zero"
        nfe = self.method.program().evaluations
        firsts = ("none", "zero", "mean") if self.ruler.mean_at(levels[0]) else ("none", "zero")
        return best_rival(measure, nfe, *ends, self.chosen.schedule, firsts)

    def validate(self) -> dict[str, float]:
        """Measure the parameters, and keep them where they are the best so far: in the features
        of the loss, if it has any."""
        found = self.ruler.measure(self.method)
        by = list(found)[-1]
        if found[by] < self.measured.get(by, math.inf):
            self.run.state["measured"] = {**self.measured, **found, "step": self.run.step}
            self._copy(self.weights, self.best)
        return found

    def solver(self, kind: Kind) -> LearnedSolver:
        """What came out: the best parameters, on the CPU."""
        self._copy(self.best, self.weights)
        method, identity = self.method, self.run.identity
        facts = {**identity.settings, **identity.follows}
        tensors = {name: w.detach().cpu().clone() for name, w in method.tensors().items()}
        best = kind.read(method.base, method.sigmas, method.afs, method.settings(), tensors)
        validation = {"seeds": [VALIDATION, VALIDATION + facts.pop("validation")], **self.measured}
        model = facts.pop("model")
        known = ("method", "base", "nfe", "afs", "sigmas", "settings")
        training = {k: v for k, v in facts.items() if k not in known}
        return LearnedSolver(best, model, {**training, "fewstep": VERSION}, validation)

    @torch.no_grad()
    def _copy(self, source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        for name, value in target.items():
            value.copy_(source[name])
