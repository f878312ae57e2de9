"""Each step rule equals the integral that defines it, for floats and for tensors with gradients."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor

from fewstep.solver import rules
from tests.support.testbed import largest, random_grid

# name: (rule, the largest number of outputs that it takes)
RULES = {
    "adams_sigma": (rules.adams_sigma, 4),
    "adams_log": (rules.adams_log, 4),
    "exp_adams": (rules.exp_adams, 4),
    "ipndm": (rules.ipndm, 4),
    "dpmpp_2m": (rules.dpmpp_2m, 2),
    "dpmpp_3m": (rules.dpmpp_3m, 3),
    "unip-bh1": (lambda past, nxt, order: rules.unip(past, nxt, order, 1), 4),
    "unip-bh2": (lambda past, nxt, order: rules.unip(past, nxt, order, 2), 4),
    "unic-bh1": (lambda past, nxt, order: rules.unic(past, nxt, order, 1), 4),
    "unic-bh2": (lambda past, nxt, order: rules.unic(past, nxt, order, 2), 4),
}
CASES = [(name, order) for name, (_, most) in RULES.items() for order in range(1, most + 1)]
SEEDS = st.integers(0, 10**6)


def random_levels(seed: int, outputs: int) -> tuple[list[float], float]:
    """(past, nxt), newest first, on a random irregular grid."""
    grid = random_grid(np.random.default_rng(seed), outputs, start=10.0)
    return grid[-2::-1], grid[-1]


def lagrange(nodes: list[float], j: int, u: float) -> float:
    others = [n for i, n in enumerate(nodes) if i != j]
    return math.prod((u - n) / (nodes[j] - n) for n in others)


def weights_by_quadrature(variable, weight, nodes, cur, nxt) -> list[float]:
    """int weight(u) l_j(u) du from cur to nxt, for every Lagrange polynomial l_j on the nodes."""
    places = [variable(sigma) for sigma in nodes]
    start, end = variable(cur), variable(nxt)
    return [
        quad(lambda u, j=j: weight(u) * lagrange(places, j, u), start, end, epsabs=0, epsrel=1e-12)[
            0
        ]
        for j in range(len(nodes))
    ]


def log_snr(sigma: float) -> float:
    return -math.log(sigma)


def assert_weights(found: tuple, expected: list[float], tolerance: float) -> None:
    assert len(found) == len(expected)
    assert largest(np.subtract(found, expected)) <= tolerance * largest(np.array(expected))


# 1e-10: quad's own 1e-12, and the cancellation between Lagrange polynomials on nodes as near as 0.1
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@given(seed=SEEDS)
def test_adams_sigma_integrates_the_lagrange_polynomials_in_sigma(order, seed):
    past, nxt = random_levels(seed, order)
    a, b = rules.adams_sigma(past, nxt, order)
    assert a == 1
    exact = weights_by_quadrature(lambda sigma: sigma, lambda u: 1.0, past, past[0], nxt)
    assert_weights(b, exact, 1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@given(seed=SEEDS)
def test_adams_log_integrates_the_lagrange_polynomials_in_log_sigma(order, seed):
    past, nxt = random_levels(seed, order)
    a, b = rules.adams_log(past, nxt, order)
    assert a == 1
    exact = weights_by_quadrature(log_snr, lambda u: -math.exp(-u), past, past[0], nxt)
    assert_weights(b, exact, 1e-10)


def exponential(past: list[float], nodes: list[float], nxt: float) -> list[float]:
    end = log_snr(nxt)
    return weights_by_quadrature(log_snr, lambda u: math.exp(u - end), nodes, past[0], nxt)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@given(seed=SEEDS)
def test_exp_adams_integrates_the_lagrange_polynomials_under_the_exponential(order, seed):
    past, nxt = random_levels(seed, order)
    a, b = rules.exp_adams(past, nxt, order)
    assert a == nxt / past[0]
    assert_weights(b, exponential(past, past, nxt), 1e-10)


@pytest.mark.parametrize("order", [2, 3, 4])
@given(seed=SEEDS)
def test_unic_from_order_2_adds_the_new_output_to_the_nodes(order, seed):
    past, nxt = random_levels(seed, order)
    a, b = rules.unic(past, nxt, order)
    assert a == nxt / past[0]
    assert_weights(b, exponential(past, [nxt, *past], nxt), 1e-10)


@pytest.mark.parametrize("name, order", CASES)
@given(seed=SEEDS)
def test_constant_outputs_are_integrated_exactly_by_every_rule(name, order, seed):
    """sum b = nxt - cur on eps; a + sum b = 1 on D."""
    past, nxt = random_levels(seed, order)
    a, b = RULES[name][0](past, nxt, order)
    whole = nxt - past[0] if a == 1 else 1 - a
    assert sum(b) == pytest.approx(whole, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name, order", CASES)
@given(seed=SEEDS)
def test_a_rule_gives_tensors_the_same_weights_as_floats(name, order, seed):
    rule = RULES[name][0]
    cases = [random_levels(seed + k, order) for k in range(5)]
    pasts = torch.tensor([past for past, _ in cases], dtype=torch.float64)  # [b, order]
    nxts = torch.tensor([nxt for _, nxt in cases], dtype=torch.float64)
    a, b = rule(list(pasts.unbind(1)), nxts, order)
    for i, (past, nxt) in enumerate(cases):
        a_float, b_float = rule(past, nxt, order)
        assert float(torch.as_tensor(a).expand(5)[i]) == pytest.approx(a_float, rel=1e-12)
        assert_weights(tuple(float(w[i]) for w in b), list(b_float), 1e-12)


@pytest.mark.parametrize("name, order", CASES)
def test_a_rule_has_the_right_gradient_in_every_level(name, order):
    rule = RULES[name][0]
    cases = [random_levels(seed, order) for seed in range(3)]
    # a wide step too, so that phi is taken on both sides of |z| = 1
    cases.append((cases[0][0], cases[0][1] / 5))
    levels = torch.tensor([[*past, nxt] for past, nxt in cases], dtype=torch.float64)

    def weights(*columns: Tensor) -> Tensor:
        a, b = rule(list(columns[:-1]), columns[-1], order)
        return torch.stack([torch.as_tensor(a, dtype=torch.float64).expand(len(cases)), *b])

    columns = [column.clone().requires_grad_() for column in levels.unbind(1)]
    assert torch.autograd.gradcheck(weights, columns)


@pytest.mark.parametrize("name, order", CASES)
def test_a_rule_uses_at_most_order_outputs_and_no_more_than_there_are(name, order):
    rule = RULES[name][0]
    extra = 1 if name.startswith("unic") else 0  # its new output
    past, nxt = random_levels(1, 4)
    assert len(rule(past, nxt, order)[1]) == order + extra
    for there in range(1, order):
        assert rule(past[:there], nxt, order) == rule(past[:there], nxt, there)


@pytest.mark.parametrize("name", ["adams_log", "exp_adams", "dpmpp_2m", "dpmpp_3m", "unip-bh2"])
def test_rules_in_log_sigma_fall_to_order_1_into_zero(name):
    """x = D: from a x + b D with a = 0 and b = 1, or from x - sigma eps."""
    rule, order = RULES[name]
    past, _ = random_levels(1, order)
    a, b = rule(past, 0.0, order)
    assert (a, b) == ((1, (-past[0],)) if name == "adams_log" else (0, (1,)))


@given(seed=SEEDS, count=st.integers(1, 5))
def test_interpolatory_solves_the_vandermonde_system(seed, count):
    rng = np.random.default_rng(seed)
    nodes = np.cumsum(rng.uniform(0.1, 1.0, count)) * rng.choice([-1, 1])
    moments = rng.normal(size=count)
    matrix = np.vander(nodes, increasing=True).T
    exact = np.linalg.solve(matrix, moments)
    found = rules.interpolatory(nodes.tolist(), moments.tolist())
    # backward stable solvers agree to the condition number times a few roundings
    tolerance = 20 * np.finfo(float).eps * np.linalg.cond(matrix)
    assert largest(np.array(found) - exact) <= tolerance * largest(exact)


def phi_series(z: float, k: int) -> float:
    """phi_k(z) = sum_n z^n / (n + k)!, in exact rational arithmetic."""
    total, term, n = Fraction(0), Fraction(1, math.factorial(k)), 0
    while n < 10 or abs(term) > Fraction(1, 10**40):
        total += term
        n += 1
        term *= Fraction(z) / (n + k)
    return float(total)


PHI_POINTS = [0.0, 1e-300, 1e-9, -1e-9, 0.3, -0.999999, 0.999999, 1.0, -1.0, 1.5, -3.7, 11.0, -12.0]


@pytest.mark.parametrize("z", PHI_POINTS)
def test_phi_equals_its_series_and_its_integral(z):
    found = rules.phi(z, 5)
    tensors = rules.phi(torch.tensor([z, 0.5], dtype=torch.float64), 5)
    for k, (value, tensor) in enumerate(zip(found, tensors, strict=True), start=1):
        exact = phi_series(z, k)
        # the upward recursion loses the digits of k! near |z| = 1
        assert value == pytest.approx(exact, rel=2e-16 * 10 * math.factorial(k))
        assert float(tensor[0]) == pytest.approx(value, rel=1e-13)
        integral, _ = quad(
            lambda u, k=k: math.exp((1 - u) * z) * u ** (k - 1) / math.factorial(k - 1),
            0,
            1,
            epsabs=0,
            epsrel=1e-12,
        )
        assert value == pytest.approx(integral, rel=1e-11)


def test_phi_has_its_gradient_on_both_sides_of_its_switch():
    z = torch.tensor([-5.0, -1.1, -0.9, 0.0, 0.5, 1.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: torch.stack(rules.phi(z, 4)), z)
