"""Every solver by name: one line of data each over the families beside this file.

Orders and degrees are declared here and the tests hold each solver to them; `docs/design.md`
justifies each. The package is called `solver` so that `fewstep.solvers()` can be the function that
lists the names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

from fewstep.plan import Prediction
from fewstep.solver import rules
from fewstep.solver.consistency import consistency, consistency_kappa, consistency_pca
from fewstep.solver.multistep import linear_multistep, unipc
from fewstep.solver.registry import (
    AFS,
    ALIASES,
    ENDS,
    Range,
    Solver,
    end_at,
    get,
    intervals_for,
    names,
    register,
)
from fewstep.solver.rules import Weights
from fewstep.solver.singlestep import dpm_solver_2, dpm_solver_3, dpmpp_2s, heun
from fewstep.solver.stochastic import ancestral, churn, dpmpp_2m_sde

Variable = Literal["sigma", "log_snr"]
Family = Callable[[str, int, int, int, str], Solver]

__all__ = [
    "ALIASES",
    "ENDS",
    "AFS",
    "Range",
    "Solver",
    "end_at",
    "get",
    "intervals_for",
    "names",
    "register",
]


def _multistep(rule: Callable[..., Weights], prediction: Prediction, variable: Variable) -> Family:
    """A family of linear multistep methods over one step rule."""

    def member(name: str, steps: int, order: int, degree: int, summary: str) -> Solver:
        ops = functools.partial(linear_multistep, rule=rule, order=steps)
        return Solver(name, ops, prediction, steps, order, degree, variable, summary=summary)

    return member


def _unipc(name: str, p: int, bh: int, degree: int) -> Solver:
    ops = functools.partial(unipc, order=p, bh=bh)
    summary = f"UniPC: order-{p} predictor and corrector, B(h) of kind bh{bh}"
    return Solver(name, ops, "x0", p + 1, p + 1, degree, "log_snr", summary=summary)


_exp_adams = _multistep(rules.exp_adams, "x0", "log_snr")
_2m = _multistep(rules.dpmpp_2m, "x0", "log_snr")
_3m = _multistep(rules.dpmpp_3m, "x0", "log_snr")
_log = _multistep(rules.adams_log, "eps", "log_snr")
_adams = _multistep(rules.adams_sigma, "eps", "sigma")
_ipndm = _multistep(rules.ipndm, "eps", "sigma")

_PUBLISHED_3M = "DPM-Solver++(3M) as published, its slip kept; corrected: exp-adams-3"
_R = {"options": (("r", 0.5),), "ranges": (("r", Range(0, 1, above=True)),)}
_ETA = (("eta", 1.0),)
_CHURN = (("churn", 40.0), ("low", 0.05), ("high", 50.0), ("noise", 1.003))
_CHURN_RANGES = (
    ("churn", Range(0)),
    ("low", Range(0)),
    ("high", Range(0, math.inf)),
    ("noise", Range(0)),
)

# fmt: off
_SOLVERS = (
    # name, operations, history, depth, order, degree, variable
    _exp_adams("ddim", 1, 1, 0, "DDIM = Euler = DPM-Solver-1"),
    Solver("heun", heun, "eps", 2, 2, 1, "sigma", summary="Heun's method, as in EDM"),
    Solver("dpm-solver-2", dpm_solver_2, "eps", 2, 2, 0, "log_snr", **_R,
           summary="DPM-Solver-2, singlestep"),
    Solver("dpm-solver-3", dpm_solver_3, "eps", 3, 3, 1, "log_snr",
           summary="DPM-Solver-3, singlestep"),
    Solver("dpmpp-2s", dpmpp_2s, "x0", 2, 2, 0, "log_snr", **_R,
           summary="DPM-Solver++(2S), singlestep"),
    # name, outputs used, order, degree
    _2m("dpmpp-2m", 2, 2, 0, "DPM-Solver++(2M)"),
    _3m("dpmpp-3m", 3, 2, 1, _PUBLISHED_3M),
    *(_exp_adams(f"exp-adams-{p}", p, p, p - 1, f"exponential Adams-Bashforth on D, order {p}")
      for p in (1, 2, 3, 4)),
    _unipc("unipc-2", 2, bh=2, degree=0),
    _unipc("unipc-2-bh1", 2, bh=1, degree=0),
    _unipc("unipc-3", 3, bh=2, degree=2),
    _unipc("unipc-3-bh1", 3, bh=1, degree=2),
    *(_log(f"deis-{p}", p, p, p - 1, f"DEIS of order {p}, polynomials in log rho")
      for p in (2, 3, 4)),
    *(_adams(f"deis-rho-{p}", p, p, p - 1, f"DEIS of order {p}, polynomials in rho")
      for p in (2, 3, 4)),
    *(_ipndm(f"ipndm-{p}", p, min(p, 2), 0, f"iPNDM over {p} outputs, as published")
      for p in (1, 2, 3, 4)),
    *(_adams(f"ipndm-v-{p}", p, p, p - 1, f"iPNDM over {p} outputs, correct on any grid")
      for p in (2, 3, 4)),
    *(_adams(f"lms-{p}", p, p, p - 1, f"linear multistep: Adams-Bashforth in sigma, order {p}")
      for p in (2, 3, 4)),
    Solver("ddim-eta", ancestral, "x0", 1, 1, stochastic=True, options=_ETA,
           ranges=(("eta", Range(0, 1)),), summary="DDIM with eta = Euler-ancestral"),
    Solver("churn", churn, "eps", 2, 2, stochastic=True, options=_CHURN,
           ranges=_CHURN_RANGES, summary="EDM's stochastic sampler: churn and Heun"),
    Solver("dpmpp-2m-sde", dpmpp_2m_sde, "x0", 2, 1, stochastic=True, options=_ETA,
           ranges=(("eta", Range(0)),), summary="SDE-DPM-Solver++(2M), midpoint form"),
    Solver("consistency", consistency, "x0", 1, 0, stochastic=True, consistency=True,
           summary="D, then fresh noise to the next level: for distilled networks"),
    Solver("consistency-kappa", consistency_kappa, "x0", 1, 0, consistency=True,
           options=(("c", 0.12),), ranges=(("c", Range(0.0)),),
           summary="along the path of Gaussian data, without noise: for distilled networks"),
    Solver("consistency-pca", consistency_pca, "x0", 1, 0, consistency=True,
           summary="the same with the data's own spread along each principal direction"),
)
# fmt: on

for _solver in _SOLVERS:
    register(_solver)
