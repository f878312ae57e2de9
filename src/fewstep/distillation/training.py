"""Distillation by sub-path linear approximation (SPLAM), and consistency distillation (LCM).

Every draw is a function of (seed, step), so a run that is killed and resumed from its last
checkpoint takes exactly the path of one that was not.

Sources: SPLAM, arXiv:2404.13903; Luo et al. 2023 (LCM), arXiv:2310.04378; Song et al. 2023
(consistency models), arXiv:2303.01469.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.data.training import Data, mapped, read_data
from fewstep.denoiser import Condition
from fewstep.distillation.losses import Levels, draw, subpath_losses
from fewstep.distillation.recipe import Recipe
from fewstep.distillation.students import Examination, student_card
from fewstep.distillation.subject import Subject, subject
from fewstep.distillation.teacher import Stepper, stepper
from fewstep.files import sweep, write_whole
from fewstep.models import Model, load
from fewstep.models.card import Card
from fewstep.records import check_slug
from fewstep.train.interrupts import between_steps
from fewstep.train.network import CHECKPOINT, LOG, Progress, check_folder, log_lines
from fewstep.train.network import sorted_header as bytes_in_order
from fewstep.train.processes import Team, team

__all__ = ["Run", "distill"]

EMA_GAMMA = 16.97  # a window of 5 % of the run so far, as in `fewstep.train.network`
SHEETS = "validation"


class Run:
    """The state of a distillation: student, target, average, Adam's moments and the step count.

    key: a hash of the data, the teacher's weights and its steps, kept in checkpoints
    """

    def __init__(
        self, recipe: Recipe, subject: Subject, step: Stepper, data: Data, key: str, team: Team
    ) -> None:
        self.recipe, self.stepper, self.data = recipe, step, data
        self.subject = _compiled(subject) if recipe.compile else subject
        self.key, self.team, self.step = key, team, 0
        self.levels = Levels.of(step.levels, subject.boundary)
        self.shape = tuple(data.batch(torch.zeros(1, dtype=torch.int64))[0].shape[1:])
        self.target = copy.deepcopy(subject.student).requires_grad_(False)
        trained = [(n, w) for n, w in subject.student.named_parameters() if w.requires_grad]
        self.names, self.weights = [n for n, _ in trained], [w for _, w in trained]
        slow = dict(self.target.named_parameters())
        self.slow = [slow[name] for name in self.names]
        self.ema = [w.detach().clone() for w in self.weights]
        self.adam = torch.optim.Adam(self.weights, lr=recipe.lr, betas=(0.9, 0.99), fused=True)
        for w in self.weights:
            self.adam.state[w] = {
                "step": torch.zeros((), dtype=torch.float32, device=w.device),
                "exp_avg": torch.zeros_like(w),
                "exp_avg_sq": torch.zeros_like(w),
            }

    def tensors(self) -> dict[str, Tensor]:
        out = {}
        for name, w, slow, mean in zip(self.names, self.weights, self.slow, self.ema, strict=True):
            state = self.adam.state[w]
            out |= {f"weights.{name}": w.detach(), f"target.{name}": slow, f"ema.{name}": mean}
            out |= {f"{moment}.{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
        return out

    def save(self, path: Path) -> None:
        metadata = {
            "step": str(self.step),
            "distillation": json.dumps(asdict(self.recipe)),
            "key": self.key,
        }
        write_whole(path, bytes_in_order(safetensors.torch.save(self.tensors(), metadata)))

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Take up the state in `path` where there is one; rank 0 reads it and the others follow.

        Errors: ValueError where it is cut short, of another recipe, teacher or data, or longer than
        the run that is asked for.
        """
        with self.team.led(self.weights[0].device):
            if self.team.leads and path.exists():
                self._read(path)
        count = torch.tensor(self.step, device=self.weights[0].device)
        self.team.share([*self.tensors().values(), count])
        self.step = int(count)
        for state in self.adam.state.values():
            state["step"].fill_(self.step)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                found = file.metadata() or {}
                theirs, step = _read_recipe(path, found)
                ours = replace(self.recipe, pictures=theirs.pictures, accumulate=theirs.accumulate)
                if theirs != ours:
                    raise ValueError(
                        f"{path} was made by another recipe ({_difference(theirs, ours)}); "
                        "give its options, or another folder"
                    )
                if found.get("key") != self.key:
                    raise ValueError(
                        f"{path} was made from other data or another teacher; "
                        "give these, or another folder"
                    )
                if step > self.recipe.total_steps:
                    raise ValueError(
                        f"{path} is at {step * theirs.batch} pictures, past the "
                        f"{self.recipe.pictures} asked for; ask for as many or more, "
                        "or give another folder"
                    )
                for name, tensor in self.tensors().items():
                    tensor.copy_(file.get_tensor(name))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); remove it to start again") from None
        self.step = step

    def update(self) -> float:
        """One optimiser step; returns the mean loss.

        Errors: FloatingPointError, before anything has changed, where loss or gradient is not
        finite.
        """
        recipe, subject, device = self.recipe, self.subject, self.weights[0].device
        paths = len(self.stepper.levels) - 1
        drawn = draw(recipe, self.step, len(self.data), paths, self.shape)
        total = torch.zeros((), device=device)
        for which in _parts(recipe.batch, self.team.rank, self.team.size, recipe.accumulate):
            part = drawn.part(which)
            x_0, condition = self.data.batch(part.chosen)
            x_0, condition = x_0.to(device), mapped(lambda c: c.to(device), condition)
            condition = _without(condition, subject.none, part.dropped.to(device))
            with _autocast(device, recipe.dtype):
                losses = subpath_losses(
                    subject, self.target, self.stepper, self.levels, part, x_0, condition, recipe
                )
            loss = losses.sum() / recipe.batch
            loss.backward()
            total += loss.detach()
        gradients = [_gradient(w) for w in self.weights]
        self.team.add_up([*gradients, total])
        norm = torch.nn.utils.clip_grad_norm_(self.weights, recipe.clip)
        loss, size = total.item(), norm.item()
        if not math.isfinite(loss + size):
            raise FloatingPointError(
                f"the loss is {loss:g} and its gradient {size:g} at step {self.step + 1}; "
                "the last checkpoint stays, try a lower lr in another folder"
            )
        for group in self.adam.param_groups:
            group["lr"] = recipe.lr_at(self.step)
        self.adam.step()
        self.adam.zero_grad()
        self.step += 1
        with torch.no_grad():
            decay = (1 - 1 / self.step) ** (EMA_GAMMA + 1)
            for slow, mean, w in zip(self.slow, self.ema, self.weights, strict=True):
                slow.lerp_(w, 1 - recipe.target_decay)
                mean.lerp_(w, 1 - decay)
        return loss

    def averaged(self) -> nn.Module:
        """A copy of the student with the averaged weights."""
        net = copy.deepcopy(self.subject.student)
        net.load_state_dict(dict(zip(self.names, self.ema, strict=True)), strict=False)
        return net.eval().requires_grad_(False)


def distill(
    model: Model,
    data: Data | tuple[Tensor, Tensor] | Path | str,
    *,
    out: Path | str | None = None,
    name: str | None = None,
    sampler: str = "consistency",
    checkpoint_every: int = 100,
    validate_every: int = 500,
    validation_seeds: int = 250,
    report: Callable[[Progress], None] = lambda progress: None,
    resumed: Callable[[int], None] = lambda step: None,
    **settings: Any,
) -> Model:
    """Distil a model into a student that samples in 1 to 8 evaluations.

    model: the teacher, as `fewstep.load` returns it; it is left as it is
    data: a folder of idx files; pictures in a folder, a .zip, an .npz or an .npy; (images uint8
        [n, c, h, w], labels [n]); or a `Data`
    out: folder for checkpoint, log, validation sheets and the student; a run that is there already
        is resumed. None keeps everything in memory.
    name: of the student in its card
    sampler: what its card names, "consistency" or, without fresh noise, "consistency-ode"
    checkpoint_every, validate_every: in steps
    validation_seeds: pictures that are compared with the teacher's fine solutions; 0 for none
    report: called after every step
    resumed: called once, with the step, where there was a checkpoint
    settings: the fields of `Recipe`

    Returns the student with averaged weights, ready for `fewstep.sample`; read back from `out`
    where that is given, so float16 has rounded its weights. Under torchrun all processes share the
    work, and rank 0 writes and reports. On Ctrl-C the step is finished and a checkpoint saved.

    Errors, all before the first step: ValueError for settings, data or a checkpoint that do not fit
    or cannot be read; OSError where `out` cannot be written. Later: FloatingPointError where the
    loss is not finite, OSError where a file cannot be written; what was saved stays.
    """
    recipe = _recipe(settings)
    for what, value, least in (
        ("checkpoint_every", checkpoint_every, 1),
        ("validate_every", validate_every, 1),
        ("validation_seeds", validation_seeds, 0),
    ):
        if value < least:
            raise ValueError(f"{what} must be at least {least}, got {value}")
    known = subject(model, recipe.told, recipe.seed)
    step = _checked(recipe, known, model)
    pictures = read_data(data, model, recipe.dropout)
    name = check_slug("name", name or f"{model.card.name}-{recipe.method}")
    card = _card(recipe, known, step, model.card, pictures, name, sampler)
    folder = None if out is None else Path(out)
    key = f"{pictures.digest}:{model.card.weights_sha256}:{step.digest}"
    device = next(known.student.parameters()).device
    with team(device) as together:
        with together.led(device):
            files = Files(folder if together.leads else None)
        run = Run(recipe, known, step, pictures, key, together)
        if folder is not None:
            run.restore(folder / CHECKPOINT)
        with together.led(device):
            if together.leads and run.step:
                resumed(run.step)
            files.open(run.step)
        examine = _examination(model, recipe, validation_seeds) if together.leads else None
        _train(run, card, files, examine, checkpoint_every, validate_every, report)
        card = replace(card, about={**card.about, "validation": files.latest(run.step)})
        if folder is None:
            return known.bind(run.averaged(), card)
        if together.leads:
            known.save(folder, run.averaged(), card)
        together.wait()
    return load(folder, device=str(device))


def _train(
    run: Run,
    card: Card,
    files: Files,
    examine: Examination | None,
    checkpoint_every: int,
    validate_every: int,
    report: Callable[[Progress], None],
) -> None:
    """To the end of the recipe; files and reports are those of rank 0."""
    recipe, total = run.recipe, run.recipe.total_steps
    begun, first = time.perf_counter(), run.step
    with between_steps() as stopping:
        while run.step < total:
            loss = run.update()
            last, figures = run.step == total, None
            stop = run.team.any(bool(stopping()), run.weights[0].device)
            if examine and (last or run.step % validate_every == 0):
                student = run.subject.bind(run.averaged(), card)
                figures = examine(student, "guidance" in recipe.told, files.sheet(run.step))
                files.log({"step": run.step, "pictures": run.step * recipe.batch, **figures})
            if last or stop or run.step % checkpoint_every == 0:
                files.save(run)
            if run.team.leads:
                speed = (run.step - first) * recipe.batch / (time.perf_counter() - begun)
                lr = recipe.lr_at(run.step)
                report(Progress(run.step, total, loss, lr, speed, figures))
            if stop:
                run.team.wait()  # for what rank 0 saves
                raise KeyboardInterrupt


def _recipe(settings: dict[str, Any]) -> Recipe:
    have = [field.name for field in fields(Recipe)]
    for name in settings:
        if name not in have:
            raise ValueError(f"distill has no setting {name!r}; it has: {', '.join(have)}")
    return Recipe(**settings)


def _checked(recipe: Recipe, known: Subject, model: Model) -> Stepper:
    """The teacher's step. Errors: ValueError for settings that the model has no use for."""
    step = stepper(
        recipe.teacher,
        known.sigma_max,
        known.sigma_min,
        known.schedule,
        points=recipe.points,
        grid=recipe.grid,
        substeps=recipe.substeps,
    )
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
    step: Stepper,
    teacher: Card,
    data: Data,
    name: str,
    sampler: str,
) -> Card:
    facts = {
        "method": recipe.method,
        "rule": None if recipe.method == "lcm" else recipe.level_rule,
        "gamma_input": "embedding" if "gamma" in recipe.told else "none",
        "guidance": recipe.guidance,
        "teacher": teacher.name,
        "teacher_weights": teacher.weights_sha256,
        "teacher_step": f"{step.name}, {step.evaluations} evaluations",
    }
    run = {"recipe": asdict(recipe), "data": {"pictures": len(data), "sha256": data.digest}}
    return student_card(known.card, step.levels, facts, run, name, sampler)


def _examination(model: Model, recipe: Recipe, count: int) -> Examination | None:
    """With the mean of the guidance scales and all classes in turn where there is guidance, or
    where the student never sees pictures without a class; else without a class."""
    if count == 0:
        return None
    low, high = recipe.scales
    classes = len(model.card.classes)
    labelled = classes and (high > 1 or recipe.dropout == 0)
    return Examination(
        model,
        count,
        labels=tuple(range(classes)) if labelled else (None,),
        guidance=(low + high) / 2 if labelled and (low, high) != (1.0, 1.0) else None,
    )


class Files:
    """The files of a run in its folder; nothing without one."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.lines = folder, []
        if folder is not None:
            check_folder(folder)

    def open(self, step: int) -> None:
        """Remove what killed processes left, and take up the log as far as `step`."""
        if self.folder is None:
            return
        sweep(self.folder / SHEETS)
        self.lines = [line for line in log_lines(self.folder / LOG) if line["step"] <= step]

    def sheet(self, step: int) -> Path | None:
        return None if self.folder is None else self.folder / SHEETS / f"{step:07d}.png"

    def latest(self, step: int) -> dict[str, Any]:
        """The validation of that step, the last one; empty where there was none."""
        line = self.lines[-1] if self.lines else {}
        return line if line.get("step") == step else {}

    def log(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.folder is not None:
            text = "".join(json.dumps(one) + "\n" for one in self.lines)
            write_whole(self.folder / LOG, text.encode())

    def save(self, run: Run) -> None:
        if self.folder is not None:
            run.save(self.folder / CHECKPOINT)


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


def _read_recipe(path: Path, metadata: dict[str, str]) -> tuple[Recipe, int]:
    if "distillation" not in metadata:
        raise ValueError(f"{path} is not a checkpoint of a distillation")
    try:
        return Recipe(**json.loads(metadata["distillation"])), int(metadata["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has a recipe that this version of fewstep does not know ({error!r}); "
            "update fewstep, or give another folder"
        ) from None


def _difference(theirs: Recipe, ours: Recipe) -> str:
    names = [f.name for f in fields(Recipe) if getattr(theirs, f.name) != getattr(ours, f.name)]
    return ", ".join(f"{n}={getattr(theirs, n)}, now {getattr(ours, n)}" for n in names[:3])
