"""fewstep samples pretrained diffusion models in 1 to 10 network evaluations.

    model = fewstep.load("fashion-mnist")
    samples = fewstep.sample(model, nfe=5, seeds=range(64))

or, for any callable D(x, sigma):

    x = fewstep.solve(denoiser, x_T, solver="dpmpp-2m", nfe=5)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fewstep.provenance import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from fewstep.distillation.training import distill
    from fewstep.loop import State
    from fewstep.models import Model, load
    from fewstep.plan import Combine, Eval, Plan, Seen, flatten, freeze, nfe
    from fewstep.sampling.generate import Samples, sample
    from fewstep.solver import Solver, register
    from fewstep.solver import names as solvers
    from fewstep.solving import iterate, solve

__all__ = [
    "Combine",
    "Eval",
    "Model",
    "Plan",
    "Samples",
    "Seen",
    "Solver",
    "State",
    "distill",
    "flatten",
    "freeze",
    "iterate",
    "load",
    "nfe",
    "register",
    "sample",
    "solve",
    "solvers",
]

# Names are looked up on first use, so that `fewstep --help` does not wait for torch.
_HOMES = {
    "fewstep.distillation.training": ("distill",),
    "fewstep.loop": ("State",),
    "fewstep.models": ("Model", "load"),
    "fewstep.plan": ("Combine", "Eval", "Plan", "Seen", "flatten", "freeze", "nfe"),
    "fewstep.sampling.generate": ("Samples", "sample"),
    "fewstep.solver": ("Solver", "register", "solvers"),
    "fewstep.solving": ("iterate", "solve"),
}
# modules that need no import of their own: fewstep.learned.train(...)
_MODULES = (
    "data",
    "denoiser",
    "distillation",
    "evaluate",
    "grid",
    "integrations",
    "learned",
    "loop",
    "models",
    "networks",
    "noise",
    "plan",
    "provenance",
    "report",
    "sampling",
    "schedule",
    "solver",
)
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fewstep.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    module = importlib.import_module(_HOME_OF[name])
    value = globals()[name] = getattr(module, "names" if name == "solvers" else name)
    return value
