"""Every ODE solver integrates polynomials up to its declared degree exactly, and no further.

The outputs depend on sigma alone, so the exact state is known in closed form, with l = -log sigma:

    eps(sigma) a polynomial in sigma    dx/dsigma = eps      x = antiderivative
    eps(l) a polynomial in l            dx/dl = -e^-l eps    x = C + e^-l (eps + eps' + eps'' + ...)
    D(l) a polynomial in l              dx/dl = D - x        x = C e^-l + D - D' + D'' - ...
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import Polynomial
from torch import Tensor

import fewstep.solver as registry
from tests.support.testbed import ODE_SOLVERS, random_grid, solve_seeded

# Three pixels, all multiples of one path.
SCALES = torch.tensor([[1.0, -0.5, 2.0]], dtype=torch.float64)


class Polynomials:
    """A denoiser whose output, eps or D, is a polynomial in either variable, and its exact path."""

    def __init__(self, output: Polynomial, prediction: str, variable: str, constant: float):
        self.output, self.constant = output, constant
        self.eps, self.in_sigma = prediction == "eps", variable == "sigma"
        assert self.eps or not self.in_sigma
        derivatives = [output.deriv(k) if k else output for k in range(output.degree() + 1)]
        if not self.eps:
            signed = [(-1) ** k * d for k, d in enumerate(derivatives)]
            self.integral = sum(signed, Polynomial([0.0]))
        else:
            whole = sum(derivatives, Polynomial([0.0]))
            self.integral = output.integ() if self.in_sigma else whole

    def value(self, sigma: float) -> float:
        return float(self.output(sigma if self.in_sigma else -math.log(sigma)))

    def state(self, sigma: float) -> Tensor:
        if self.eps and self.in_sigma:
            return (self.integral(sigma) + self.constant) * SCALES
        particular = self.integral(-math.log(sigma))
        if self.eps:
            return (sigma * particular + self.constant) * SCALES
        return (particular + sigma * self.constant) * SCALES

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        output = self.value(float(sigma[0])) * SCALES
        return x - sigma.reshape(-1, 1) * output if self.eps else output.clone()


def error(name: str, degree: int, seed: int) -> float:
    """Relative error at the end, for a random polynomial of this degree on a random grid."""
    solver = registry.get(name)
    rng = np.random.default_rng(seed)
    coefficients = rng.uniform(0.5, 1.0, degree + 1) * rng.choice([-1, 1], degree + 1)
    output = Polynomial(coefficients)
    problem = Polynomials(output, solver.prediction, solver.variable, rng.normal())
    # from sigma = 3, so that powers of sigma and of log sigma stay of one size
    sigmas = random_grid(rng, intervals=8, start=3.0)
    end = solve_seeded(name, sigmas, problem, problem.state)
    exact = problem.state(sigmas[-1])
    size = max(1.0, *(float(problem.state(s).abs().max()) for s in sigmas))
    return float((end - exact).abs().max()) / size


@pytest.mark.parametrize("name", ODE_SOLVERS)
@given(seed=st.integers(0, 10**6))
def test_polynomials_up_to_the_declared_degree_are_exact_on_any_grid(name, seed):
    for degree in range(registry.get(name).degree + 1):
        # the weights of 4 nodes as near as 0.1 in log sigma cost up to 4 digits of float64's 16
        assert error(name, degree, seed) < 1e-11


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_one_degree_more_is_not_exact(name):
    degree = registry.get(name).degree + 1
    assert np.median([error(name, degree, seed) for seed in range(5)]) > 1e-4
