"""From the configuration of another scheduler to the arguments of `FewstepScheduler`.

The process of a configuration is kept: betas, prediction, clipping, the shift of a flow. So are
levels that it names (Karras, exponential, Lu, beta). Its solver and its timesteps are replaced.
What else would change a picture, and is set, is refused by its name.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fewstep.grid import make_grid
from fewstep.models.process import FLOWS
from fewstep.plan import Plan
from fewstep.solver import Solver
from fewstep.solving import Runnable, find

__all__ = ["AUTO", "SPACINGS", "check_class", "chosen", "spaced", "translated"]

AUTO = "dpmpp-2m"  # what the cards of pipelines have at every budget
LEVELS = ("grid", "final", "end", "solver", "plan")  # ours that say where levels lie

# n levels from sigma_max to sigma_min, then 0, by the flag that asks for them
SPACINGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "log-snr",
    "use_lu_lambdas": "log-snr",
    "use_beta_sigmas": "beta",
}
BETA = 0.6  # both parameters of the law, diffusers' defaults

# fields that are refused where they are set, with the value that stands for unset
REFUSED: dict[str, tuple[Any, str]] = {
    "shift_terminal": (None, "it belongs to video models"),
    "invert_sigmas": (False, "it belongs to video models"),
    "stochastic_sampling": (False, "take a stochastic solver, like solver='ddim-eta'"),
    "timestep_type": ("discrete", "the network is told its own times"),
    "interpolation_type": ("linear", "take a grid, or pass sigmas"),
    "lambda_min_clipped": (-math.inf, "pass sigmas to set_timesteps"),
    "sigma_min": (None, "pass sigmas to set_timesteps"),
    "sigma_max": (None, "pass sigmas to set_timesteps"),
    **dict.fromkeys(
        ("sigma_data", "sigma_schedule", "rho"),
        (None, "EDM's process is neither a table nor a flow"),
    ),
    "snr_shift_scale": (None, "it belongs to video models"),
    "scale_factors": (None, "it changes the size of the latents on the way"),
}
# fields of the solver and of the timesteps that are replaced, with what to name in their place
REPLACED = {
    **dict.fromkeys(("timestep_spacing", "steps_offset"), "grid='trailing' or another grid"),
    **dict.fromkeys(("set_alpha_to_one",), "end='zero' or end='sigma_min'"),
    **dict.fromkeys(
        (
            *("solver_order", "solver_type", "solver_p", "algorithm_type", "predict_x0"),
            *("lower_order_final", "euler_at_final", "disable_corrector", "predictor_order"),
            *("corrector_order", "skip_prk_steps", "tau_func", "variance_type"),
        ),
        "a solver by name, like solver='dpmpp-3m'",
    ),
    **dict.fromkeys(
        ("original_inference_steps", "timestep_scaling", "dynamic_thresholding_ratio"),
        "nothing, it has no meaning here",
    ),
}
TABLES_ONLY = (
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
)
FLOWS_ONLY = (
    *("shift", "use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift"),
    *("base_image_seq_len", "max_image_seq_len"),
)
OTHERS = ("LCMScheduler", "TCDScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler")
OF_EDM = ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho")
OTHER_PREDICTIONS = ("flow_shift", "use_flow_sigmas", "final_sigmas_type")  # translated


def check_class(name: str, known: Collection[str]) -> None:
    """Raise ValueError for the configuration of a scheduler of another process."""
    if name and name not in (*known, *FLOWS, *OTHERS, "FewstepScheduler"):
        raise ValueError(
            f"{name} has a process of its own, which fewstep does not run; it takes the "
            f"configurations of {', '.join((*known, *FLOWS))}"
        )


def translated(
    fields: Mapping[str, Any], given: Mapping[str, Any], own: Collection[str], strict: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration, and the arguments beside it, in our names.

    Args:
        fields: the configuration
        given: the arguments that the caller names
        own: names of ours
        strict: whether an unknown argument is an error

    Raises:
        ValueError: for what is not honoured, and for names that there are not.
    """
    fields, given = dict(fields), dict(given)
    # ours, that went through the scheduler of EDM and has its defaults
    if any(name in fields for name in (*LEVELS, "afs")):
        fields = {name: value for name, value in fields.items() if name not in OF_EDM}
    _check(fields)
    _check(given)
    for name in given if strict else ():
        if name in REPLACED:
            raise ValueError(f"{name} is not honoured by FewstepScheduler: name {REPLACED[name]}")
        if name not in (*own, *REFUSED, *OTHER_PREDICTIONS) and not name.startswith("_"):
            near = difflib.get_close_matches(name, own, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it has: {', '.join(sorted(own))}"
            raise ValueError(f"FewstepScheduler has no argument {name!r}{hint}")
    _read_flow(fields, "shift" in fields and "beta_start" not in fields)
    _read_flow(given)
    _check_kind(fields, given)
    _read_end(fields, given)
    _read_end(given, {})
    asked = [name for name in SPACINGS if given.get(name)]
    levels = [name for name in LEVELS[:3] if given.get(name)] + ["plan"] * bool(given.get("plan"))
    if asked and levels:
        raise ValueError(f"{asked[0]} says where the levels lie; leave out {levels[0]}")
    if asked or levels:  # what the caller names goes before the configuration
        fields |= dict.fromkeys(SPACINGS, False)
    if asked:
        fields |= {"grid": "trailing", "end": None, "final": False, "plan": None}
    if levels:
        fields.pop("final_sigmas_type", None)
    return fields, given


def _check(fields: Mapping[str, Any]) -> None:
    for name, (unset, advice) in REFUSED.items():
        value = fields.get(name, unset)
        if value is not None and value != unset:
            raise ValueError(
                f"{name}={value!r} is not honoured by FewstepScheduler ({advice}); unset it"
            )
    kind = fields.get("time_shift_type") or "exponential"
    if kind not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type must be exponential or linear, got {kind!r}")


def _check_kind(fields: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that only the other kind of process has."""
    flow = {**fields, **given}.get("prediction_type") == "flow_prediction"
    for name in TABLES_ONLY if flow else FLOWS_ONLY:
        if name in given:
            raise ValueError(
                f"{name} is of {'tables of betas' if flow else 'flows'}, and the process is "
                f"{'a flow' if flow else 'a table of betas'}; leave it out, or name prediction_type"
            )


def _read_flow(fields: dict[str, Any], bare: bool = False) -> None:
    """A flow has a shift and no table; with both, a table went through a flow's class.

    bare: whether it has a shift alone
    """
    shift = fields.pop("flow_shift", None)
    if fields.pop("use_flow_sigmas", False) or bare:
        fields["prediction_type"] = "flow_prediction"
    if shift is not None and fields.get("prediction_type") == "flow_prediction":
        fields.setdefault("shift", shift)


def _read_end(fields: dict[str, Any], given: Mapping[str, Any]) -> None:
    """final_sigmas_type as `end`, unless the caller names where the levels end."""
    kind = fields.pop("final_sigmas_type", None)
    if kind not in (None, "zero", "sigma_min"):
        raise ValueError(f"final_sigmas_type must be zero or sigma_min, got {kind!r}")
    if kind == "sigma_min" and not any(name in given for name in ("end", "final", "plan")):
        fields["end"] = "sigma_min"


def spaced(name: str, count: int, high: float, low: float) -> tuple[float, ...]:
    """So many levels from high to low: a grid by name, or by the quantiles of a beta law."""
    if count == 1:
        return (high,)
    if name != "beta":
        return make_grid(name, count, high, low)
    try:
        from scipy.special import betaincinv
    except ImportError:
        raise ValueError("use_beta_sigmas needs scipy: pip install scipy") from None
    shares = [float(betaincinv(BETA, BETA, 1 - i / (count - 1))) for i in range(count)]
    return (high, *(low + share * (high - low) for share in shares[1:-1]), low)


def chosen(solver: str | Path | Solver | Runnable) -> dict[str, Any]:
    """The arguments `solver` and `plan` for what a caller names."""
    if solver == "auto":
        return {"solver": AUTO, "plan": None}
    found = find(solver) if isinstance(solver, str | Path) else solver
    if isinstance(found, Solver):
        return {"solver": found.name, "plan": None}
    try:
        plan: Any = found if isinstance(found, Plan) else found.plan()  # type: ignore[attr-defined]
    except ValueError as error:
        raise ValueError(
            f"{error}; or run it as it is with FewstepPipeline(pipe, solver)"
        ) from None
    return {"solver": plan.solver, "plan": json.loads(plan.to_json())}
