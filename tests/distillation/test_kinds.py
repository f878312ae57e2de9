"""The trainer on other networks than the built-in kind: every prediction, discrete and continuous
time, latents under text-like conditions, guidance; and what students do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.denoiser import Bound, Predicted
from fewstep.distillation import Recipe, distill, student_levels
from fewstep.distillation.subject import Subject
from fewstep.distillation.teacher import stepper
from fewstep.distillation.training import Distillation
from fewstep.learned import LearnedSolver
from fewstep.learned.amed import Amed
from fewstep.learned.predictor import Predictor
from fewstep.models.students import CleanEnd, Consistency, DiscreteEnd
from fewstep.networks.conditioning import guidance_embedding
from fewstep.schedule import EDM, VP, Flow, Schedule
from fewstep.train.checkpoint import restore, save
from tests.distillation.test_distill import TINY, pictures, run_tiny, tiny_model, toy

SHAPE, WORDS, WIDTH = (4, 4, 4), 3, 8


class LatentNet(nn.Module):
    """A small text-to-latent network that starts as another one: (x_t, t, {"words": [b, words,
    width]}, told) -> prediction."""

    def __init__(self, other: Callable[..., Tensor]) -> None:
        super().__init__()
        self.other = other
        self.words, self.time = nn.Linear(WIDTH, 16), nn.Linear(16, 16)
        self.told = nn.Linear(16, 16)
        self.down, self.up = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, condition: Any, told: Tensor | None = None) -> Tensor:
        emb = self.time(guidance_embedding(t / 1000, 16).to(x.dtype))
        emb = emb + self.words(condition["words"]).mean(1)
        if told is not None:
            emb = emb + sum(self.told(guidance_embedding(one, 16)) for one in told.unbind(1))
        h = torch.tanh(self.down(x) + emb[:, :, None, None])
        return self.other(x, t, condition) + self.up(h)


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents with the embedded words of a caption each."""

    digest: str = "latents"

    def __len__(self) -> int:
        return 64

    def batch(self, chosen: Tensor, /) -> tuple[Tensor, dict[str, Tensor]]:
        gen = torch.Generator().manual_seed(0)
        words = torch.randn(64, WORDS, WIDTH, generator=gen)
        x_0 = captioned({"words": words}) + 0.3 * torch.randn(64, *SHAPE, generator=gen)
        return x_0[chosen], {"words": words[chosen]}


def captioned(condition: Any) -> Tensor:
    """The mean of the latents of a caption, [b, 1, 1, 1]."""
    return condition["words"].mean((1, 2))[:, None, None, None]


def exact(schedule: Schedule, prediction: str) -> Predicted:
    """The network of that prediction that knows the latents' law: N(captioned, 0.3^2)."""

    def network(x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        sigma = schedule.sigma(t)
        alpha, s = (v[:, None, None, None] for v in (schedule.alpha(sigma), sigma))
        x, mean = x_t / alpha, captioned(condition)
        clean = mean + 0.09 / (0.09 + s**2) * (x - mean)
        eps = (x - clean) / s
        return {
            "eps": eps,
            "x0": clean,
            "v": alpha * eps - s * alpha * clean,
            "flow": eps - clean,
        }[prediction]

    return Predicted(network, schedule, prediction)


def latent_subject(schedule: Schedule, prediction: str, boundary: Any) -> Subject:
    torch.manual_seed(0)
    teacher = exact(schedule, prediction)

    def denoise(net: nn.Module, x: Tensor, sigma: Tensor, condition: Any, told: Tensor | None):
        return Predicted(net, schedule, prediction)(x, sigma, condition, told)

    known = toy(
        LatentNet(teacher.denoiser),
        teacher,
        schedule.sigma_min,
        schedule.sigma_max,
        denoise=denoise,
    )
    return replace(
        known,
        teacher=lambda x, sigma, condition: teacher(x, sigma, condition),
        none={"words": torch.zeros(1, WORDS, WIDTH)},
        boundary=boundary,
        schedule=schedule,
    )


TABLE = VP.scaled_linear()
KINDS: dict[str, tuple[Schedule, str, Any, str]] = {
    "eps on a table": (TABLE, "eps", DiscreteEnd(TABLE), "trailing"),
    "v on a table": (TABLE, "v", DiscreteEnd(TABLE), "discrete"),
    "x0 in continuous time": (EDM(0.02, 20.0), "x0", CleanEnd(0.02), "karras"),
    "flow": (Flow(), "flow", CleanEnd(Flow().sigma_min), "discrete"),
}
QUICK: dict[str, Any] = {
    "batch": 16, "pictures": 16 * 250, "lr": 1e-2, "warmup": 0, "dtype": "float32", "points": 16,
    "target_decay": 0.8, "label_dropout": 0.1,
}  # fmt: skip


def start(kind: str, **settings: Any) -> Distillation:
    schedule, prediction, boundary, grid = KINDS[kind]
    recipe = Recipe(**{**QUICK, "grid": grid, **settings})
    known = latent_subject(schedule, prediction, boundary)
    ends = schedule.sigma_max, schedule.sigma_min
    how = {"points": recipe.points, "grid": grid, "substeps": recipe.substeps}
    step = stepper(recipe.teacher, *ends, schedule, **how)
    return Distillation(recipe, known, step, Latents())


def miss(net: Any, kind: str) -> float:
    """Mean distance of its f, at gamma = 1, to the end of the exact path from some high levels."""
    schedule, prediction, boundary, _ = KINDS[kind]
    x_0, condition = Latents().batch(torch.arange(64))
    f = Consistency(Bound(Predicted(net, schedule, prediction), condition), boundary)
    gen, found = torch.Generator().manual_seed(1), []
    for level in (schedule.sigma_max, 3.0, 1.0):
        x = x_0 + level * torch.randn(x_0.shape, generator=gen)
        mean = captioned(condition)
        end = mean + 0.3 / (0.09 + level**2) ** 0.5 * (x - mean)
        found.append((f(x, torch.full((64,), level)) - end).abs().mean().item())
    return sum(found) / 3


@pytest.mark.parametrize("kind", KINDS)
def test_students_of_every_kind_come_nearer_to_the_end_of_the_path(kind: str) -> None:
    slow = {"lr": 3e-3, "target_decay": 0.95}
    run = start(kind, **(slow if kind == "eps on a table" else {}))
    with torch.no_grad():
        x, condition = torch.randn(2, *SHAPE), Latents().batch(torch.arange(2))[1]
        sigma, told = run.levels.sigma[[2, 5]].float(), torch.tensor([[3.0], [0.0]])
        untrained = run.subject.denoise(run.subject.student, x, sigma, condition, told)
        assert torch.equal(untrained, run.subject.teacher(x, sigma, condition))
        before = miss(run.subject.student, kind)
        with torch.enable_grad():
            for done in range(run.recipe.total_steps):
                run.update(done)
        after = miss(run.averaged(), kind)
    # what a network of eps misses by counts times sigma, up to 14.6: it comes nearer more slowly
    assert after < (0.92 if kind == "eps on a table" else 0.7) * before

    schedule, prediction, boundary, _ = KINDS[kind]
    denoiser: Any = Predicted(run.averaged(), schedule, prediction)
    x_T = schedule.sigma_max * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    for sampler in ("consistency", "consistency-ode"):
        f = Consistency(Bound(denoiser, condition), boundary)
        levels = student_levels(run.levels.sigma.tolist(), 4)
        with torch.no_grad():
            x = fewstep.solve(f, x_T, sampler, grid=levels, seeds=range(2))
        assert (x - captioned(condition)).abs().mean() < 0.6  # 0.24 for the exact law


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_of_every_kind_is_the_same_to_the_bit(tmp_path: Path, kind: str) -> None:
    settings = {"guidance": (1.0, 4.0), "pictures": 16 * 6, "teacher": "heun"}
    whole, broken = start(kind, **settings), start(kind, **settings)
    for run in (whole, broken):
        for done in range(3):
            run.update(done)
    save(tmp_path / "checkpoint.safetensors", broken.run)
    again = start(kind, **settings)
    restore(tmp_path / "checkpoint.safetensors", again.run, 6)
    for run in (whole, again):
        for done in range(3, 6):
            run.update(done)
    for name, value in whole.run.tensors.items():
        assert torch.equal(value, again.run.tensors[name]), name


def test_told_the_level_of_its_place_the_student_answers_there() -> None:
    """By hand, under the rule's sigma_gamma: f = D(x_gamma; sigma_gamma)."""
    from fewstep.distillation.losses import Levels, draw, subpath_losses
    from fewstep.distillation.metric import Elementwise

    schedule, prediction, boundary, grid = KINDS["x0 in continuous time"]
    known = latent_subject(schedule, prediction, boundary)
    step = stepper("ddim", schedule.sigma_max, schedule.sigma_min, points=11, grid=grid, substeps=1)
    levels = Levels.of(step.levels, boundary)
    x_0, condition = Latents().batch(torch.arange(16))
    for rule in ("variance", "linear"):
        recipe = Recipe(batch=16, tell="level", rule=rule, loss="l2", grid=grid, points=11)
        assert recipe.told == ()
        drawn = draw(recipe, 0, 64, 10, SHAPE)
        ours = subpath_losses(
            known,
            known.student,
            step,
            levels,
            drawn,
            x_0,
            condition,
            recipe,
            Elementwise(recipe.loss),
        )
        t, s, g = levels.sigma[drawn.n], levels.sigma[drawn.n + 1], drawn.gamma
        place = {
            "variance": ((1 - g**2) * s**2 + g**2 * t**2).sqrt(),
            "linear": (1 - g) * s + g * t,
        }[rule].float()
        column = [v.float().reshape(-1, 1, 1, 1) for v in (t, s, g)]
        t_, s_, g_ = column
        x_t = x_0 + t_ * drawn.eps
        with torch.no_grad():
            x_s = s_ / t_ * x_t + (1 - s_ / t_) * known.teacher(x_t, t.float(), condition)
            goal = known.denoise(known.student, x_s, s.float(), condition, None)
            goal = torch.where(s_ <= schedule.sigma_min * 1.0001, x_s, goal)
        x = (1 - g_) * x_s + g_ * x_t
        by_hand = known.denoise(known.student, x, place, condition, None) - goal
        torch.testing.assert_close(ours, by_hand.square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)


def test_a_learned_solver_is_a_teacher(tmp_path: Path) -> None:
    model, levels = tiny_model(), (80.0, 4.0, 0.5, 0.002)
    predictor = Predictor.fresh(0, 0.01, 0.1, 0, torch.device("cpu"))
    for weight in predictor.weights.values():  # as if trained
        weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    solver = LearnedSolver(Amed("amed", None, levels, "none", predictor))
    solver.save(tmp_path)
    step = stepper(str(tmp_path), 80.0, 0.002)
    assert step.levels == solver.sigmas
    assert step.evaluations == 2
    x = model.prior(range(2))
    whole = fewstep.solve(model.denoiser(), x, solver)
    for n in range(len(step.levels) - 1):
        x = fewstep.solve(model.denoiser(), x, step.program(torch.tensor([n, n])))
    torch.testing.assert_close(x, whole, rtol=0, atol=1e-5)
    settings = {name: TINY[name] for name in ("pictures", "batch", "dtype", "warmup")}
    student = distill(model, pictures(), teacher=str(tmp_path), validation_seeds=0, **settings)
    assert student.card.distilled is not None
    assert student.card.distilled.levels == tuple(solver.sigmas)


# --- guidance in students -----------------------------------------------------------------------


def test_guidance_that_is_built_in_is_not_applied_again() -> None:
    student = run_tiny(None, guidance=4.0, pictures=8)
    made = fewstep.sample(student, nfe=2, seeds=range(2), label=1)
    assert made.network_calls == 2
    for guidance in (1.0, 4.0):
        with pytest.raises(ValueError, match="tiny-splam has guidance 4 built in, in one pass"):
            fewstep.sample(student, nfe=2, seeds=range(2), label=1, guidance=guidance)


def test_a_student_knows_the_scales_that_it_was_told_of() -> None:
    student = run_tiny(None, guidance=(2.0, 5.0), pictures=8)
    sample: Callable[..., Any] = lambda **how: fewstep.sample(student, nfe=1, seeds=[0], **how)  # noqa: E731
    for guidance, words in ((None, "none"), (1.0, "1.0"), (6.0, "6.0")):
        with pytest.raises(ValueError, match=f"for guidance from 2 to 5, got {words}"):
            sample(label=1, guidance=guidance)
    with pytest.raises(ValueError, match="guidance needs a label"):
        sample(guidance=3.0)
    told = torch.tensor([[1.0]])  # without a class: index 1, the scale 2
    x, sigma = student.prior([0]), torch.tensor([80.0])
    with torch.no_grad():
        by_hand = student.net(
            x / (80**2 + 0.25) ** 0.5, sigma.log() / 4, torch.tensor([3]), told=told
        )
        total = 80**2 + 0.25
        by_hand = 0.25 / total * x + 80 * 0.5 / total**0.5 * by_hand
        torch.testing.assert_close(student.denoiser()(x, sigma), by_hand, rtol=0, atol=1e-6)
