"""Distillation by sub-path linear approximation (SPLAM), and consistency distillation (LCM).

Every draw is a function of (seed, step), so a run that is killed and resumed from its last
checkpoint takes exactly the path of one that was not.

Sources: SPLAM, arXiv:2404.13903; Luo et al. 2023 (LCM), arXiv:2310.04378; Song et al. 2023
(consistency models), arXiv:2303.01469.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.training import Data, NoData, mapped, read_data
from fewstep.denoiser import Condition
from fewstep.distillation.encoded import Report, encoded, encoded_texts
from fewstep.distillation.losses import Draw, Levels, Metric, draw, subpath_losses
from fewstep.distillation.metric import Elementwise, metric
from fewstep.distillation.recipe import Encoding, Recipe
from fewstep.distillation.students import student_card
from fewstep.distillation.subject import Subject, Training, subject
from fewstep.distillation.subpath import LOSSES
from fewstep.distillation.teacher import Stepper, Walker, stepper, walker
from fewstep.distillation.trajectory import trajectory_losses
from fewstep.distillation.validation import SHEETS, examination, examined, read_judges
from fewstep.loop import check_known
from fewstep.models import Model, load
from fewstep.models.card import Card
from fewstep.models.students import edges
from fewstep.records import check_slug
from fewstep.solver import get
from fewstep.train.average import Average
from fewstep.train.loop import Folder, Progress, Schedule, Step, check_every, share, train
from fewstep.train.optimiser import bitsandbytes, check_finite, optimiser
from fewstep.train.processes import Team, team
from fewstep.train.run import Identity, Run

__all__ = ["Distillation", "distill"]

KOHYA = "kohya"
FORMATS = ("diffusers", KOHYA)
ALONE = Team()


class Distillation:
    """The sub-path loss, Adam, the target and the average of the student.

    inputs: hashes of the data, the teacher's weights and its steps
    examine: figures of a student, and a sheet of its pictures for the step
    metric: the loss; that of the recipe's name, of pixels, where left out
    """

    def __init__(
        self,
        recipe: Recipe,
        subject: Subject,
        stepper: Stepper | Walker,
        data: Data,
        inputs: Mapping[str, str] = MappingProxyType({}),
        team: Team = ALONE,
        examine: Callable[[nn.Module, int], dict[str, float]] = lambda net, step: {},
        metric: Metric | None = None,
    ) -> None:
        self.recipe, self.stepper, self.data, self.team = recipe, stepper, data, team
        self.subject = _compiled(subject) if recipe.compile else subject
        self.examine = examine
        self.metric = metric or Elementwise(recipe.loss)
        self.levels = Levels.of(stepper.levels, subject.boundary, recipe.segments)
        self.shape = tuple(data.batch(torch.zeros(1, dtype=torch.int64))[0].shape[1:])
        needed = recipe.method != "trajectory"
        self.target = copy.deepcopy(subject.student).requires_grad_(False) if needed else None
        self.weights = {n: w for n, w in subject.student.named_parameters() if w.requires_grad}
        slow = dict(self.target.named_parameters()) if self.target else {}
        self.slow = {name: slow[name] for name in self.weights if name in slow}
        self.adam = optimiser(recipe.optimizer, self.weights)
        self.average = Average(self.weights)
        tensors = {f"weights.{name}": w.detach() for name, w in self.weights.items()}
        tensors |= {f"target.{name}": w for name, w in self.slow.items()}
        tensors |= self.average.tensors() | self.adam.tensors()
        self.run = Run(_identity(recipe, inputs), tensors)

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def resume(self, folder: Folder) -> None:
        """Take up the checkpoint where there is one; rank 0 reads it and the others follow.

        Raises:
            ValueError: where it is another run's, damaged, or longer than this run.
        """
        with self.team.led(self.device):
            if self.team.leads:
                folder.resume(self.run, self.recipe.total_steps)
        share(self.run, self.team)

    def update(self, step: int) -> Step:
        """One step of Adam; the loss is the mean over the batch.

        Raises:
            FloatingPointError: before anything has changed, where loss or gradient is not finite.
        """
        recipe, subject, device = self.recipe, self.subject, self.device
        paths = len(self.stepper.levels) - 1
        drawn = draw(recipe, step, len(self.data), paths, self.shape)
        total = torch.zeros((), device=device)
        for which in _parts(recipe.batch, self.team.rank, self.team.size, recipe.accumulate):
            part = drawn.part(which)
            x_0, condition = self.data.batch(part.chosen)
            condition = mapped(lambda c: c.to(device), condition)
            condition = _without(condition, subject.none, part.dropped.to(device))
            for losses in self._losses(part, x_0, condition):
                loss = losses.sum() / recipe.batch
                loss.backward()
                total += loss.detach()
        self.team.add_up([*(_gradient(w) for w in self.weights.values()), total])
        loss = total.item()
        check_finite(step, loss, self.adam.clip(recipe.clip))
        self.adam.step(lr := recipe.lr_at(step))
        with torch.no_grad():
            for name, slow in self.slow.items():
                slow.lerp_(self.weights[name], 1 - recipe.target_decay)
        self.average.update(step + 1)
        return Step(loss, lr)

    def _losses(self, part: Draw, x_0: Tensor, condition: Condition) -> Iterator[Tensor]:
        """What is to be gone back through, one after the other, [b] each."""
        recipe, subject, metric = self.recipe, self.subject, self.metric
        step, levels = self.stepper, self.levels
        if recipe.method == "trajectory":
            found = trajectory_losses(subject, step, levels, part, condition, recipe, metric)
        else:
            assert isinstance(step, Stepper)
            target = self.target
            assert target is not None
            given = step, levels, part, x_0.to(self.device), condition, recipe, metric
            found = (subpath_losses(subject, target, *given) for _ in range(1))
        while True:
            with _autocast(self.device, recipe.dtype):  # and no backward pass in it
                losses = next(found, None)
            if losses is None:
                return
            yield losses

    def validate(self) -> dict[str, float]:
        return self.examine(self.averaged(), self.run.step)

    def averaged(self) -> nn.Module:
        """A copy of the student with the averaged weights."""
        return self.average.of(self.subject.student)


def distill(
    model: Model,
    data: Data | tuple[Tensor, Tensor] | Path | str | None,
    *,
    out: Path | str | None = None,
    name: str | None = None,
    sampler: str | None = None,
    checkpoint_every: int = 100,
    validate_every: int = 500,
    validation_seeds: int = 250,
    encoding: Encoding | None = None,
    validation_prompts: Path | None = None,
    features: Path | None = None,
    clip_model: Path | None = None,
    lora_format: str = "diffusers",
    report: Callable[[Progress], None] = lambda progress: None,
    encoding_report: Report = lambda what, done, count: None,
    resumed: Callable[[int], None] = lambda step: None,
    **settings: Any,
) -> Model:
    """Distil a model into a student that samples in 1 to 8 evaluations.

    Args:
        model: the teacher, as `fewstep.load` returns it; it is left as it is
        data: a folder of idx files; pictures in a folder, a .zip, an .npz or an .npy; (images uint8
            [n, c, h, w], labels [n]); or a `Data`. Of a pipeline that takes text, pictures with
            captions (`fewstep.data.captioned`); None for pictures of the teacher's own, and for
            trajectories from noise alone
        out: folder for checkpoint, log, validation sheets and the student; a run that is there
            already is resumed. None keeps everything in memory.
        name: of the student in its card
        sampler: what its card names, "consistency" or, without fresh noise, "consistency-ode",
            "consistency-kappa" or "consistency-pca"; the first where left out, and the second, the
            only one, in segments
        checkpoint_every, validate_every: in steps
        validation_seeds: pictures that are compared with the teacher's fine solutions; 0 for none
        encoding: how a pipeline's pictures and texts are encoded
        validation_prompts: file of their texts; the first captions where left out
        features, clip_model: folders of a feature network, and of a CLIP model, for validation
        lora_format: of adapters, "diffusers", or "kohya" for a second file
        report: called after every step
        encoding_report: called with what is encoded, how many are done, and of how many
        resumed: called once, with the step, where there was a checkpoint
        settings: the fields of `Recipe`

    Returns:
        The student with averaged weights, ready for `fewstep.sample`; read back from `out` where
        that is given, so float16 has rounded its weights. Under torchrun all processes share the
        work, and rank 0 writes and reports. On Ctrl-C and SIGTERM the step is finished and a
        checkpoint saved.

    Raises:
        ValueError: before the first step, for settings, data or a checkpoint that do not fit or
            cannot be read.
        OSError: before the first step where `out` cannot be written, later where a file cannot be.
        FloatingPointError: the loss is not finite. What was saved stays.
    """
    recipe = _recipe(settings)
    if recipe.optimizer == "adamw8bit":
        bitsandbytes()  # raises now where it is not there
    if lora_format not in FORMATS or (lora_format == KOHYA and recipe.train != "lora"):
        raise ValueError(
            f"lora_format must be {' or '.join(FORMATS)}, and kohya needs train lora, got "
            f"{lora_format!r}"
        )
    if validation_seeds < 0:
        raise ValueError(f"validation_seeds must be at least 0, got {validation_seeds}")
    check_every(checkpoint_every=checkpoint_every, validate_every=validate_every)
    how = Training(recipe.train, recipe.rank, recipe.targets, recipe.checkpointing)
    known = subject(model, recipe.told, recipe.seed, how)
    device = next(known.student.parameters()).device
    with contextlib.ExitStack() as held:
        held.callback(known.close)
        recipe = _filled(recipe, known)
        step = _checked(recipe, known, model)
        name = check_slug("name", name or f"{model.card.name}-{recipe.method}")
        judges = read_judges(model, features, clip_model, validation_prompts, validation_seeds)
        together = held.enter_context(team(device))
        place = None if out is None else Path(out)
        folder = Folder(place if together.leads else None, known.results, (SHEETS,))
        held.enter_context(folder)
        _check_parts(recipe, together)
        with together.led(device):
            folder.look(_identity(recipe, _inputs(model, step)), recipe.total_steps)
            if together.leads:
                pictures = _read(data, model, recipe, encoding, encoding_report)
        if not together.leads:
            pictures = _read(data, model, recipe, encoding, encoding_report)
        card = _card(recipe, known, step, model.card, pictures, name, sampler)
        if sampler is not None:
            check_known(get(sampler).on(step.levels), model.denoiser())
        distance = metric(recipe.loss, model)
        begun = _start(recipe, known, model)
        if begun is not None:
            card = replace(card, about={**card.about, "start": _lineage(begun)})
        if lora_format == KOHYA:
            card = replace(card, about={**card.about, "lora_format": lora_format})
        judges["prompts"] = judges["prompts"] or getattr(pictures, "known_texts", ())
        examine = examination(model, recipe, validation_seeds, **judges)
        validate = validate_every if validation_seeds else None
        plan = Schedule(recipe.total_steps, recipe.batch, checkpoint_every, validate)
        with together.led(device):
            folder.check()
        inputs = {"data": pictures.digest, **_inputs(model, step)}
        inputs |= {"loss": distance.digest, "start": begun.weights_sha256 if begun else ""}
        task = Distillation(recipe, known, step, pictures, inputs, together, metric=distance)
        task.resume(folder)
        if together.leads:
            if task.run.step:
                resumed(task.run.step)
            if examine:
                task.examine = examined(examine, known, card, recipe, place)
        train(task, folder, plan, report, together)
        card = replace(card, about={**card.about, "validation": folder.log.latest(task.run.step)})
        if place is None:
            held.pop_all()
            return known.bind(task.averaged(), card)
        if together.leads:
            known.save(place, task.averaged(), card)
        together.wait()
        if known.in_memory:
            held.pop_all()
            return known.bind(task.averaged(), card)
    return load(place, device=str(device))


def _read(
    data: Any, model: Model, recipe: Recipe, encoding: Encoding | None, report: Report
) -> Data:
    """The data, those of a pipeline encoded."""
    if model.card.kind != "pipeline":
        if recipe.method == "trajectory" and encoding is None:
            if data is not None:
                raise ValueError("method trajectory starts from noise; give none for the data")
            return NoData(tuple(model.prior([0]).shape[1:]), len(model.card.classes))
        if encoding is not None or data is None:
            raise ValueError(
                f"captions, starts and the cache of latents are for pipelines, and "
                f"{model.card.name} is none; give pictures, and leave them out (only method "
                "trajectory needs none)"
            )
        return read_data(data, model, recipe.dropout)
    if data is not None and not isinstance(data, str | Path):
        return read_data(data, model, 1.0)
    if recipe.method == "trajectory":
        return encoded_texts(data, model, encoding or Encoding(), report)  # type: ignore[arg-type]
    low, high = recipe.scales
    guidance = None if (low, high) == (1.0, 1.0) else (low + high) / 2
    return encoded(data, model, encoding or Encoding(), guidance, report)  # type: ignore[arg-type]


def _filled(recipe: Recipe, known: Subject) -> Recipe:
    """The recipe with what the kind of model has other defaults for."""
    missing = {n: v for n, v in known.defaults.items() if getattr(recipe, n) is None}
    return replace(recipe, **missing)


def _inputs(model: Model, step: Stepper | Walker) -> dict[str, str]:
    """Hashes of what a run depends on besides its recipe and its data."""
    return {
        "weights of the teacher": model.card.weights_sha256,
        "steps of the teacher": step.digest,
    }


def _check_parts(recipe: Recipe, together: Team) -> None:
    """Raise ValueError where a batch in parts would be another loss."""
    parts = together.size > 1 or recipe.accumulate > 1
    if recipe.end_to_end and recipe.loss not in LOSSES and parts:
        raise ValueError(
            "end_to_end with a loss in features takes the means of the whole batch at once; leave "
            "accumulate and torchrun out"
        )


def _identity(recipe: Recipe, inputs: Mapping[str, str]) -> Identity:
    """What tells a run from others; its length and the parts of a batch do not, nor where the
    student lies that it starts from: its weights do."""
    free = ("pictures", "accumulate", "start")
    settings = {k: v for k, v in asdict(recipe).items() if k not in free}
    return Identity("a distillation", settings, inputs)


def _recipe(settings: dict[str, Any]) -> Recipe:
    have = [field.name for field in fields(Recipe)]
    for name in settings:
        if name not in have:
            raise ValueError(f"distill has no setting {name!r}; it has: {', '.join(have)}")
    return Recipe(**settings)


def _start(recipe: Recipe, known: Subject, model: Model) -> Card | None:
    """Give the student the weights of the recipe's start; its card, None where there is none.

    Raises:
        ValueError: that is no student of this model, or has another network.
    """
    if recipe.start is None:
        return None
    begun: Any = load(recipe.start)
    how = begun.card.distilled
    if how is None or how.teacher_weights != model.card.weights_sha256:
        raise ValueError(f"start {recipe.start} is no student of {model.card.name}")
    told, has = known.card.told, begun.card.told
    if told[: len(has)] != has:  # their weights stand in this order
        raise ValueError(
            f"start {recipe.start} is told {', '.join(has)}, and this student "
            f"{', '.join(told) or 'nothing'}"
        )
    weights = {name: tensor.float() for name, tensor in begun.net.state_dict().items()}
    missing, unknown = known.student.load_state_dict(weights, strict=False)
    if unknown or (missing and told == has):
        raise ValueError(f"start {recipe.start} has another network than {model.card.name}")
    return begun.card


def _lineage(card: Card) -> dict[str, Any]:
    """What a card tells of the student that another one started from."""
    about = {name: value for name, value in card.about.items() if name != "teacher"}
    return {"name": card.name, "weights": card.weights_sha256, **about}


def _told_recipe(recipe: Recipe) -> dict[str, Any]:
    """The settings for a card, without the folders in which somebody's files lie."""
    settings = asdict(recipe)
    for name in ("start", "teacher", "loss"):
        settings[name] = settings[name] and Path(settings[name]).name
    return settings


def _checked(recipe: Recipe, known: Subject, model: Model) -> Stepper | Walker:
    """The teacher's step.

    Raises:
        ValueError: for settings that the model has no use for.
    """
    of = walker if recipe.method == "trajectory" else stepper
    step = of(
        recipe.teacher,
        sigma_max=known.sigma_max,
        sigma_min=known.sigma_min,
        schedule=known.schedule,
        points=recipe.points,
        grid=recipe.grid,
        substeps=recipe.substeps,
        usual=known.usual,
        phases=recipe.segments,
    )
    _ = [edges(len(step.levels), count) for count in recipe.segments]  # raises for too many
    start, end = step.levels[0], step.levels[-1]
    if not (math.isclose(start, known.sigma_max, rel_tol=1e-6) and 0 < end < start):
        raise ValueError(
            f"teacher {recipe.teacher} runs from sigma {start:g} to {end:g}; it must start at the "
            f"model's {known.sigma_max:g} and end above 0"
        )
    if known.none is None:
        for name in ("guidance", "label_dropout"):
            if (value := getattr(recipe, name)) is not None:
                raise ValueError(
                    f"{name}={value} has no effect, as {model.card.name} has no classes or other "
                    "conditions; leave it out"
                )
    elif recipe.dropout == 1 and recipe.scales != (1.0, 1.0):
        raise ValueError("guidance has no effect at label_dropout 1, where no picture has a class")
    return step


def _card(
    recipe: Recipe,
    known: Subject,
    step: Stepper | Walker,
    teacher: Card,
    data: Data,
    name: str,
    sampler: str | None,
) -> Card:
    facts = {
        "method": recipe.method,
        "rule": recipe.level_rule if recipe.method == "splam" else None,
        "boundary": known.boundary_name,
        "gamma_input": "embedding" if "gamma" in recipe.told else "none",
        "guidance": recipe.guidance,
        "teacher": teacher.name,
        "teacher_weights": teacher.weights_sha256,
        "teacher_step": f"{step.name}, {step.evaluations} evaluations",
        "phases": () if recipe.phases is None else recipe.segments,
    }
    count = 0 if isinstance(data, NoData) else len(data)
    run = {"recipe": _told_recipe(recipe), "data": {"pictures": count, "sha256": data.digest}}
    return student_card(known.card, step.levels, facts, run, name, sampler)


def _parts(batch: int, rank: int, size: int, accumulate: int) -> list[slice]:
    """The slices of a batch that one process takes, one after the other."""
    first, end = (batch * i // size for i in (rank, rank + 1))
    cuts = [first + (end - first) * i // accumulate for i in range(accumulate + 1)]
    return [slice(a, b) for a, b in pairwise(cuts) if b > a]


def _without(condition: Condition, none: Condition, dropped: Tensor) -> Condition:
    """The condition with `none` in the rows that are dropped."""
    if none is None:
        return condition

    def choose(value: Tensor, usual: Tensor) -> Tensor:
        return torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), usual, value)

    return mapped(choose, condition, none)


def _gradient(weight: nn.Parameter | Tensor) -> Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _compiled(subject: Subject) -> Subject:
    """One graph for each of the three passes, at fixed shapes, so that a resumed run has the same
    ones."""
    teacher = subject.teacher
    return replace(
        subject,
        denoise=torch.compile(subject.denoise, dynamic=False),
        teacher=torch.compile(
            lambda x, sigma, condition: teacher(x, sigma, condition), dynamic=False
        ),
    )


def _autocast(device: torch.device, dtype: str) -> torch.autocast:
    kind = getattr(torch, dtype)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=kind != torch.float32)
