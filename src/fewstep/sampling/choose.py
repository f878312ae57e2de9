"""What a model's card makes of settings: everything that was left open, filled in and checked."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.grid import check_grid
from fewstep.loop import check_mean_start, starts_at
from fewstep.models.students import check_segments, own_levels
from fewstep.plan import Plan, Program, gain
from fewstep.sampling.settings import Filled, Settings
from fewstep.schedule import PURE_NOISE
from fewstep.solver import Solver, get, intervals_for
from fewstep.solving import DEFAULT_GRID, DEFAULT_NFE, Runnable, find, is_folder, resolve
from fewstep.text import count

if TYPE_CHECKING:
    from fewstep.models import Card, Model

__all__ = [
    "check_weights",
    "choose",
    "describe",
    "draws_noise",
    "identify",
    "locate",
    "plan_for",
    "warn_of_gain",
]

AVERAGED = range(1_000_000, 1_000_064)  # seeds behind the plan of a solver that reads features
GAIN = 8.0  # above it such a solver may end further off than ddim: docs/design.md, "Few intervals"
FEW = 20  # evaluations; with more, intervals are short


def choose(model: Model, settings: Settings, start: float | None = None) -> Filled:
    """Fill in what was left open, and check that everything fits.

    "auto" is the best that the model's card knows for the budget: a learned solver, where one
    comes with the model for it, else a named one. Where the caller names grid, afs, final, end or
    a start it is the named one, with these. Beside sigmas it is a solver alone, one that spends
    one evaluation on each interval, and afs is "none" unless given. A solver that is named without
    a grid or an end has those of the card.

    Args:
        model: whose card it is
        settings: as asked for
        start: the level at which sampling starts, where that is not settings.head_start; the
            card's sigma_max where both are left out

    Returns:
        The same with nothing left open.

    Raises:
        ValueError: unknown names, impossible budgets, or a grid that starts elsewhere.
    """
    grid, afs, end, final = settings.grid, settings.afs, settings.end, settings.final
    begin = settings.head_start if start is None else start
    nfe = DEFAULT_NFE if settings.nfe is None else settings.nfe
    if grid is not None and not isinstance(grid, str):
        grid = check_grid(grid)
    settings = replace(settings, grid=grid)
    solver, known = _picked(model, settings, begin)
    if model.card.distilled and grid is None and isinstance(solver, str | Solver):
        grid = tuple(own_levels(model.card, nfe))
    if not isinstance(solver, str | Solver):
        program = resolve(replace(settings, solver=_named(solver), grid=grid, head_start=None))
        _check_start(model, program.sigmas[0], begin, own=True)
        check_weights(model, program)
        spent = program.evaluations
        return Filled(program, spent, head_start=settings.head_start)
    grid = known.get("grid", model.card.grid) if grid is None else grid
    afs = known.get("afs", "none") if afs is None else afs
    if afs == "mean":
        level = model.card.sigma_max if begin is None else begin
        check_mean_start(level if isinstance(grid, str) else grid[0], model.card.sigma_max)
    if isinstance(grid, str) and model.card.in_segments:
        raise ValueError(
            f"{model.card.name} goes its path in segments, whose edges are levels of its own; "
            f"leave grid {grid} out"
        )
    if not isinstance(grid, str):
        grid = tuple(grid)
        spent = resolve(Settings(solver, nfe, grid, afs, final, end)).evaluations
        named = get(solver) if isinstance(solver, str) else solver
        check_segments(model.card, spent, named.name, grid)
        _check_start(model, grid[0], begin)
        return Filled(solver, spent, grid, afs, final, head_start=settings.head_start)
    if end is None:
        end = "sigma_min" if final else known.get("end", model.card.end)
    return Filled(solver, nfe, grid, afs, final, end, settings.head_start)


def locate(model: Model, solver: str | Path, nfe: int | None) -> Solver | Runnable:
    """A solver by name, or a learned one by its folder, or by the name under which it comes with
    the model, which goes before a folder of that name.

    Raises:
        ValueError: there is none.
    """
    comes = model.card.shipped(str(solver))
    if comes and is_folder(solver):
        warnings.warn(
            f"{solver} is what comes with {model.card.name}; the folder of that name here is "
            f"./{solver}",
            stacklevel=2,
        )
    return find(comes or solver, nfe)


def draws_noise(settings: Filled) -> bool:
    """Whether filled-in settings may draw noise on the way: the solver or plan does, and is not a
    consistency function that ends at once."""
    solver = settings.solver
    if isinstance(solver, Program):
        return solver.draws
    solver = get(solver) if isinstance(solver, str) else solver
    at_once = settings.nfe == 1 and isinstance(settings.grid, tuple) and settings.grid[-1] == 0
    return solver.stochastic and not (solver.consistency and at_once)


def describe(model: Model, settings: Filled, **conditions: Any) -> dict[str, Any]:
    """What makes a picture, besides its seed and label, JSON-ready: known before it is made.

    Args:
        model: its card and, where it has them, its `facts`
        settings: filled in
        conditions: prompt, guidance and the like
    """
    facts = getattr(model, "facts", dict)
    return {
        "model": model.card.name,
        "weights": model.card.weights_sha256,
        **settings.record(),
        "prompt": None,
        "guidance": None,
        "head_start": settings.head_start,
        **conditions,
        "dtype": str(model.dtype).removeprefix("torch."),
        **facts(),
    }


def identify(model: Model) -> dict[str, Any]:
    """What `describe` leaves out, since it takes a pass over all weights, JSON-ready: hashes of the
    model's components as they are in memory."""
    return getattr(model, "components", dict)()


def plan_for(
    settings: Settings,
    model: Model | None = None,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Plan:
    """The plan that a run would follow, on a model, or without one on the range of EDM.

    Args:
        settings: as asked for; solver "auto" only where there is a model
        model: whose card, range and time are taken
        sigma_min, sigma_max: the ends of a named grid, in place of the model's

    Returns:
        The plan. Of a learned solver that reads features the numbers are means over some of the
        model's samples.

    Raises:
        ValueError: also where the solver adapts to the network, and there is no model.
    """
    if isinstance(settings.solver, Plan):
        if model is not None:
            choose(model, settings, sigma_max)  # raises where they do not go together
        return settings.solver
    if model is None:
        if settings.solver == "auto":
            raise ValueError("auto is the best that a model's card knows; name a model too")
        denoiser, solver = None, find(settings.solver, settings.nfe)
        grid = DEFAULT_GRID if settings.grid is None else settings.grid
        filled = replace(settings, solver=solver)
        if isinstance(solver, Solver):
            filled = replace(filled, grid=grid)
    else:
        denoiser, solver = model.denoiser(), _picked(model, settings, sigma_max)[0]
        filled = choose(model, settings, sigma_max)
    named = not isinstance(filled.grid, tuple)
    ends = {"sigma_min": sigma_min, "sigma_max": sigma_max} if named else {}
    program = resolve(filled, denoiser, **ends)
    if isinstance(filled.solver, str | Solver):
        own = get(filled.solver) if isinstance(filled.solver, str) else filled.solver
        name = filled.grid if isinstance(filled.grid, str) else "custom"
        warn_of_gain(filled, program)
        return own.plan(program.sigmas, filled.afs or "none", filled.final, grid=name)
    return solver.plan(denoiser, model.prior(AVERAGED) if model else None)  # type: ignore[union-attr]


def _picked(
    model: Model, settings: Settings, start: float | None
) -> tuple[str | Solver | Runnable, dict[str, Any]]:
    """The solver, a registered one by its name, and what the card knows beside it."""
    solver, nfe = settings.solver, DEFAULT_NFE if settings.nfe is None else settings.nfe
    known: dict[str, Any] = {}
    if isinstance(solver, str) and solver == "auto":
        top = start is None or starts_at(start, model.card.sigma_max)
        given = (settings.grid, settings.afs, settings.end) != (None, None, None)
        free = not given and not settings.final and top
        learned = model.card.learned(nfe) if free else None
        known = {} if learned else _known(model.card, settings, nfe, top)
        solver = str(learned) if learned else known.get("solver", "dpmpp-2m")
    if isinstance(solver, str | Path):
        found = locate(model, solver, settings.nfe)  # raises now for an unknown name
        return (found.name if isinstance(found, Solver) else found), known
    return solver, known


def _known(card: Card, asked: Settings, nfe: int, top: bool) -> dict[str, Any]:
    """The card's entry for the budget, or for the next lower one that it has, where that fits what
    the caller has named.

    Args:
        nfe: the budget; beside sigmas it is one evaluation on each interval
        top: whether the start is at sigma_max; below it, afs="mean" does not hold
    """
    sigmas = asked.grid if isinstance(asked.grid, tuple) else None
    nfe = nfe if sigmas is None else len(sigmas) - 1
    below = [int(budget) for budget in card.auto if int(budget) <= nfe]
    entry = card.auto[str(max(below))].given() if below else {}
    if not top and entry.get("afs") == "mean":
        del entry["afs"]
    afs = entry.get("afs", "none") if asked.afs is None else asked.afs
    end = asked.end or ("sigma_min" if asked.final else entry.get("end", card.end))
    try:
        solver = get(entry["solver"])
        if sigmas is not None:
            fits = solver.on(sigmas).evaluations == nfe
            return {"solver": entry["solver"]} if fits else {}
        intervals_for(solver, nfe, afs, asked.final, end)
    except (KeyError, ValueError):
        return {}
    return entry


def _named(solver: Runnable) -> Program:
    """Its program; that of a plan is known by a hash of its numbers."""
    if not hasattr(solver, "program"):
        return solver  # type: ignore[return-value]  # for `resolve` to refuse
    program = solver.program()
    if isinstance(solver, Plan):
        digest = hashlib.sha256(solver.to_json().encode()).hexdigest()[:16]
        return replace(program, name=f"{solver.solver}, plan {digest}")
    return program


def check_weights(model: Model, program: Program) -> None:
    """Warn of a solver that was trained on another network, where both are known: by the weights in
    memory, which adapters change, else by the hashes of files. Reads the network's weights once."""
    known, apart = model.card.weights_sha256, None
    if program.checksums and hasattr(model, "differs"):
        apart = model.differs(program.checksums)  # type: ignore[attr-defined]
    if apart is None:
        apart = bool(program.learned_on and known and program.learned_on != known)
    if apart:
        warnings.warn(
            f"{program.name} was trained on other weights than those of {model.card.name}; "
            "expect less of it, or train one for this model",
            stacklevel=4,
        )


def warn_of_gain(settings: Settings | Filled, program: Program) -> None:
    """Warn of a solver of several evaluations an interval whose intervals are too long for it.

    Its rule is the published one. But where the noise falls a hundredfold in one interval, it
    weighs single outputs of the network many times over, and their errors. From pure noise (flows)
    on it does so without harm.
    """
    solver, sigmas = settings.solver, program.sigmas
    solver = get(solver) if isinstance(solver, str) else solver
    intervals = len(sigmas) - 1
    if not isinstance(solver, Solver) or not intervals < program.evaluations <= FEW:
        return
    if settings.final or solver.adapts or sigmas[0] > PURE_NOISE:
        return
    found = gain(solver.plan(sigmas, settings.afs or "none"))
    if found > GAIN:
        long = count(intervals, "long interval")
        warnings.warn(
            f"{solver.name} at {program.evaluations} evaluations has {long}, and weighs outputs of "
            f"the network {found:.0f}-fold; it may end further off than ddim. Take more "
            "evaluations, or a solver of one a step, as dpmpp-2m or ipndm-3",
            stacklevel=3,
        )


def _check_start(model: Model, sigma: float, start: float | None, own: bool = False) -> None:
    """Raises ValueError where a grid starts elsewhere than sampling does.

    Args:
        own: whether it is the solver's own grid, which cannot be moved
    """
    level = model.card.sigma_max if start is None else start
    if starts_at(sigma, level):
        return
    if own:
        advice = "take a solver without one"
        if model.card.kind != "pipeline":  # which has no statistics for a head start
            advice += f", or head_start={sigma:.10g}"
        raise ValueError(
            f"this solver has its own grid, which starts at sigma {sigma:.10g}, and sampling "
            f"starts at {level:.10g}; {advice}"
        )
    raise ValueError(
        f"the grid starts at sigma {sigma:.10g}, but sampling at {level:.10g}; start the grid "
        f"there, or sampling at the grid's: head_start={sigma:.10g} of noise, strength of a picture"
    )
