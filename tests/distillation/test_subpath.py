"""Sub-paths, their boundary and rules, gamma's way into a network, the teacher's step, and the
sampling of students."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.distillation import recipe, student_levels
from fewstep.distillation.subpath import LOSSES, RULES, on_line
from fewstep.distillation.teacher import stepper
from fewstep.grid import make_grid
from fewstep.models.students import CleanEnd, Consistency, DiscreteEnd, consistency, x0_hat
from fewstep.networks.conditioning import (
    Told,
    gamma_index,
    guidance_embedding,
    guidance_index,
    indices,
)
from fewstep.networks.preconditioning import denoise
from fewstep.networks.unet import UNet
from fewstep.networks.unet_config import UNetConfig
from fewstep.noise import normal
from fewstep.sampling.choose import draws_noise, plan_for
from fewstep.sampling.settings import Filled, Settings
from fewstep.schedule import VP
from fewstep.solver import get, names
from tests.support.testbed import ODE_SOLVERS, Mixture, noise

F64 = torch.float64
TABLE = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # abar of SD


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def full(value: float, b: int = 4) -> Tensor:
    return torch.full((b,), value, dtype=F64)


# --- the published formulas, in VP units ----------------------------------------------------------


def published(
    z_s: Tensor, z_t: Tensor, eps: Tensor, s: int, t: int, gamma: float, rule: str
) -> tuple[Tensor, Tensor]:
    """(z_gamma, x0_hat) by the formulas of the paper for an eps network."""
    a_s, a_t = math.sqrt(TABLE[s]), math.sqrt(TABLE[t])
    n_s, n_t = math.sqrt(1 - TABLE[s]), math.sqrt(1 - TABLE[t])
    z = (1 - gamma) * (a_t / a_s) * z_s + gamma * z_t
    if rule == "variance":
        sigma = math.sqrt((1 - gamma**2) * (a_t / a_s * n_s) ** 2 + gamma**2 * n_t**2)
    else:
        sigma = (1 - gamma) * (a_t / a_s) * n_s + gamma * n_t
    return z, (z - sigma * eps) / a_t


@pytest.mark.parametrize("rule", ["variance", "linear"])
@pytest.mark.parametrize("k", [20, 100, 250])
@pytest.mark.parametrize("gamma", [0.0, 0.13, 0.5, 0.97, 1.0])
def test_our_line_and_x0_hat_are_the_published_ones(rule: str, k: int, gamma: float) -> None:
    for t in (279, 599, 999):
        s = t - k
        z_s, z_t, eps = (randn(4, 5, seed=i) for i in range(3))
        z, theirs = published(z_s, z_t, eps, s, t, gamma, rule)
        a_s, a_t = math.sqrt(TABLE[s]), math.sqrt(TABLE[t])
        sigma_s, sigma_t = (math.sqrt(1 / TABLE[i] - 1) for i in (s, t))
        x = on_line(z_s / a_s, z_t / a_t, full(gamma))
        assert (x - z / a_t).abs().max() < 1e-10
        denoised = x - sigma_t * eps  # D of an eps network that is told sigma_t
        ours = x0_hat(x, denoised, RULES[rule](full(gamma), full(sigma_s / sigma_t)))
        assert (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("t", [19, 499, 999])
def test_the_boundary_of_discrete_models_is_the_published_one(t: int) -> None:
    table = VP.scaled_linear()
    z, clean = randn(4, 5), randn(4, 5, seed=1)
    scaled = 10.0 * t
    theirs = 0.25 / (scaled**2 + 0.25) * z + scaled / math.sqrt(scaled**2 + 0.25) * clean
    sigma, alpha = math.sqrt(1 / TABLE[t] - 1), math.sqrt(TABLE[t])
    scalings = DiscreteEnd(table)(full(sigma))
    ours = consistency(z / alpha, clean, torch.ones(4, dtype=F64), scalings)
    assert (ours - theirs).abs().max() < 1e-10


def test_a_recipe_may_name_what_there_is() -> None:
    assert sorted(recipe.RULES) == sorted(RULES)


def test_f_is_the_identity_at_the_clean_end() -> None:
    x, junk = randn(4, 5), randn(4, 5, seed=1)
    table, one = VP.scaled_linear(), torch.ones(4, dtype=F64)
    alpha = math.sqrt(TABLE[0])
    f = consistency(x, junk, one, DiscreteEnd(table)(full(table.sigma_min)))
    assert (
        f - alpha * x
    ).abs().max() < 1e-10  # clean data in VP units, where t = 0 counts as clean
    for sigma in (0.002, 0.001, float(torch.tensor(0.002))):
        assert torch.equal(consistency(x, junk, one, CleanEnd(0.002)(full(sigma))), x)
    assert torch.equal(consistency(x, junk, one, CleanEnd(0.002)(full(0.0021))), junk)


# --- the line -------------------------------------------------------------------------------------


def test_the_line_ends_in_its_two_states() -> None:
    x_s, x_t = randn(4, 5), randn(4, 5, seed=1)
    assert torch.equal(on_line(x_s, x_t, full(1.0)), x_t)
    assert torch.equal(on_line(x_s, x_t, full(0.0)), x_s)
    assert torch.allclose(on_line(x_s, x_t, full(0.5)), (x_s + x_t) / 2)


@pytest.mark.parametrize("q", [0.01, 0.5, 0.99])
def test_rules_agree_at_the_ends_of_the_line(q: float) -> None:
    for rule in ("variance", "linear"):
        assert torch.equal(RULES[rule](full(1.0), full(q)), full(1.0))
        assert torch.allclose(RULES[rule](full(0.0), full(q)), full(q), rtol=1e-15)


def test_x0_hat_is_d_to_the_bit_at_gamma_1() -> None:
    x, denoised = (randn(4, 5, seed=i).float() for i in range(2))
    for rule in RULES.values():
        ratio = rule(full(1.0), full(0.4))
        assert torch.equal(x0_hat(x, denoised, ratio), denoised)


@pytest.mark.parametrize("sigma_t, sigma_s", [(80.0, 50.0), (2.0, 1.0), (0.5, 0.002)])
def test_x0_hat_of_the_teachers_own_eps_does_not_depend_on_gamma(sigma_t, sigma_s) -> None:
    """One DDIM step, the linear rule: both ends have one eps."""
    x_t = sigma_t * randn(4, 3)
    clean = Mixture()(x_t, full(sigma_t))
    eps = (x_t - clean) / sigma_t
    x_s = x_t + (sigma_s - sigma_t) * eps
    for gamma in (0.0, 0.2, 0.7, 1.0):
        x = on_line(x_s, x_t, full(gamma))
        ratio = RULES["linear"](full(gamma), full(sigma_s / sigma_t))
        found = x0_hat(x, x - sigma_t * eps, ratio)
        assert (found - clean).abs().max() < 1e-12


def test_the_losses_are_the_published_ones() -> None:
    d = randn(4, 5)
    assert torch.allclose(LOSSES["huber"](d), (d**2 + 1e-6) ** 0.5 - 1e-3, rtol=0, atol=1e-15)
    assert torch.equal(LOSSES["l2"](d), d**2)


# --- what a network is told -----------------------------------------------------------------------


def test_the_indices_of_the_usual_values_are_0() -> None:
    assert gamma_index(torch.tensor([1.0, 0.5, 0.0])).tolist() == [0.0, 5.0, 10.0]
    assert guidance_index(torch.tensor([1.0, 8.0])).tolist() == [0.0, 7.0]
    both = indices(
        ("guidance", "gamma", "phases"),
        torch.tensor([0.5]),
        torch.tensor([3.0]),
        torch.tensor([4]),
    )
    assert both is not None
    assert both.tolist() == [[2.0, 5.0, 2.0]]
    assert indices((), torch.ones(1), torch.ones(1), torch.ones(1)) is None


def test_the_embedding_of_published_networks() -> None:
    size, index = 256, torch.tensor([0.0, 2.5, 10.0])
    theirs = np.zeros((3, size))
    for row, w in enumerate(index.tolist()):
        for k in range(128):
            angle = 1000 * w * math.exp(-math.log(10_000) * k / 127)
            theirs[row, k], theirs[row, 128 + k] = math.sin(angle), math.cos(angle)
    assert np.abs(guidance_embedding(index, size).numpy() - theirs).max() < 1e-6


CONFIG = {"size": 8, "widths": (16, 16), "blocks": 1, "embedding": 16, "classes": 3}


def twins(told: tuple[str, ...]) -> tuple[UNet, UNet]:
    """A network, and the same with further inputs, untrained."""
    torch.manual_seed(0)
    plain = UNet(UNetConfig(**CONFIG))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    more = UNet(UNetConfig(**CONFIG, told=told))
    more.load_state_dict(plain.state_dict(), strict=False)
    return plain.eval(), more.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("told", [("gamma",), ("gamma", "guidance")])
@torch.no_grad()
def test_an_untrained_student_equals_the_teacher_to_the_bit(told, dtype) -> None:
    plain, more = twins(told)
    plain, more = plain.to(dtype), more.to(dtype)
    x, sigma, label = noise(4, 1.0, shape=(1, 8, 8)).float(), full(3.0).float(), torch.arange(4)
    index = torch.rand(4, len(told), generator=torch.Generator().manual_seed(0)) * 10
    theirs = denoise(plain, x, sigma, label, dtype=dtype)
    for given in (None, index):

        def net(*args, given=given):
            return more(*args, told=given)

        assert torch.equal(denoise(net, x, sigma, label, dtype=dtype), theirs)


@torch.no_grad()
def test_a_trained_embedding_tells_gammas_apart_and_1_is_the_default() -> None:
    _, net = twins(("gamma",))
    for parameter in net.embed_told.parameters():
        torch.nn.init.normal_(parameter)
    x, c_noise, label = torch.ones(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    at = [net(x, c_noise, label, told=torch.tensor([[i]])) for i in (0.0, 0.1, 5.0, 10.0)]
    assert torch.equal(net(x, c_noise, label), at[0])
    for one, other in pairwise(at):
        assert (one - other).abs().max() > 1e-4


def test_told_is_checked_and_off_by_default() -> None:
    assert UNetConfig().told == ()
    for bad in (("gama",), ("gamma", "gamma")):
        with pytest.raises(ValueError, match="told must be from gamma, guidance"):
            UNetConfig(told=bad)
    assert not any("told" in name for name in UNet(UNetConfig(**CONFIG)).state_dict())
    assert Told(16)(torch.tensor([0.0, 3.0])).abs().max() == 0


# --- the teacher's step ---------------------------------------------------------------------------


@pytest.mark.parametrize("substeps", [1, 2, 3])
@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_a_batch_of_sub_paths_equals_each_by_itself(name: str, substeps: int) -> None:
    mixture, points = Mixture(), 9
    step = stepper(name, 20.0, 0.01, points=points, grid="karras", substeps=substeps)
    fine = make_grid("karras", substeps * (points - 1) + 1, 20.0, 0.01)
    assert step.levels == fine[::substeps]
    chosen = torch.tensor([0, 7, 3, 3, 1])
    x = noise(5, 1.0) * torch.tensor(step.levels, dtype=F64)[chosen][:, None]
    together = fewstep.solve(mixture, x, step.program(chosen))
    for i, n in enumerate(chosen.tolist()):
        part = fine[n * substeps : (n + 1) * substeps + 1]
        alone = fewstep.solve(mixture, x[i : i + 1], name, grid=part)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-11)


def test_one_ddim_step_by_hand() -> None:
    step = stepper("ddim", 20.0, 0.01, points=5, grid="log-snr", substeps=1)
    chosen, x = torch.tensor([2, 0]), noise(2, 5.0)
    t, s = (torch.tensor([step.levels[n + i] for n in (2, 0)], dtype=F64) for i in (0, 1))
    denoised = Mixture()(x, t)
    by_hand = (s / t)[:, None] * x + (1 - s / t)[:, None] * denoised
    ours = fewstep.solve(Mixture(), x, step.program(chosen))
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-14)
    assert step.evaluations == 1


def test_a_plan_is_a_teacher_on_its_own_grid(tmp_path: Path) -> None:
    levels = (20.0, 7.0, 1.0, 0.01)
    path = tmp_path / "plan.json"
    path.write_text(get("dpm-solver-2").plan(levels).to_json())
    step = stepper(str(path), 20.0, 0.01)
    assert step.levels == levels
    chosen, x = torch.tensor([1, 0, 2]), noise(3, 5.0)
    ours = fewstep.solve(Mixture(), x, step.program(chosen))
    for i, n in enumerate(chosen.tolist()):
        alone = fewstep.solve(Mixture(), x[i : i + 1], "dpm-solver-2", grid=levels[n : n + 2])
        torch.testing.assert_close(ours[i : i + 1], alone, rtol=0, atol=1e-12)


def test_addim_puts_variance_back() -> None:
    """By hand; and on Gaussian data its end has more variance than that of ddim, which has too
    little."""
    step, plain = (
        stepper(name, 20.0, 0.01, points=6, grid="log-snr", substeps=1)
        for name in ("addim", "ddim")
    )
    c = 0.25
    data = lambda x, sigma: x * c**2 / (c**2 + sigma[:, None] ** 2)  # noqa: E731
    x_T = noise(200, 20.0)
    *_, t, s = step.levels
    x, chosen = t / 20.0 * x_T, torch.full((200,), 4)
    denoised = data(x, torch.full((200,), t))
    lost = (1 - s / t) ** 2 * 0.1 / (2 + 1 / t**2)
    wanted = denoised + math.sqrt(s**2 + lost) * (x - denoised) / t
    torch.testing.assert_close(fewstep.solve(data, x, step.program(chosen)), wanted)
    ours, theirs = (one.states(data, x_T)[-1].std() for one in (step, plain))
    assert theirs < 0.9 * c
    assert theirs < ours < 1.02 * c


def test_teachers_that_cannot_be_taken_at_random_are_refused(tmp_path: Path) -> None:
    for name in ("churn", "ddim-eta", "consistency"):
        with pytest.raises(ValueError, match="teacher must be a solver of the ODE"):
            stepper(name, 20.0, 0.01)
    path = tmp_path / "plan.json"
    path.write_text(get("dpmpp-2m").plan((20.0, 7.0, 1.0, 0.01)).to_json())
    with pytest.raises(ValueError, match="looks back beyond its own interval"):
        stepper(str(path), 20.0, 0.01)
    path.write_text(get("ddim").plan((20.0, 7.0, 1.0), afs="zero").to_json())
    with pytest.raises(ValueError, match="other operations on some intervals"):
        stepper(str(path), 20.0, 0.01)
    with pytest.raises(ValueError, match="leave out points, grid and substeps"):
        stepper(str(path), 20.0, 0.01, points=4)
    with pytest.raises(FileNotFoundError, match="nothing"):
        stepper(str(tmp_path / "nothing.json"), 20.0, 0.01)


def test_teachers_differ_in_their_digest() -> None:
    made = [
        stepper(name, 20.0, 0.01, points=points, substeps=substeps)
        for name, points, substeps in (
            ("ddim", 5, 1),
            ("heun", 5, 1),
            ("ddim", 6, 1),
            ("ddim", 5, 2),
        )
    ]
    assert len({step.digest for step in made}) == len(made)
    assert made[0].digest == stepper("ddim", 20.0, 0.01, points=5, substeps=1).digest


# --- sampling of students -------------------------------------------------------------------------


@pytest.mark.parametrize("nfe, times", [(1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259])])
def test_the_levels_at_50_original_steps_are_the_published_ones(nfe: int, times: list) -> None:
    table = VP.scaled_linear()
    grid = make_grid("trailing", 51, table.sigma_max, table.sigma_min, table)
    assert [round(table.t(sigma)) for sigma in grid] == [*range(999, 0, -20), 0]
    levels = student_levels(grid, nfe)
    assert levels[-1] == 0
    assert [round(table.t(sigma)) for sigma in levels[:-1]] == times
    assert set(levels[:-1]) <= set(grid[:-1])


def test_levels_for_a_budget_that_is_too_large_are_refused() -> None:
    assert student_levels((3.0, 2.0, 1.0), 2) == (3.0, 2.0, 0.0)
    for nfe in (0, 3):
        with pytest.raises(ValueError, match=f"takes 1 to 2 nfe, got {nfe}"):
            student_levels((3.0, 2.0, 1.0), nfe)


GRID = (20.0, 6.0, 1.5, 0.0)


def test_multistep_consistency_sampling_by_hand() -> None:
    mixture, seeds = Mixture(), [3, 8]
    x_T = x = noise(2, 20.0)
    for i, (cur, nxt) in enumerate(pairwise(GRID)):
        fresh = normal(seeds, (3,), "step", i, F64)
        x = mixture(x, full(cur, 2)) + nxt * fresh
    ours = fewstep.solve(mixture, x_T, "consistency", grid=GRID, seeds=seeds)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-14)


def test_without_fresh_noise_the_predicted_eps_is_put_back() -> None:
    mixture = Mixture()
    x_T = x = noise(2, 20.0)
    for cur, nxt in pairwise(GRID):
        clean = mixture(x, full(cur, 2))
        x = clean + nxt * (x - clean) / cur
    ours = fewstep.solve(mixture, x_T, "consistency-ode", grid=GRID)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


def test_a_consistency_function_gives_the_law_of_the_data_at_every_budget() -> None:
    """The exact f of a centred Gaussian: every multistep chain draws from it, noise and all."""
    variance, seeds = 0.25, list(range(4000))

    def f(x: Tensor, sigma: Tensor) -> Tensor:
        return x * (variance / (variance + sigma**2)).sqrt()[:, None]

    x_T = normal(seeds, (2,), "prior", 0, F64) * math.sqrt(20.0**2 + variance)
    for grid in ((*GRID[:1], 0.0), GRID):
        end = fewstep.solve(f, x_T, "consistency", grid=grid, seeds=seeds)
        assert abs(end.var().item() - variance) < 4 * variance * math.sqrt(2 / end.numel())


def path(x: Tensor, sigma: float, to: float, c: float) -> Tensor:
    """Where the probability-flow path of centred Gaussian data goes."""
    return x * math.sqrt((c**2 + to**2) / (c**2 + sigma**2))


@pytest.mark.parametrize("c", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("grid", [(80.0, 0.0), (80.0, 1.0, 0.0), (20.0, 5.0, 0.7, 0.05, 0.0), GRID])
def test_kappa_follows_the_path_of_gaussian_data(grid: tuple[float, ...], c: float) -> None:
    x_T = noise(4, grid[0])

    def f(x: Tensor, sigma: Tensor) -> Tensor:
        return x * (c / (c**2 + sigma**2).sqrt())[:, None]

    states = list(fewstep.iterate(f, x_T, f"consistency-kappa:c={c}", grid=grid))
    for state, sigma in zip(states, grid[1:], strict=True):
        exact = path(x_T, grid[0], sigma, c)
        torch.testing.assert_close(state.x, exact, rtol=1e-13, atol=1e-13)


def test_kappa_of_data_without_spread_is_the_chord() -> None:
    mixture, x_T = Mixture(), noise(2, 20.0)
    ours = fewstep.solve(mixture, x_T, "consistency-kappa:c=0", grid=GRID)
    chord = fewstep.solve(mixture, x_T, "consistency-ode", grid=GRID)
    torch.testing.assert_close(ours, chord, rtol=0, atol=1e-13)


def test_kappa_by_hand() -> None:
    mixture, x_T, c = Mixture(), noise(2, 20.0), 0.3
    x = x_T
    for t, s in pairwise(GRID):
        kappa = t * (math.sqrt(c**2 + s**2) - c) / (math.sqrt(c**2 + t**2) - c)
        clean = mixture(x, full(t, 2))
        x = clean + kappa * (x - clean) / t
    ours = fewstep.solve(mixture, x_T, f"consistency-kappa:c={c}", grid=GRID)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


def test_the_wrapper_applies_the_boundary_at_gamma_1() -> None:
    table, mixture = VP.scaled_linear(), Mixture()
    wrapped = Consistency(mixture, DiscreteEnd(table))
    x, sigma = noise(3, 2.0), full(2.0, 3)
    t, alpha = table.t(2.0), table.alpha(2.0)
    total = (10 * t) ** 2 + 0.25
    by_hand = 0.25 / total * alpha * x + 10 * t / total**0.5 * mixture(x, sigma)
    torch.testing.assert_close(wrapped(x, sigma), by_hand, rtol=0, atol=1e-12)


def test_the_solver_for_consistency_functions_is_listed_apart() -> None:
    assert names(consistency=True) == ["consistency", "consistency-kappa", "consistency-pca"]
    assert not {"consistency", "consistency-kappa", "consistency-pca"} & set(names())
    assert get("consistency").stochastic
    assert get("consistency-ode") is get("ddim")


@pytest.mark.parametrize("grid", [(9.0, 0.0), (9.0, 0.1), (9.0, 1.0, 0.0)])
@pytest.mark.parametrize("solver", ["consistency", "consistency-ode", "consistency-kappa"])
def test_settings_know_whether_noise_is_drawn(solver: str, grid: tuple[float, ...]) -> None:
    mixture, x_T = Mixture(), noise(2, 9.0)
    ends = [fewstep.solve(mixture, x_T, solver, grid=grid, seeds=[i, i + 1]) for i in range(2)]
    drawn = not torch.equal(*ends)
    assert draws_noise(Filled(solver, len(grid) - 1, grid)) == drawn
    planned = plan_for(Settings(solver, grid=grid)).program()
    assert draws_noise(Filled(planned, len(grid) - 1)) == drawn
