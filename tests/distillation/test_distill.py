"""Distillation: its loss, its draws, exact resume, several processes, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import torch
from safetensors import safe_open
from torch import Tensor, nn

import fewstep
from fewstep.cli import main
from fewstep.data.images import read_png
from fewstep.denoiser import Predicted
from fewstep.distillation import Recipe, distill
from fewstep.distillation.losses import Draw, Levels, draw, subpath_losses
from fewstep.distillation.metric import Elementwise
from fewstep.distillation.students import Examination, student_levels
from fewstep.distillation.subject import Subject, subject
from fewstep.distillation.teacher import stepper
from fewstep.distillation.training import Distillation
from fewstep.evaluate.references import References
from fewstep.models.card import Card
from fewstep.models.network import NetworkModel
from fewstep.models.students import CleanEnd
from fewstep.networks.features import load_feature_network
from fewstep.networks.unet import UNet
from fewstep.networks.unet_config import UNetConfig
from fewstep.schedule import EDM, VP, Flow, Schedule
from tests.support.testbed import Mixture
from tests.support.trainings import step_of

F64 = torch.float64
CONFIG = UNetConfig(size=8, widths=(16, 16), blocks=1, embedding=16, classes=3)
TINY = {"pictures": 48, "batch": 8, "points": 5, "dtype": "float32", "warmup": 0.3}


def tiny_model() -> NetworkModel:
    """A model of the built-in kind with random weights."""
    torch.manual_seed(0)
    net = UNet(CONFIG)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    stats = {
        "far_mean": torch.zeros(4, 1, 8, 8),
        "mean": torch.zeros(4, 64),
        "basis": torch.eye(64)[:4].expand(4, 4, 64).contiguous(),
        "variances": torch.ones(4, 4),
        "rest": torch.ones(4),
    }
    network = {**vars(CONFIG), "widths": list(CONFIG.widths), "told": []}
    card = Card("tiny", network, classes=("a", "b", "c"), weights_sha256="0" * 64)
    return NetworkModel(card, net.eval().requires_grad_(False), stats, net, net.image_shape)


def pictures(count: int = 40) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=gen, dtype=torch.uint8)
    return images, torch.arange(count) % 3


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.getbasetemp() / "splam"))


def run_tiny(out: Path | None = None, **settings: Any) -> Any:
    options = {"validation_seeds": 0, "checkpoint_every": 1, **TINY, **settings}
    return distill(tiny_model(), pictures(), out=out, **options)


def weights(path: Path, kind: str = "weights") -> Tensor:
    """All tensors of one kind in a checkpoint, in one."""
    found = safetensors.torch.load_file(path / "checkpoint.safetensors")
    return torch.cat([v.flatten() for k, v in sorted(found.items()) if k.startswith(f"{kind}.")])


# --- the loss --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Points:
    """Data of any shape without conditions."""

    x_0: Tensor
    digest: str = "points"

    def __len__(self) -> int:
        return len(self.x_0)

    def batch(self, chosen: Tensor, /) -> tuple[Tensor, None]:
        return self.x_0[chosen], None


def toy(student: nn.Module, teacher: Any, sigma_min: float, sigma_max: float, **more) -> Subject:
    """A subject around a student that is called as student(x, sigma, told)."""

    def denoise(net: nn.Module, x: Tensor, sigma: Tensor, condition: Any, told: Tensor | None):
        return net(x, sigma, told)

    def nothing(*args: Any) -> Any:
        raise AssertionError("neither bound nor saved here")

    return Subject(
        **{
            "student": student,
            "denoise": denoise,
            "teacher": lambda x, sigma, condition: teacher(x, sigma),
            "none": None,
            "boundary": CleanEnd(sigma_min),
            "sigma_min": sigma_min,
            "sigma_max": sigma_max,
            "schedule": None,
            "card": Card("toy"),
            "bind": nothing,
            "save": nothing,
            **more,
        }
    )


def one_batch(recipe: Recipe, paths: int, shape: tuple[int, ...]) -> Draw:
    return draw(recipe, 3, 100, paths, shape)


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("tell", [None, "level", "gamma"])
def test_at_gamma_1_the_loss_is_that_of_lcm_to_the_bit(
    tell: str | None, guidance: float | None
) -> None:
    """By hand: DDIM under guidance, the target's and the student's D, pseudo-Huber."""
    more: dict[str, Any] = {"gamma_one": 1.0, "tell": tell} if tell else {}
    recipe = Recipe(
        method="splam" if tell else "lcm", guidance=guidance, batch=16, points=6, **more
    )
    model = tiny_model()
    known = subject(model, recipe.told, 0)
    step = stepper("ddim", 80.0, 0.002, points=6, substeps=1)
    levels = Levels.of(step.levels, known.boundary)
    target = UNet(replace(CONFIG, told=recipe.told)).requires_grad_(False)
    drawn = one_batch(recipe, 5, (1, 8, 8))
    drawn = drawn._replace(n=torch.arange(16) % 5)  # the last sub-path, into sigma_min, too
    label = torch.where(drawn.dropped, 3, torch.arange(16) % 3)
    gen = torch.Generator().manual_seed(1)
    x_0 = torch.randn(16, 1, 8, 8, generator=gen)

    ours = subpath_losses(
        known, target, step, levels, drawn, x_0, label, recipe, Elementwise(recipe.loss)
    )

    def column(value: Tensor) -> Tensor:
        return value.float().reshape(-1, 1, 1, 1)

    def by_edm(net: nn.Module, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        s = column(sigma)
        total = s * s + 0.25
        out = net(total.rsqrt() * x, sigma.float().log() / 4, label)
        return torch.addcmul(0.25 / total * x, s * 0.5 * total.rsqrt(), out)

    t, s = (torch.tensor(step.levels, dtype=F64)[drawn.n + i] for i in (0, 1))
    x_t = x_0 + column(t) * drawn.eps
    with torch.no_grad():
        if guidance is None:
            denoised = by_edm(model.net, x_t, t, label)
        else:
            none = torch.full_like(label, 3)
            twice = by_edm(
                model.net, torch.cat((x_t, x_t)), torch.cat((t, t)), torch.cat((label, none))
            )
            cond, uncond = twice.chunk(2)
            denoised = uncond + guidance * (cond - uncond)
        x_s = column(s / t) * x_t + column(1 - s / t) * denoised
        goal = torch.where(column(s) <= 0.002, x_s, by_edm(target, x_s, s, label))
    d = by_edm(known.student, x_t, t, label) - goal
    by_hand = ((d * d + 1e-3**2).sqrt() - 1e-3).flatten(1).mean(1)
    assert torch.equal(ours, by_hand)
    assert ours.min() > 0


def test_the_two_passes_of_guidance_are_one_batched_call() -> None:
    model = tiny_model()
    recipe = Recipe(guidance=(2.0, 5.0), batch=8, points=5)
    known = subject(model, recipe.told, 0)
    sizes: list[int] = []

    def teacher(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        sizes.append(len(x))
        return known.teacher(x, sigma, label)

    watched = replace(known, teacher=teacher)
    step = stepper("ddim", 80.0, 0.002, points=5, substeps=1)
    levels = Levels.of(step.levels, known.boundary)
    drawn = one_batch(recipe, 4, (1, 8, 8))
    x_0, label = torch.zeros(8, 1, 8, 8), torch.arange(8) % 3
    subpath_losses(
        watched, known.student, step, levels, drawn, x_0, label, recipe, Elementwise(recipe.loss)
    )
    assert sizes == [16]


def raw(prediction: str, schedule: Schedule):
    """The network of that prediction whose D is the mixture's, and D itself in float64."""
    mixture = Mixture()

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        sigma = schedule.sigma(t)
        alpha, s = schedule.alpha(sigma)[:, None], sigma[:, None]
        x = x_t / alpha
        clean = mixture(x, sigma)
        eps = (x - clean) / s
        return {
            "eps": eps,
            "x0": clean,
            "v": alpha * eps - s * alpha * clean,
            "flow": eps - clean,
        }[prediction]

    return Predicted(network, schedule, prediction)


@pytest.mark.parametrize(
    "prediction, schedule, grid",
    [
        ("eps", VP.scaled_linear(), "karras"),
        ("eps", VP.scaled_linear(), "trailing"),
        ("v", VP.scaled_linear(), "trailing"),
        ("x0", EDM(0.03, 14.0), "karras"),
        ("flow", Flow(t_max=0.93, t_min=0.03), "karras"),
        ("flow", Flow(t_max=0.93, t_min=0.03), "discrete"),
    ],
)
def test_every_kind_of_prediction_has_the_same_loss(prediction, schedule, grid) -> None:
    recipe = Recipe(batch=16, points=8, grid=grid, gamma_one=0.2, tell="gamma")
    ends = schedule.sigma_max, schedule.sigma_min
    step = stepper("ddim", *ends, schedule, points=8, grid=grid, substeps=1)
    net = nn.Linear(1, 1, dtype=F64)
    found = []
    for teacher in (Mixture(), raw(prediction, schedule)):

        def student(model: nn.Module, x: Tensor, sigma: Tensor, condition: Any, told: Any):
            return (1 + model.weight * told.double()) * teacher(x, sigma)  # noqa: B023

        known = toy(net, teacher, ends[1], ends[0], denoise=student, schedule=schedule)
        levels = Levels.of(step.levels, known.boundary)
        drawn = one_batch(recipe, 7, (3,))
        x_0 = torch.randn(16, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
        drawn = drawn._replace(eps=drawn.eps.double())
        found.append(
            subpath_losses(
                known, net, step, levels, drawn, x_0, None, recipe, Elementwise(recipe.loss)
            )
        )
    assert (found[0] - found[1]).abs().max() < 1e-9


# --- where it leads: the product of the teacher's steps ---------------------------------------


VARIANCE = torch.tensor([0.25, 0.04, 1.0], dtype=F64)


class GaussianTeacher:
    """D of N(0, diag(VARIANCE))."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x * VARIANCE / (VARIANCE + sigma[:, None] ** 2)


class Table(nn.Module):
    """A student with a factor and a bend per level and direction: f = factor x / (1 - a bend) with
    a = 1 - gamma.

    For a Gaussian x_gamma is a multiple of x_t, (1 - a (1 - A)) of it where A is the factor of the
    teacher's step, so one such student is right at every gamma. D follows from f by the rule.
    """

    def __init__(self, levels: tuple[float, ...], rule: str) -> None:
        super().__init__()
        self.levels, self.rule = torch.tensor(levels, dtype=F64), rule
        noise = self.levels[:, None] ** 2
        self.scale = VARIANCE.sqrt() / (VARIANCE + noise).sqrt()
        self.factor = nn.Parameter(VARIANCE / (VARIANCE + noise) / self.scale)
        self.bend = nn.Parameter(torch.zeros_like(noise * VARIANCE))

    def forward(self, x: Tensor, sigma: Tensor, told: Tensor | None) -> Tensor:
        row = (sigma[:, None].double() - self.levels).abs().argmin(1)
        a = torch.zeros(len(x), 1, dtype=F64) if told is None else told[:, :1].double() / 10
        f = self.factor[row] * self.scale[row] / (1 - a * self.bend[row])
        q = (self.levels[(row + 1).clamp(max=len(self.levels) - 1)] / self.levels[row])[:, None]
        g = 1 - a
        ratio = {
            "variance": torch.sqrt((1 - g * g) * q * q + g * g),
            "linear": (1 - g) * q + g,
        }[self.rule]
        return (f - (1 - ratio)) / ratio * x


def chain(levels: tuple[float, ...]) -> Tensor:
    """What DDIM makes of a unit at each level by the end, [levels, 3], by hand."""
    products = [torch.ones(3, dtype=F64)]
    for t, s in reversed(list(pairwise(levels))):
        step = s / t + (1 - s / t) * VARIANCE / (VARIANCE + t * t)
        products.append(step * products[-1])
    return torch.stack(products[::-1])


@pytest.mark.parametrize(
    "method, rule",
    [("lcm", None), ("splam", "variance"), ("splam", "linear")],
)
def test_on_a_gaussian_the_student_becomes_the_product_of_the_teachers_steps(method, rule) -> None:
    levels = fewstep.grid.karras(8, 10.0, 0.05)
    recipe = Recipe(
        method=method,
        tell="gamma" if rule else None,
        rule=rule,
        loss="l2",
        pictures=32 * 1200,
        batch=32,
        lr=1e-2,
        warmup=0,
        cooldown=0.5,
        dtype="float32",
        clip=1e9,
    )
    student = Table(levels, rule or "linear")
    known = toy(student, GaussianTeacher(), levels[-1], levels[0])
    step = stepper("ddim", levels[0], levels[-1], points=8, grid="karras", substeps=1)
    gen = torch.Generator().manual_seed(0)
    data = Points(torch.randn(1000, 3, generator=gen, dtype=F64) * VARIANCE.sqrt())
    run = Distillation(recipe, known, step, data)
    for done in range(recipe.total_steps):
        run.update(done)
    product = chain(levels)
    trained = run.averaged()
    for i, sigma in enumerate(levels[:-1]):
        spread = (VARIANCE + sigma**2).sqrt()
        f = trained(torch.ones(1, 3, dtype=F64), torch.tensor([sigma], dtype=F64), None)
        assert ((f[0] - product[i]) * spread).abs().max() < 1e-3  # error at a typical x


def test_the_product_tends_to_the_exact_consistency_function() -> None:
    errors = []
    for points in (18, 35, 69):
        levels = fewstep.grid.karras(points, 80.0, 0.002)
        exact = ((VARIANCE + levels[-1] ** 2) / (VARIANCE + levels[0] ** 2)).sqrt()
        errors.append(float((chain(levels)[0] / exact - 1).abs().max()))
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.15)  # DDIM has order 1


# --- the draws --------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_falls_over_shares_of_any_run() -> None:
    for pictures in (800, 8000):
        recipe = Recipe(pictures=pictures, batch=8, lr=2.0, warmup=0.1, cooldown=0.4)
        total = pictures // 8
        rates = [recipe.lr_at(step) for step in range(total)]
        assert rates[0] == pytest.approx(2.0 / (0.1 * total + 1))
        assert rates[total // 10 : total * 6 // 10] == [2.0] * (total // 2)
        assert rates[-1] == pytest.approx(2.0 / (0.4 * total + 1))
        assert rates[total * 8 // 10] == pytest.approx(1.0, rel=0.05)
    assert Recipe(warmup=0.9, cooldown=0.1).lr_at(0) > 0


def test_gamma_1_is_trained() -> None:
    recipe = Recipe(batch=20_000)
    gamma = one_batch(recipe, 17, ()).gamma
    inside = gamma[gamma < 1].sort().values
    assert (gamma == 1).double().mean().item() == pytest.approx(0.5, abs=0.01)
    uniform = torch.linspace(0, 1, len(inside), dtype=F64)
    assert (inside - uniform).abs().max() < 0.02  # the rest is uniform
    assert (one_batch(replace(recipe, gamma_one=0.0), 17, ()).gamma < 1).all()
    assert (one_batch(Recipe(method="lcm", batch=200), 17, ()).gamma == 1).all()


def test_every_sub_path_is_drawn_alike() -> None:
    drawn = one_batch(Recipe(batch=17 * 60), 17, ())
    assert (torch.bincount(drawn.n, minlength=17) - 60).abs().max() <= 2


def test_the_scale_of_guidance_is_drawn_between_its_ends() -> None:
    scale = one_batch(Recipe(batch=20_000, guidance=(2.0, 6.0)), 17, ()).guidance
    assert scale.min() >= 2
    assert scale.max() <= 6
    assert scale.mean().item() == pytest.approx(4, abs=0.05)
    assert (one_batch(Recipe(guidance=3.0), 17, ()).guidance == 3).all()


def test_every_picture_is_seen_once_per_epoch_also_by_a_run_that_resumes() -> None:
    recipe = Recipe(batch=8)
    seen = torch.cat([draw(recipe, step, 20, 4, ()).chosen for step in range(5)])
    assert sorted(seen[:20].tolist()) == list(range(20))
    assert sorted(seen[20:].tolist()) == list(range(20))
    assert seen[:20].tolist() != seen[20:].tolist()
    later = draw(recipe, 3, 20, 4, (2,))  # by its number alone: no state to carry
    assert torch.equal(later.chosen, seen[24:32])
    assert not torch.equal(later.eps, draw(recipe, 2, 20, 4, (2,)).eps)


# --- runs -------------------------------------------------------------------------------------


CHANGES: dict[str, Any] = {
    "method": "lcm",
    "points": 7,
    "grid": "log-snr",
    "teacher": "heun",
    "substeps": 3,
    "guidance": 4.0,
    "phases": (1, 2),
    "gamma_one": 0.9,
    "tell": "gamma",
    "rule": "variance",
    "loss": "l2",
    "pictures": 24,
    "batch": 6,
    "lr": 1e-2,
    "warmup": 0,
    "cooldown": 0.6,
    "label_dropout": 0.0,
    "target_decay": 0.1,
    "clip": 1e-6,
    "dtype": "bfloat16",
    "seed": 1,
}


def test_every_setting_is_tried() -> None:
    settings = set(Recipe.__dataclass_fields__)
    rounding = {"accumulate", "compile"}  # below
    adapters = {"train", "rank", "targets", "checkpointing"}  # of pipelines: test_pipelines.py
    segments = {"phase_weight", "end_to_end", "start"}  # test_segments.py
    libraries = {"optimizer"}  # tests/train/test_optimiser.py
    assert set(CHANGES) == settings - rounding - adapters - segments - libraries


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("usual")
    run_tiny(out)
    return out


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_has_an_effect(tmp_path: Path, usual: Path, name: str) -> None:
    run_tiny(tmp_path, **{name: CHANGES[name]})
    ours, theirs = weights(tmp_path, "ema"), weights(usual, "ema")
    assert ours.shape != theirs.shape or (ours - theirs).abs().max() > 1e-7


def test_accumulation_changes_rounding_alone(tmp_path: Path) -> None:
    for parts in (1, 3):
        run_tiny(tmp_path / str(parts), accumulate=parts, pictures=8)
    whole, part = (weights(tmp_path / str(parts), "exp_avg") for parts in (1, 3))  # the gradient
    assert 0 < (whole - part).abs().max() < 1e-5 * whole.abs().max()


def test_the_target_is_an_average_of_the_student(tmp_path: Path) -> None:
    paths = []
    for pictures_ in (8, 16, 24):
        run_tiny(tmp_path, pictures=pictures_, cooldown=0.0)
        paths.append((weights(tmp_path).double(), weights(tmp_path, "target").double()))
    for (_, before), (student, after) in pairwise(paths):
        torch.testing.assert_close(after, 0.95 * before + 0.05 * student, rtol=0, atol=1e-7)


def test_validation_runs_at_gamma_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    forward = UNet.forward

    def watched(self, x, c_noise, label, told=None):
        if self.config.told and not torch.is_grad_enabled() and not self.training:
            seen.append(told)
        return forward(self, x, c_noise, label, told)

    monkeypatch.setattr(UNet, "forward", watched)
    run_tiny(tmp_path, pictures=16, validation_seeds=2, validate_every=1, tell="gamma")
    # the target network never leaves training mode, so these are validation's alone
    assert len(seen) == 2 * (1 + 2 * (2 + 4))  # with both samplers
    assert all(told is None for told in seen)  # index 0, which is gamma = 1


def test_validation_compares_with_the_teachers_fine_solution(tmp_path: Path) -> None:
    model = tiny_model()
    student = run_tiny(tmp_path, validation_seeds=4, validate_every=100)
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    seeds = range(1_000_000, 1_000_004)
    fine = fewstep.sample(model, solver="deis-4", nfe=40, grid="karras", seeds=seeds)
    fine = fine.images.astype(float)
    for solver, mark in (("consistency", ""), ("consistency-ode", "_ode")):
        for nfe in (1, 2, 4) if not mark else (2, 4):
            ours = fewstep.sample(student, solver=solver, nfe=nfe, seeds=seeds).images
            rmse = float(np.sqrt(np.mean(((ours - fine) / 127.5) ** 2)))
            assert line[f"rmse{mark}_{nfe}"] == pytest.approx(rmse, abs=2e-3)  # float16 in the file
    sheet, figures = read_png(tmp_path / "validation" / "0000006.png")
    assert figures == {k: v for k, v in line.items() if k.startswith("rmse")}
    assert sheet.shape == (4 * 66 + 2, 4 * 66 + 2, 1)


def test_validation_takes_the_frechet_distance_to_other_seeds(monkeypatch) -> None:
    """In the features of fashion-a, for 32x32 grey pictures from 250 seeds on."""

    def endpoints(self: Any, seeds: Sequence[int]) -> np.ndarray:
        parts = [np.random.default_rng(seed).normal(size=(2, 1, 32, 32)) for seed in seeds]
        return np.stack(parts).astype(np.float32)

    def decode(x: Tensor) -> np.ndarray:
        return (x.clamp(-1, 1).add(1) * 127.5).byte().permute(0, 2, 3, 1).numpy()

    monkeypatch.setattr(References, "endpoints", endpoints)
    teacher: Any = Namespace(shape=(1, 32, 32), decode=decode)
    examine = Examination(teacher, 250)
    own, others = (
        decode(torch.from_numpy(endpoints(None, range(1_000_000 + i, 1_000_250 + i))[:, 0]))
        for i in (0, 250)
    )
    assert np.array_equal(examine.reference, own)
    network = load_feature_network("fashion-a")
    a, b = (
        network(torch.from_numpy(p).permute(0, 3, 1, 2).float() / 127.5 - 1).double().numpy()
        for p in (own, others)
    )
    ca, cb = (np.cov(f, rowvar=False) for f in (a, b))
    root = np.real(scipy.linalg.sqrtm(ca @ cb))
    by_hand = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca + cb - 2 * root)
    assert examine.distance is not None
    assert examine.distance(own) == pytest.approx(by_hand, rel=1e-3)
    assert Examination(teacher, 249).distance is None
    teacher = Namespace(shape=(1, 8, 8), decode=lambda x: decode(x[..., :8, :8]))
    assert Examination(teacher, 250).distance is None


class Doubled:
    """A first stage whose pictures are twice as wide and high as its states."""

    def picture(self, height: int, width: int) -> tuple[int, int, int]:
        return 2 * height, 2 * width, 1

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures[..., ::2, ::2]

    def decode(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def test_validation_looks_at_pictures_where_the_states_are_latents() -> None:
    model = tiny_model()
    of_states = Examination(model, 5, labels=(0, 1)).reference
    examine = Examination(replace(model, first_stage=Doubled()), 5, labels=(0, 1))
    assert np.array_equal(examine.reference, of_states.repeat(2, 1).repeat(2, 2))
    assert examine.reference.shape == (5, 16, 16, 1)


# --- students ---------------------------------------------------------------------------------


def test_the_student_is_a_model_folder_with_its_sampler(tmp_path: Path) -> None:
    student = run_tiny(tmp_path, name="quick")
    card = student.card
    assert (card.name, card.kind, list(card.auto)) == ("quick", "unet", ["1", "2", "3", "4"])
    assert card.distilled.method == "splam"
    assert card.distilled.gamma_input == "none"
    assert card.distilled.rule == "linear"
    assert card.distilled.levels[0] == 80.0
    assert len(card.distilled.levels) == 5
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    for nfe in (1, 2, 4):
        made = fewstep.sample(student, nfe=nfe, seeds=range(3))
        assert made.nfe == made.network_calls == nfe
        assert made.provenance["solver"] == "consistency"
        grid = student_levels(card.distilled.levels, nfe)
        assert made.provenance["grid"] == list(grid)
        by_hand = fewstep.solve(
            student.denoiser(), student.prior(range(3)), "consistency", grid=grid, seeds=range(3)
        )
        assert np.array_equal(made.images, student.decode(by_hand))


def test_the_card_names_the_sampler_that_was_chosen() -> None:
    student = run_tiny(None, sampler="consistency-ode")
    assert fewstep.sample(student, nfe=2, seeds=[0]).provenance["solver"] == "ddim"
    student = run_tiny(None, sampler="consistency-kappa")
    assert {choice.solver for choice in student.card.auto.values()} == {"consistency-kappa"}
    made = fewstep.sample(student, nfe=2, seeds=[0])
    other = fewstep.sample(student, solver="consistency", nfe=2, seeds=[0])
    assert not np.array_equal(made.images, other.images)
    for sampler in ("ddpm", "ddim", "consistency-kappa:c=0.2"):
        with pytest.raises(ValueError, match="sampler must be one of consistency, consistency-ode"):
            run_tiny(None, sampler=sampler)


def test_a_sampler_by_statistics_needs_them(tmp_path: Path) -> None:
    unknown = replace(tiny_model(), stats={})
    with pytest.raises(ValueError, match=r"consistency-pca needs .* take consistency-kappa"):
        distill(unknown, pictures(), out=tmp_path / "no", sampler="consistency-pca", **TINY)
    assert not (tmp_path / "no").exists()
    student = run_tiny(tmp_path / "student", sampler="consistency-pca", validation_seeds=4)
    assert student.card.auto["2"].solver == "consistency-pca"
    assert fewstep.sample(student, nfe=2, seeds=[0]).nfe == 2
    assert {"rmse_2", "rmse_ode_2", "rmse_pca_2"} <= student.card.about["validation"].keys()


def test_other_solvers_sample_a_student_on_its_own_levels(tmp_path: Path) -> None:
    student = run_tiny(tmp_path)
    made = fewstep.sample(student, solver="consistency-ode", nfe=2, seeds=range(2))
    assert made.provenance["grid"] == list(student.card.auto["2"].grid)
    with pytest.raises(ValueError, match="has levels for 1, 2, 3, 4 evaluations, not for 7"):
        fewstep.sample(student, nfe=7, seeds=range(2))


def test_a_student_that_is_told_the_scale_takes_it_at_no_second_pass() -> None:
    student: NetworkModel = run_tiny(None, guidance=(1.0, 5.0))
    made = {
        w: fewstep.sample(student, nfe=2, seeds=range(2), label=1, guidance=w) for w in (2.0, 4.0)
    }
    assert all(samples.network_calls == 2 for samples in made.values())
    told = torch.tensor([[3.0]])
    x, sigma = student.prior([0]), torch.tensor([80.0])
    given = student.net((x / 80), sigma.log() / 4, torch.tensor([1]), told=told)
    plain = student.net((x / 80), sigma.log() / 4, torch.tensor([1]))
    assert not torch.equal(given, plain)


def test_the_teacher_is_left_as_it_is() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    student: Any = distill(model, pictures(), validation_seeds=0, **TINY)
    assert all(torch.equal(before[n], v) for n, v in model.net.state_dict().items())
    assert not any(p.requires_grad for p in student.net.parameters())
    with pytest.raises(ValueError, match="distilled already"):
        distill(student, pictures(), validation_seeds=0, **TINY)


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"method": "splat"}, "method must be one of splam, lcm, trajectory, got 'splat'"),
        ({"loss": "l1"}, "loss must be huber, l2, decoder, or a feature network"),
        ({"rule": "cubic"}, "rule must be one of linear, variance, got"),
        ({"method": "lcm", "gamma_one": 0.5}, "gamma_one=0.5 has no effect with method lcm"),
        ({"method": "lcm", "rule": "linear"}, "rule=linear has no effect with method lcm"),
        ({"method": "lcm", "tell": "level"}, "tell=level has no effect with method lcm"),
        ({"tell": "time"}, "tell must be one of gamma, level, got 'time'"),
        ({"gamma_one": 1.5}, "gamma_one must be between 0 and 1, got 1.5"),
        ({"guidance": (5.0, 2.0)}, "guidance must be a scale >= 0, or two that rise"),
        ({"points": 1}, "points must be at least 2, got 1"),
        ({"target_decay": 1.0}, "target_decay must be at least 0 and below 1"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"teacher": "dddim"}, "no solver called 'dddim'"),
        ({"grid": "trailing"}, "trailing"),
        ({"steps": 5}, "distill has no setting 'steps'; it has: method, points"),
        ({"validate_every": 0}, "validate_every must be an integer, at least 1"),
        ({"accumulate": 9}, "accumulate must be from 1 to batch, got 9"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as caught:
        run_tiny(None, **settings)
    assert "\n" not in str(caught.value)


def test_data_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    images, labels = pictures()
    for data, words in (
        ((images[..., :4], labels), r"shape \(1, 8, 4\), tiny takes \(1, 8, 8\)"),
        ((images, labels + 1), "labels must lie below the 3 classes of tiny, got 1 to 3"),
        ((images.float(), labels), "images must be uint8"),
        ((images, labels[:5]), "labels must be 40 integers"),
        (tmp_path, "has no pictures"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            distill(tiny_model(), data, **TINY)


def test_a_loss_that_is_not_finite_stops_the_run_and_what_was_saved_stays(tmp_path: Path) -> None:
    def spoil(progress: Any) -> None:
        if progress.step == 3:
            monkey.setattr(
                "fewstep.distillation.losses.on_line", lambda x_s, x_t, g: x_t * torch.nan
            )

    with pytest.MonkeyPatch.context() as monkey:
        words = "the loss is nan and its gradient nan at step 4; the last checkpoint stays"
        with pytest.raises(FloatingPointError, match=words):
            run_tiny(tmp_path, report=spoil)
    assert step_of(tmp_path) == 3
    assert torch.isfinite(weights(tmp_path)).all()
    run_tiny(tmp_path)  # goes on from there


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    def fill(progress: Any) -> None:
        if progress.step == 2:
            monkey.setattr(os, "fsync", full)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as monkey, pytest.raises(OSError, match="No space left"):
        run_tiny(tmp_path, report=fill)
    assert step_of(tmp_path) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


# --- the command ------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model, data, and a place for the student."""
    model, (images, labels) = tiny_model(), pictures()
    from fewstep.models.formats.native import save_folder

    save_folder(tmp_path / "model", model.card, model.net, model.stats)
    (tmp_path / "data").mkdir()
    write_idx(tmp_path / "data" / "train-images-idx3-ubyte", images[:, 0].numpy())
    write_idx(tmp_path / "data" / "train-labels-idx1-ubyte", labels.numpy().astype(np.uint8))
    return tmp_path / "model", tmp_path / "data", tmp_path / "student"


def command(folders: tuple[Path, Path, Path], *more: str) -> list[str]:
    model, data, out = folders
    small = ["--pictures", "48", "--batch", "8", "--points", "5", "--dtype", "float32"]
    often = ["--checkpoint-every", "1", "--validation-seeds", "2", "--validate-every", "4"]
    paths = [str(model), "--data", str(data), "--out", str(out)]
    return ["-m", "fewstep", "distill", "splam", *paths, *small, *often, *more]


def run(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(args, capture_output=True, text=True, env=env, timeout=300, **options)


@pytest.mark.slow
def test_from_the_command_line_to_pictures(folders: tuple[Path, Path, Path]) -> None:
    done = run(sys.executable, *command(folders, "--method", "lcm", "--guidance", "1,4"))
    assert done.returncode == 0, done.stderr
    student = fewstep.load(folders[2])
    assert student.card.distilled is not None
    assert student.card.distilled.method == "lcm"
    assert student.card.distilled.guidance == (1.0, 4.0)
    assert student.card.name == "tiny-lcm"
    assert fewstep.sample(student, nfe=4, seeds=[0], label="a", guidance=2.0).nfe == 4
    again = run(sys.executable, *command(folders, "--method", "lcm", "--guidance", "x"))
    assert again.returncode == 2
    assert again.stderr == "fewstep: guidance is one scale or two, like 4 or 2,8, got 'x'\n"


@pytest.mark.slow
def test_a_student_stands_beside_solvers_on_its_teacher(
    folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, against plain sampling: errors to the teacher's reference solves."""
    model_folder, _, out = folders
    model = fewstep.load(model_folder)
    for name, scale in (("kid", None), ("guided", 3.0)):
        settings: dict[str, Any] = {**TINY, "guidance": scale, "validation_seeds": 0}
        distill(model, pictures(), out=tmp_path / name, **settings)
    names = f"ddim,{tmp_path / 'kid'},{tmp_path / 'guided'}"
    quick = ["--seeds", "0-3", "--features", "none", "--screen", "2", "--reference-nfe", "40"]
    paths = ["--out", str(out), "--cache", str(tmp_path / "cache"), "--no-plots", "--json"]

    def compare(target: Path | str, *more: str) -> tuple[int, str, str]:
        usual = ["--nfe", "1,2,6", "--population", "10", *quick, *paths]
        monkeypatch.setattr(sys, "argv", ["fewstep", "compare", str(target), *usual, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    code, out_text, _ = compare(model_folder, "--solvers", names)
    assert code == 0
    record = json.loads(out_text)
    rows = {(Path(row["sampler"]).name, row["nfe"]): row for row in record["rows"]}
    assert set(rows) == {(name, n) for name in ("ddim", "kid", "guided") for n in (1, 2, 6)} - {
        ("kid", 6), ("guided", 6),
    }  # fmt: skip
    assert (
        "has levels for 1, 2, 3, 4 evaluations, not for 6"
        in record["left_out"][f"{tmp_path / 'kid'}@6"]
    )
    student = fewstep.load(tmp_path / "kid")
    x_T = student.prior(range(4))
    fine = fewstep.solve(model.denoiser(), x_T, "deis-4", 40, grid="karras")
    fine = model.denoiser()(fine, torch.full((4,), 0.002))
    for nfe in (1, 2):
        row = rows["kid", nfe]
        sampler = row["solver"]
        assert row["stochastic"] == (sampler == "consistency" and nfe > 1)
        assert student.card.distilled is not None
        grid = student_levels(student.card.distilled.levels, nfe)
        x = fewstep.solve(student.denoiser(), x_T, sampler, grid=grid, seeds=range(4))
        error = (x - fine).double().square().flatten(1).mean(1).sqrt().mean().item()
        assert row["error"] == pytest.approx(error, abs=1e-5)
        assert row["student"]["weights"] == student.card.weights_sha256
        assert row["student"]["recipe"]["seed"] == 0
    assert rows["kid", 2]["screened"] is None  # by the error there is nothing to choose
    assert "student" not in rows["ddim", 2]

    for solvers, target, words in (
        (f"ddim,{model_folder}", model_folder, "is no student, so it has no place beside"),
        (f"ddim,{tmp_path / 'kid'}", "fashion-mnist", "is distilled from tiny, so it has no place"),
        ("ddim", tmp_path / "kid", "tiny-splam is a student of tiny, which it is held to"),
    ):
        code, _, error = compare(target, "--solvers", solvers)
        assert (code, error.count("\n")) == (2, 1)
        assert words in error
    _, out_text, _ = compare(model_folder, "--solvers", names, "--label", "a")
    left_out = json.loads(out_text)["left_out"][f"{tmp_path / 'guided'}@2"]
    assert left_out.endswith("guided has guidance 3 built in, not None")


@pytest.mark.slow
def test_compiled_passes_change_rounding_alone_and_resume_to_the_bit(tmp_path: Path) -> None:
    def copy(progress: Any) -> None:
        if progress.step == 3:  # what a run killed here would leave
            shutil.copytree(tmp_path / "whole", tmp_path / "broken")

    settings = {"validation_seeds": 2, "validate_every": 2, "lr": 1e-5}
    run_tiny(tmp_path / "plain", **settings)
    run_tiny(tmp_path / "whole", compile=True, report=copy, **settings)
    run_tiny(tmp_path / "broken", compile=True, **settings)
    whole, broken = (tmp_path / name / "checkpoint.safetensors" for name in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()
    plain, compiled = (weights(tmp_path / name, "exp_avg") for name in ("plain", "whole"))
    assert 0 < (plain - compiled).abs().max() < 1e-3 * plain.abs().max()  # of the gradients


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(folders, tmp_path: Path) -> None:
    """To the bit where one process takes its batch in the same parts; else but for rounding, which
    Adam makes large where a gradient is hardly more than that, so at a low rate."""
    model, data, _ = folders
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def trained(name: str, launcher: list[str], *more: str) -> Path:
        out = tmp_path / name
        done = run(sys.executable, *launcher, *command((model, data, out), *more))
        assert done.returncode == 0, done.stderr
        return out

    def apart(one: Path, other: Path) -> float:
        kinds = ("weights", "target", "ema")
        return max(float((weights(one, k) - weights(other, k)).abs().max()) for k in kinds)

    both = trained("both", launch)
    assert apart(both, trained("parts", [], "--accumulate", "2")) == 0
    low = ("--lr", "1e-6", "--warmup", "0")
    one, two = trained("one", [], *low), trained("two", launch, *low)
    assert apart(one, two) < 1e-6

    refused = run(sys.executable, *launch, *command((model, data, both), "--lr", "1e-3"))
    assert refused.returncode != 0
    assert "is of a run with lr=0.0003 (now 0.001)" in refused.stderr
    assert "stopped with the process of rank 0, which says why" in refused.stderr
    assert "RuntimeError" not in refused.stderr
