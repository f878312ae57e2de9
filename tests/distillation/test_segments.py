"""Segments, distances in features and trajectories, beside formulas by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fewstep
from fewstep.distillation import Recipe, distill
from fewstep.distillation.levels import choose_levels, family, write_levels
from fewstep.distillation.losses import NEAREST, Levels, draw, guided, subpath_losses
from fewstep.distillation.metric import Elementwise, InFeatures, metric
from fewstep.distillation.subject import subject
from fewstep.distillation.teacher import stepper, walker
from fewstep.distillation.trajectory import trajectory_losses
from fewstep.models.students import CleanEnd, a_budget, choices, edges, phase_levels, phased
from fewstep.networks.features import load_feature_network
from fewstep.networks.unet import UNet
from fewstep.solver import get
from tests.distillation.test_distill import CONFIG, F64, one_batch, tiny_model, toy
from tests.distillation.test_pipelines import data as write_data
from tests.support import pipelines

L2 = Elementwise("l2")
SIGMAS = (8.0, 5.0, 3.0, 2.0, 1.0, 0.6, 0.3, 0.1, 0.01)


class Stub(nn.Module):
    """A student that is told the number of segments: f(x, sigma) = weight x / (1 + sigma + told)"""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=F64))

    def forward(self, x: Tensor, sigma: Tensor, told: Tensor | None) -> Tensor:
        more = torch.zeros(len(x), dtype=F64) if told is None else told[:, 0].double()
        return self.weight * x / (1 + sigma.double() + more)[:, None]


def answer(x: np.ndarray, sigma: float, more: float) -> np.ndarray:
    return 0.7 * x / (1 + sigma + more)


def teach(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma[:, None] ** 2)


def case(recipe: Recipe, tmp_path: Path) -> tuple[Any, Any, Levels]:
    """A subject, its teacher's step of ddim on SIGMAS, and the tables."""
    plan = get("ddim").plan(SIGMAS)
    (tmp_path / "teacher.json").write_text(plan.to_json())
    step = stepper(str(tmp_path / "teacher.json"), SIGMAS[0], SIGMAS[-1])
    known = toy(Stub(), teach, SIGMAS[-1], SIGMAS[0])
    return known, step, Levels.of(SIGMAS, CleanEnd(SIGMAS[-1]), recipe.segments)


@pytest.mark.parametrize("phases", [(2,), (3,), (8,), (1, 2, 4)])
@pytest.mark.parametrize("weight", [None, "edge"])
def test_the_loss_of_a_segment_by_hand(phases, weight, tmp_path: Path) -> None:
    """The target goes on to its segment's edge; the goal is the f that lands there too."""
    recipe = Recipe(phases=phases, phase_weight=weight, batch=24, loss="l2", dtype="float32")
    known, step, levels = case(recipe, tmp_path)
    drawn = draw(recipe, 1, 24, 8, (3,))
    drawn = drawn._replace(n=torch.arange(24) % 8, eps=drawn.eps.double())
    x_0 = torch.randn(24, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    ours = subpath_losses(known, Stub(), step, levels, drawn, x_0, None, recipe, L2)
    for i in range(24):
        n, g = int(drawn.n[i]), float(drawn.gamma[i])
        count = phases[int(drawn.phases[i])]
        more = math.log2(count) if len(phases) > 1 else 0.0
        marks = [k * 8 // count for k in range(1, count + 1)]
        last = min(mark for mark in marks if mark > n)
        t, s, b = SIGMAS[n], SIGMAS[n + 1], SIGMAS[last] if last < 8 else 0.0
        x_t = x_0[i].numpy() + t * drawn.eps[i].numpy()
        x_s = s / t * x_t + (1 - s / t) * x_t / (1 + t * t)
        f_s = x_s if n == 7 else answer(x_s, s, more)
        landed = b / s * x_s + (1 - b / s) * f_s
        x, level = (1 - g) * x_s + g * x_t, (1 - g) * s + g * t
        goal = (landed - b / level * x) / (1 - b / level)
        wanted = np.mean((answer(x, level, more) - goal) ** 2)
        assert ours[i].item() == pytest.approx(wanted * (1 - b / level if weight else 1), rel=1e-6)


def test_one_segment_is_the_whole_path_to_the_bit() -> None:
    model = tiny_model()
    known, step = subject(model, (), 0), stepper("ddim", 80.0, 0.002, points=6, substeps=1)
    x_0 = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for phases in (None, 1, (1,)):
        recipe = Recipe(phases=phases, batch=16)
        levels = Levels.of(step.levels, known.boundary, recipe.segments)
        drawn = one_batch(recipe, 5, (1, 8, 8))
        target = UNet(CONFIG).requires_grad_(False)
        target.load_state_dict(known.student.state_dict())
        label = torch.full((16,), 3)
        found.append(subpath_losses(known, target, step, levels, drawn, x_0, label, recipe, L2))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_on_a_gaussian_the_right_student_has_no_loss_in_any_segment() -> None:
    """The point of the path at the edge, in closed form, beside a teacher of many steps."""
    c = 0.5

    class Right(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones((), dtype=F64))

        def forward(self, x: Tensor, sigma: Tensor, told: Any) -> Tensor:
            t = sigma.double()
            row = torch.tensor([edge_of(float(one)) for one in t], dtype=F64)
            factor = ((c**2 + row**2) / (c**2 + t**2)).sqrt()
            return self.one * ((factor - row / t) / (1 - row / t))[:, None] * x

    sigmas = fewstep.grid.karras(9, 20.0, 0.001)
    marks = edges(9, 4)

    def edge_of(t: float) -> float:
        below = [sigmas[m] for m in marks if sigmas[m] < t * (1 - 1e-6)]
        return below[0] if below and below[0] > sigmas[-1] else 0.0

    recipe = Recipe(method="lcm", phases=4, batch=64, loss="l2", dtype="float32")
    teacher = lambda x, sigma: x * c**2 / (c**2 + sigma[:, None].double() ** 2)  # noqa: E731
    known = toy(Right(), teacher, sigmas[-1], sigmas[0])
    step = stepper("heun", sigmas[0], sigmas[-1], points=9, grid="karras", substeps=64)
    levels = Levels.of(step.levels, CleanEnd(sigmas[-1]), (4,))
    drawn = draw(recipe, 0, 64, 8, (2,))
    drawn = drawn._replace(eps=drawn.eps.double())
    x_0 = c * torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    losses = subpath_losses(known, Right(), step, levels, drawn, x_0, None, recipe, L2)
    assert losses.max().sqrt() < 2e-3  # float32 of x_0's neighbours, and the end at 0.001
    whole = Levels.of(step.levels, CleanEnd(sigmas[-1]), (2,))  # other edges are another student
    other = subpath_losses(known, Right(), step, whole, drawn, x_0, None, recipe, L2)
    assert other.max().sqrt() > 0.05


def test_edges_are_even_and_the_last_is_the_end() -> None:
    assert edges(17, 1) == (16,)
    assert edges(17, 4) == (4, 8, 12, 16)
    assert edges(11, 4) == (2, 5, 7, 10)
    with pytest.raises(ValueError, match="phases must be from 1 to the 4 sub-paths, got 5"):
        edges(5, 5)


@pytest.mark.parametrize("points", [9, 11, 17, 51])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_levels_of_a_budget_hold_the_edges(points: int, count: int) -> None:
    levels = fewstep.grid.karras(points, 80.0, 0.002)
    starts = {levels[0], *(levels[i] for i in edges(points, count)[:-1])}
    for nfe in range(count, 9):
        spent = [nfe // count + (k >= count - nfe % count) for k in range(count)]
        room = [b - a for a, b in pairwise((0, *edges(points, count)))]
        if any(n > most for n, most in zip(spent, room, strict=True)):
            with pytest.raises(ValueError, match="sub-paths takes up to"):
                phase_levels(levels, nfe, count)
            continue
        found = phase_levels(levels, nfe, count)
        assert len(found) == nfe + 1
        assert found[-1] == 0
        assert starts <= set(found)
        assert all(a > b for a, b in pairwise(found))


def test_the_card_spends_each_budget_in_as_many_segments_as_it_can() -> None:
    levels = fewstep.grid.karras(17, 80.0, 0.002)
    several = choices(levels, "consistency-ode", (1, 2, 4, 8))
    assert [several[str(nfe)].phases for nfe in range(1, 9)] == [1, 2, 2, 4, 4, 4, 4, 8]
    one = choices(levels, "consistency-ode", (4,))
    assert list(one) == ["4", "5", "6", "7", "8"]
    assert one["4"].phases is None  # it is told nothing
    assert choices(levels, "consistency", (1,)) == choices(levels, "consistency")


def small(out: Path | None, **settings: Any) -> Any:
    """A run of a few steps on the tiny model."""
    images = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(5))
    data = (images.to(torch.uint8), torch.arange(20) % 3)
    usual = {"pictures": 24, "batch": 8, "dtype": "float32", "lr": 1e-2, "validation_seeds": 0}
    given = {**usual, **settings}
    return distill(tiny_model(), given.pop("data", data), out=out, **given)


def test_a_student_in_segments_is_told_how_many(tmp_path: Path) -> None:
    student = small(tmp_path / "several", phases=(1, 2, 4))
    assert student.card.told == ("phases",)
    assert student.card.distilled.phases == (1, 2, 4)
    assert {choice.solver for choice in student.card.auto.values()} == {"consistency-ode"}
    made = {nfe: fewstep.sample(student, nfe=nfe, seeds=[3, 4]) for nfe in (1, 2, 3, 4)}
    assert [made[nfe].provenance["phases"] for nfe in made] == [1, 2, 2, 4]
    x = student.prior([3, 4])
    for nfe in (2, 4):  # by hand, from edge to edge
        levels = student.card.auto[str(nfe)].grid
        with torch.no_grad():
            z = x
            for t, s in pairwise(levels):
                rows = torch.full((2,), 3)
                told = torch.full((2, 1), math.log2(nfe))
                from fewstep.networks.preconditioning import denoise

                net = lambda *args, told=told: student.net(*args, told=told)  # noqa: E731
                d = denoise(net, z, torch.full((2,), t), rows, student.card.sigma_data)
                z = s / t * z + (1 - s / t) * d
        found = fewstep.sample(student, nfe=nfe, seeds=[3, 4]).images
        assert np.abs(student.decode(z).astype(int) - found.astype(int)).max() <= 1
    other = replace(phased(student, 4), phases=1)
    sigma = torch.full((2,), 80.0)
    assert not torch.equal(phased(student, 4).denoiser()(x, sigma), other.denoiser()(x, sigma))


def test_one_number_of_segments_needs_no_input(tmp_path: Path) -> None:
    student = small(tmp_path / "one", phases=4)
    assert student.card.told == ()
    assert list(student.card.auto) == ["4", "5", "6", "7", "8"]
    assert list(family(student.card, 4)) == ["segments=4"]
    assert family(student.card, 2) == {}
    assert len(student.card.distilled.levels) == 13  # 12 sub-paths, which 4 segments divide
    assert fewstep.sample(student, nfe=4, seeds=[1]).nfe == 4
    with pytest.raises(ValueError, match="has levels for 4, 5, 6, 7, 8 evaluations, not for 2"):
        fewstep.sample(student, nfe=2, seeds=[1])


def test_the_number_of_segments_of_a_budget_is_chosen(tmp_path: Path) -> None:
    """By a distance to the teacher; the card tells the network so."""
    out = tmp_path / "several"
    student = small(out, phases=(1, 2, 4))
    flat = lambda images: images.flatten(1)  # noqa: E731
    how = {"seeds": 250, "features": flat}
    told: list[Any] = []
    tries = choose_levels(student, tiny_model(), budgets=[2, 4], report=told.append, **how)
    assert [(one.nfe, one.name, one.phases) for one in told] == [
        *((2, f"segments={k}", k) for k in (1, 2)),
        *((4, f"segments={k}", k) for k in (1, 2, 4)),
    ]
    assert all(
        one.levels == phase_levels(student.card.distilled.levels, one.nfe, one.phases or 0)
        for one in tries
    )
    other = replace(tries[2], excess=-1.0)  # one segment at 4 evaluations
    card = write_levels(out, student.card, [*tries[3:], other], {})
    assert card.auto["4"].phases == 1
    again = fewstep.load(out)
    made = fewstep.sample(again, nfe=4, seeds=[0])
    assert made.provenance["phases"] == 1
    one = replace(phased(again, 4), phases=1)
    x = fewstep.solve(one.denoiser(), one.prior([0]), "consistency-ode", grid=other.levels)
    assert np.array_equal(one.decode(x), made.images)
    with pytest.raises(ValueError, match="in segments has consistency-ode"):
        choose_levels(student, tiny_model(), samplers=["consistency"], **how)


def test_a_student_in_segments_stands_beside_others_at_its_budgets(tmp_path: Path) -> None:
    from fewstep.evaluate.compare.bench import Workbench
    from fewstep.evaluate.references import References
    from fewstep.sampling.choose import choose
    from fewstep.sampling.settings import Settings

    student = small(tmp_path / "several", phases=(1, 2))
    with torch.no_grad():  # so that what it is told moves the first evaluation, which is remembered
        for weight in student.net.embed_told.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    bench = Workbench(student, References(tiny_model(), batch=4), tmp_path / "runs")
    for nfe in (1, 2):
        run = bench.run(choose(student, Settings("auto", nfe)), [0, 1, 2])
        assert np.array_equal(run.images, fewstep.sample(student, nfe=nfe, seeds=[0, 1, 2]).images)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"phases": (4, 2)}, "phases must be numbers that rise, got"),
        ({"phases": (0, 2)}, "phases must be from 1 to 64"),
        ({"phases": 2, "tell": "gamma"}, "phases go with tell level"),
        ({"phase_weight": "edge"}, "phase_weight has no effect without phases"),
        ({"phase_weight": "far", "phases": 2}, "phase_weight must be one of clean, edge"),
        ({"phases": 30, "points": 9}, "phases must be from 1 to the 8 sub-paths, got 30"),
        ({"phases": 2, "sampler": "consistency"}, "in segments has consistency-ode"),
        ({"end_to_end": True}, "end_to_end is of method trajectory, not of splam"),
        (
            {"method": "trajectory", "end_to_end": True, "phases": 2, "phase_weight": "edge"},
            "phase_weight has no effect end to end",
        ),
        ({"method": "trajectory", "gamma_one": 0.5}, "no effect with method trajectory"),
        ({"method": "trajectory", "target_decay": 0.5}, "target_decay has no effect with method"),
        ({"method": "trajectory"}, "starts from noise; give none for the data"),
        (
            {"method": "trajectory", "end_to_end": True, "accumulate": 2, "loss": "fashion-a"},
            "takes the means of the whole batch at once; leave accumulate",
        ),
        ({"phases": tuple(range(1, 65))}, "phases must divide a grid of at most 1024 sub-paths"),
        ({"phases": 4.0}, "phases must be a whole number, got 4.0"),
        ({"phases": True}, "phases must be a whole number, got True"),
        ({"phases": (1, "2")}, "phases must be a whole number, got '2'"),
        ({"phases": "4"}, "phases must be a whole number, got '4'"),
        ({"start": 3}, "start must be text, got 3"),
        ({"loss": 3}, "loss must be text, got 3"),
        ({"teacher": 3}, "teacher must be text, got 3"),
        ({"data": None}, "only method trajectory needs none"),
        ({"loss": "vgg"}, "or a feature network by name or folder; there is no feature network"),
        ({"loss": "fashion-a"}, "loss fashion-a does not go with"),
        ({"loss": "decoder"}, "has no decoder of latents"),
        ({"start": "fashion-mnist"}, "is no student of"),
    ],
)
def test_what_does_not_go_together_is_one_line(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        small(None, **settings)
    assert "\n" not in str(caught.value)


# --- features -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, inputs, maps", [("fashion-a", 1, 3), ("fashion-b", 1, 2)])
def test_the_scales_of_a_feature_network_end_in_its_features(name, inputs, maps) -> None:
    network = load_feature_network(name)
    x = torch.rand(3, inputs, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    *found, last = network.scales(x)
    assert torch.equal(last, network(x))
    assert len(found) == maps
    assert all(one.shape[0] == 3 and one.ndim == 4 for one in found)


def test_a_distance_in_features_sees_what_pixels_do_not() -> None:
    """A blurred picture is as near in pixels as one with grain, and further in features."""
    model = fewstep.load("fashion-mnist")
    distance, pixels = metric("fashion-a", model), metric("huber", model)
    assert isinstance(distance, InFeatures)
    goal = fewstep.solve(model.denoiser(), model.prior(range(4)), solver="dpmpp-2m", nfe=8)
    assert distance(goal, goal).max() < 1e-3
    soft = torch.nn.functional.avg_pool2d(goal, 3, 1, 1)
    gen = torch.Generator().manual_seed(0)
    grain = torch.randn(goal.shape, generator=gen)
    grain = goal + grain * ((soft - goal).square().mean() / grain.square().mean()).sqrt()
    for one in (soft, grain):
        x = one.clone().requires_grad_(True)
        distance(x, goal).sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        assert x.grad.abs().max() > 0
    assert pixels(soft, goal).mean() < 1.5 * pixels(grain, goal).mean()
    gap = distance(soft, goal) - pixels(soft, goal)
    assert (gap > 0.01).all()


def test_of_ends_the_means_of_the_batch_count_too() -> None:
    """Beside the distance of each picture, those of the last maps alone, once for the batch."""
    maps = lambda x: [torch.cat((x, x * x), 1), (x + x**3).mean((2, 3))]  # noqa: E731
    gen = torch.Generator().manual_seed(0)
    goal = torch.randn(6, 2, 4, 4, generator=gen)
    estimate = 0.8 * goal + 0.1 * torch.randn(goal.shape, generator=gen)
    distance = InFeatures(maps)
    more = distance.of_ends(estimate, goal) - distance(estimate, goal)
    gap = (maps(estimate)[-1] - maps(goal)[-1]).mean(0)
    assert more.numpy() == pytest.approx(0.2 * math.sqrt(float(gap.square().mean())), rel=1e-3)
    again = distance.of_ends(goal.flip(0), goal) - distance(goal.flip(0), goal)
    assert again.max() < 1e-3 < more.min()  # the same pictures have the same means


# --- trajectories -------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, "edge"])
def test_the_steps_of_a_trajectory_by_hand(weight, tmp_path: Path) -> None:
    recipe = Recipe(
        method="trajectory", phases=(1, 4), phase_weight=weight, batch=5, loss="l2", dtype="float32"
    )
    known, step, levels = case(recipe, tmp_path)
    drawn = draw(recipe, 0, 5, 8, (3,))
    drawn = drawn._replace(eps=drawn.eps.double())
    losses = list(trajectory_losses(known, step, levels, drawn, None, recipe, L2))
    assert len(losses) == 5
    states = [8.0 * drawn.eps.numpy()]
    for t, s in pairwise(SIGMAS):
        x = states[-1]
        states.append(s / t * x + (1 - s / t) * x / (1 + t * t))
    wanted = []
    for count in (1, 4):
        x, marks = states[0], [k * 8 // count for k in range(count + 1)]
        for start, end in pairwise(marks):
            t, b = SIGMAS[start], SIGMAS[end] if end < 8 else 0.0
            f = answer(x, t, math.log2(count))
            goal = (states[end] - b / t * x) / (1 - b / t)
            wanted.append(((f - goal) ** 2).mean(1) / 5 * (1 - b / t if weight else 1))
            x = b / t * x + (1 - b / t) * f
    for ours, theirs in zip(losses, wanted, strict=True):
        assert np.allclose(ours.detach().numpy(), theirs, rtol=1e-5)


def test_between_the_steps_of_a_trajectory_no_gradient_passes(tmp_path: Path) -> None:
    """And end to end it does: the derivative of the loss by a difference."""
    for end_to_end in (False, True):
        recipe = Recipe(
            method="trajectory",
            phases=4,
            end_to_end=end_to_end,
            batch=4,
            loss="l2",
            dtype="float32",
        )
        known, step, levels = case(recipe, tmp_path)
        drawn = draw(recipe, 0, 4, 8, (3,))
        drawn = drawn._replace(eps=drawn.eps.double())

        def last() -> Tensor:
            *_, loss = trajectory_losses(known, step, levels, drawn, None, recipe, L2)  # noqa: B023
            return loss.sum()

        weight = known.student.weight
        (slope,) = torch.autograd.grad(last(), weight)
        values = []
        for way in (1e-5, -2e-5):
            with torch.no_grad():
                weight += way
                values.append(float(last()))
        change = (values[0] - values[1]) / 2e-5
        assert (abs(change - slope) < 1e-4 * abs(slope)) == end_to_end


def test_trajectories_need_no_data_and_start_where_a_student_stands(tmp_path: Path) -> None:
    first = small(tmp_path / "first", phases=(1, 2))
    how = {"method": "trajectory", "phases": (1, 2), "data": None, "start": str(tmp_path / "first")}
    second = small(tmp_path / "second", **how, lr=1e-9, end_to_end=True)
    for a, b in zip(first.net.parameters(), second.net.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-3 * max(1.0, float(a.abs().max()))  # float16 in between
    assert second.card.distilled.method == "trajectory"
    small(tmp_path / "third", **how)
    assert fewstep.sample(fewstep.load(tmp_path / "third"), nfe=2, seeds=[0]).nfe == 2
    plain = small(tmp_path / "plain", method="trajectory", data=None)
    assert plain.card.auto["2"].solver == "consistency"  # one segment, gone on from with noise


def test_a_trajectory_has_a_teacher_whose_steps_look_back(tmp_path: Path) -> None:
    """A multistep plan, as that of a learned table: on random sub-paths it is refused."""
    levels = (80.0, 9.0, 2.0, 0.5, 0.002)
    plan = fewstep.solver.get("ipndm-3").plan(levels)
    (tmp_path / "teacher.json").write_text(plan.to_json())
    teacher = str(tmp_path / "teacher.json")
    found = walker(teacher, sigma_max=80.0, sigma_min=0.002)
    denoiser = lambda x, sigma: x / (1 + sigma[:, None] ** 2)  # noqa: E731
    x_T = 80 * torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    states = found.states(denoiser, x_T)
    assert torch.equal(states[-1], fewstep.solve(denoiser, x_T, plan))
    short = fewstep.solver.get("ipndm-3").plan(levels[:3])
    assert torch.equal(states[2], fewstep.solve(denoiser, x_T, short))
    how = {"teacher": teacher, "phases": (1, 2, 4)}
    student = small(tmp_path / "student", method="trajectory", data=None, **how)
    assert student.card.auto["4"].grid == (80.0, 9.0, 2.0, 0.5, 0.0)
    assert student.card.distilled.teacher_step == "teacher.json, 4 evaluations"
    with pytest.raises(ValueError, match=r"looks back .* method trajectory"):
        small(tmp_path / "no", **how)
    with pytest.raises(ValueError, match="has its own grid"):
        small(tmp_path / "no", method="trajectory", data=None, points=5, **how)


def test_a_teacher_may_start_from_the_mean_of_the_network(tmp_path: Path) -> None:
    """As the tables that ship do; guided, that mean is guided too."""
    model = tiny_model()
    model.stats["far_mean"].copy_(torch.arange(4.0)[:, None, None, None].expand(4, 1, 8, 8))
    known, rows = subject(model, (), 0), torch.tensor([2, 0])
    alone = guided(known, rows, torch.ones(2), Recipe())
    assert torch.equal(alone.far_mean, model.stats["far_mean"][rows])
    both = guided(known, rows, torch.full((2,), 3.0), Recipe(guidance=3.0))
    assert both.far_mean[:, 0, 0, 0].tolist() == [3 + 3 * (2 - 3), 3 + 3 * (0 - 3)]
    plan = fewstep.solver.get("ipndm-2").plan((80.0, 9.0, 2.0, 0.5, 0.002), afs="mean")
    (tmp_path / "teacher.json").write_text(plan.to_json())
    how = {"teacher": str(tmp_path / "teacher.json"), "phases": (1, 2)}
    student = small(None, method="trajectory", data=None, **how)
    assert fewstep.sample(student, nfe=2, seeds=[0]).nfe == 2


def test_a_trajectory_has_no_target_and_no_pictures(tmp_path: Path) -> None:
    how = {"method": "trajectory", "data": None, "phases": (1, 2)}
    student = small(tmp_path / "a", **how)
    assert student.card.about["data"] == {"pictures": 0, "sha256": "noise alone"}
    kept = safetensors.torch.load_file(tmp_path / "a" / "checkpoint.safetensors")
    assert any(name.startswith("weights.") for name in kept)
    assert not any(name.startswith("target.") for name in kept)


def test_a_start_may_move_and_must_be_told_in_the_same_order(tmp_path: Path) -> None:
    """What a network is told is known by its place, so no other order is taken."""
    small(tmp_path / "first", phases=(1, 2))
    how = {"phases": (1, 2), "start": str(tmp_path / "first")}
    small(tmp_path / "second", **how)
    before = (tmp_path / "second" / "checkpoint.safetensors").read_bytes()
    (tmp_path / "first").rename(tmp_path / "moved")
    small(tmp_path / "second", **{**how, "start": str(tmp_path / "moved")})
    assert (tmp_path / "second" / "checkpoint.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=r"told phases, and this student guidance, phases"):
        small(tmp_path / "no", **{**how, "start": str(tmp_path / "moved")}, guidance=(1.0, 3.0))
    small(tmp_path / "ranged", guidance=(1.0, 3.0))
    more = {"phases": (1, 2), "start": str(tmp_path / "ranged"), "guidance": (1.0, 3.0)}
    student = small(tmp_path / "more", **more, lr=1e-9)
    start = student.card.about["start"]
    first: Any = fewstep.load(tmp_path / "ranged")
    assert start["weights"] == first.card.weights_sha256
    assert start["recipe"]["guidance"] == [1.0, 3.0]
    assert str(tmp_path) not in (tmp_path / "more" / "card.json").read_text()
    for name, weight in first.net.state_dict().items():
        assert torch.allclose(weight, student.net.state_dict()[name], atol=1e-3), name


def test_what_leads_beyond_an_edge_is_refused(tmp_path: Path) -> None:
    student = small(tmp_path / "several", phases=(1, 2))
    half = student.card.auto["2"].grid[1]
    made = fewstep.sample(student, nfe=2, seeds=[0])
    again = fewstep.sample(student, grid=(80.0, half, 0.0), solver="consistency-ode", seeds=[0])
    assert np.array_equal(made.images, again.images)
    inside = fewstep.sample(student, grid=(80.0, 2 * half, half, 0.0), seeds=[0])
    assert inside.nfe == 3
    with pytest.raises(ValueError, match=f"to the edge {half:g}, and not to"):
        fewstep.sample(student, grid=(80.0, half / 2, 0.0), seeds=[0])
    with pytest.raises(
        ValueError, match="whose edges are levels of its own; leave grid karras out"
    ):
        fewstep.sample(student, grid="karras", nfe=2, seeds=[0])
    for solver in ("consistency", "dpmpp-2m", "consistency-kappa"):
        with pytest.raises(ValueError, match="from edge to edge, which is sampler consistency-ode"):
            fewstep.sample(student, solver=solver, nfe=2, seeds=[0])


def test_the_budget_to_try_a_student_with_is_one_that_it_has(tmp_path: Path) -> None:
    for phases, budget in ((8, 8), (2, 4), ((1, 2), 4)):
        student = small(None, phases=phases)
        assert a_budget(student.card) == budget
        assert fewstep.sample(student, nfe=budget, seeds=[0]).nfe == budget
    card = replace(student.card, auto={"1": student.card.auto["1"]})
    assert a_budget(card) == 1


def test_nearer_to_an_edge_than_a_twentieth_nothing_is_drawn() -> None:
    assert float(draw(Recipe(phases=2, gamma_one=0.0, batch=512), 0, 512, 8, ()).gamma.min()) == (
        NEAREST
    )
    assert float(draw(Recipe(gamma_one=0.0, batch=512), 0, 512, 8, ()).gamma.min()) < NEAREST


# --- pipelines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"phases": (1, 2), "loss": "decoder"},
        {"phases": 2, "train": "lora", "rank": 2},
        {"phases": (1, 2), "method": "trajectory", "guidance": 3.0, "points": 5},
    ],
)
def test_pipelines_have_students_in_segments_too(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    loaded = fewstep.load(pipelines.saved("sd", tmp_path / "sd"))
    quick = {"pictures": 4, "batch": 2, "dtype": "float32", "validation_seeds": 0}
    out = tmp_path / "out"
    student = distill(loaded, write_data(tmp_path / "data"), out=out, **quick, **settings)
    several = isinstance(settings["phases"], tuple)
    assert student.card.told == (("phases",) if several else ())
    assert "1" in student.card.auto if several else "1" not in student.card.auto
    made = fewstep.sample(student, nfe=2, seeds=[3], prompt="a cat")
    assert made.network_calls == 2
    if several:
        again = fewstep.sample(fewstep.load(out), nfe=2, seeds=[3], prompt="a cat")
        assert again.provenance["phases"] == 2
        preset = json.loads((out / "preset.json").read_text())
        assert preset["budgets"]["2"]["phases"] == 2
        assert preset["budgets"]["2"]["guidance_scale"] == 2.0  # 1 + log2 of the number
        assert preset["diffusers"] == {"scheduler": "FewstepScheduler"}  # LCM's draws noise
        index = json.loads((out / "model_index.json").read_text())
        assert index["scheduler"][1] == "DDIMScheduler"
        assert np.array_equal(again.images, made.images)
        with pytest.raises(ValueError, match="leave guidance out"):
            fewstep.sample(student, nfe=2, seeds=[3], prompt="a cat", guidance=4.0)


def test_the_decoder_sees_latents_at_its_own_scale(tmp_path: Path) -> None:
    """With a mean and a standard deviation of each channel in its configuration too."""
    model: Any = fewstep.load(pipelines.saved("sd", tmp_path / "sd"))
    seen: list[Tensor] = []
    conv = model.autoencoder.decoder.conv_in
    conv.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for statistics in (
        {},
        {"latents_mean": [0.5, -1.0, 0.2, 3.0], "latents_std": [2.0, 1, 0.5, 4]},
    ):
        model.autoencoder.register_to_config(**statistics)
        distance = metric("decoder", model)
        assert isinstance(distance, InFeatures)
        with torch.no_grad():
            distance.maps(x)
            model.pictures(x)
        ours, theirs = seen[-2:]
        torch.testing.assert_close(ours, theirs)


def test_a_table_over_a_student_in_segments_is_trained_at_its_budget(tmp_path: Path) -> None:
    from fewstep.learned.on_model import train_on_model

    student = small(tmp_path / "several", phases=(1, 2))
    quick = {"trajectories": 8, "batch": 4, "validation_seeds": 4, "fallback": False}
    table = train_on_model(student, teacher_model=tiny_model(), nfe=2, out=tmp_path / "t", **quick)
    assert table.model["settings"]["phases"] == 2
    assert table.method.base == "consistency-ode"
    made = fewstep.sample(student, solver=table, seeds=[1])
    assert made.provenance["phases"] == 2
