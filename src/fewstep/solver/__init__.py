"""Every solver by name: one line of data each over the families beside this file.

Orders and degrees are declared here and the tests hold each solver to them; `docs/design.md` justifies each. The package
is called `solver` so that `fewstep.solvers()` can be the function that lists the names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

from fewstep.plan import Prediction
from fewstep.solver import rules
from fewstep.solver.multistep import linear_multistep, unipc
from fewstep.solver.registry import FIRST_STEPS, Solver, get, intervals_for, names, register
from fewstep.solver.rules import Weights
from fewstep.solver.singlestep import dpm_solver_2, dpm_solver_3, dpmpp_2s, heun
from fewstep.solver.stochastic import ancestral, churn, dpmpp_2m_sde

__all__ = ["FIRST_STEPS", "Solver", "get", "intervals_for", "names", "register"]


def _multistep(
    name: str,
    rule: Callable[..., Weights],
    prediction: Prediction,
    steps: int,
    *,
    order: int,
    degree: int,
    variable: Literal["sigma", "log_snr"],
    summary: str,
) -> Solver:
    ops = functools.partial(linear_multistep, rule=rule, order=steps)
    return Solver(name, ops, prediction, steps, order, degree, variable, summary=summary)


def _unipc(name: str, p: int, bh: int, degree: int) -> Solver:
    ops = functools.partial(unipc, order=p, bh=bh)
    summary = f"UniPC: order-{p} predictor and corrector, B(h) of kind bh{bh}"
    return Solver(name, ops, "x0", p + 1, p + 1, degree, "log_snr", summary=summary)


_HALF = (("r", 0.5),)
_CHURN = (("churn", 40.0), ("low", 0.05), ("high", 50.0), ("noise", 1.003))

for _solver in (
    _multistep("ddim", rules.exp_adams, "x0", 1, order=1, degree=0, variable="log_snr",
               summary="DDIM = Euler = DPM-Solver-1"),
    Solver("heun", heun, "eps", 2, 2, 1, "sigma", summary="Heun's method, as in EDM"),
    Solver("dpm-solver-2", dpm_solver_2, "eps", 2, 2, options=_HALF, summary="DPM-Solver-2, singlestep"),
    Solver("dpm-solver-3", dpm_solver_3, "eps", 3, 3, 1, "log_snr", summary="DPM-Solver-3, singlestep"),
    Solver("dpmpp-2s", dpmpp_2s, "x0", 2, 2, 0, "log_snr", options=_HALF, summary="DPM-Solver++(2S), singlestep"),
    _multistep("dpmpp-2m", rules.dpmpp_2m, "x0", 2, order=2, degree=0, variable="log_snr",
               summary="DPM-Solver++(2M)"),
    _multistep("dpmpp-3m", rules.dpmpp_3m, "x0", 3, order=2, degree=1, variable="log_snr",
               summary="DPM-Solver++(3M) as published, its slip kept; corrected: exp-adams-3"),
    *(_multistep(f"exp-adams-{p}", rules.exp_adams, "x0", p, order=p, degree=p - 1, variable="log_snr",
                 summary=f"exponential Adams-Bashforth of order {p} on D (UniP-{p})") for p in (1, 2, 3, 4)),
    _unipc("unipc-2", 2, 2, degree=0),
    _unipc("unipc-2-bh1", 2, 1, degree=0),
    _unipc("unipc-3", 3, 2, degree=2),
    _unipc("unipc-3-bh1", 3, 1, degree=2),
    *(_multistep(f"deis-{p}", rules.adams_log, "eps", p, order=p, degree=p - 1, variable="log_snr",
                 summary=f"DEIS of order {p}, polynomials in log rho") for p in (2, 3, 4)),
    *(_multistep(f"deis-rho-{p}", rules.adams_sigma, "eps", p, order=p, degree=p - 1, variable="sigma",
                 summary=f"DEIS of order {p}, polynomials in rho") for p in (2, 3, 4)),
    *(_multistep(f"ipndm-{p}", rules.ipndm, "eps", p, order=min(p, 2), degree=0, variable="sigma",
                 summary=f"iPNDM over {p} outputs, uniform-grid weights as published") for p in (1, 2, 3, 4)),
    *(_multistep(f"ipndm-v-{p}", rules.adams_sigma, "eps", p, order=p, degree=p - 1, variable="sigma",
                 summary=f"iPNDM over {p} outputs, correct on any grid") for p in (2, 3, 4)),
    *(_multistep(f"lms-{p}", rules.adams_sigma, "eps", p, order=p, degree=p - 1, variable="sigma",
                 summary=f"linear multistep (Adams-Bashforth in sigma) of order {p}") for p in (2, 3, 4)),
    Solver("ddim-eta", ancestral, "x0", 1, 1, stochastic=True, options=(("eta", 1.0),),
           summary="DDIM with eta = Euler-ancestral"),
    Solver("churn", churn, "eps", 2, 2, stochastic=True, options=_CHURN,
           summary="EDM's stochastic sampler: churn and Heun"),
    Solver("dpmpp-2m-sde", dpmpp_2m_sde, "x0", 2, 1, stochastic=True, options=(("eta", 1.0),),
           summary="SDE-DPM-Solver++(2M), midpoint"),
):  # fmt: skip
    register(_solver)
del _solver
