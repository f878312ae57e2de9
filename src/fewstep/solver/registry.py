"""What a solver is to the rest: a name, coefficients, and the properties that it declares.

A solver is a function `ops(sigmas)` that yields `Eval` and `Combine`, and one
`register(Solver(...))`. Here are also what goes around the operations of any solver, an analytic
first step and a last denoising step, and the intervals that spend a budget (`intervals_for`).
"""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fewstep.arguments import either, function, text, whole
from fewstep.plan import Combine, Eval, Ops, Plan, Prediction, Program, freeze

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

AFS = ("none", "zero", "mean")
ENDS = ("sigma_min", "zero")
MOST_EVALUATIONS = 10_000  # in one budget; a typing error must not run for hours
MOST_SPELT = 1_000
LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Range:
    """The numbers from low to high that an option may have; nan is never among them.

    above: whether low itself is left out
    """

    low: float = -LARGEST
    high: float = LARGEST
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        if self.low == -LARGEST:
            return "finite"
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        return low + ("" if self.high >= LARGEST else f" and at most {self.high:g}")


@dataclass(frozen=True, repr=False)
class Solver:
    """A named solver and what it promises.

    ops: from a strictly decreasing grid to the operations
    prediction, depth: what its history holds, and how much of it
    order: global order of convergence on any smooth grid, history seeded
    degree, variable: outputs that are polynomials in `variable` up to `degree` are integrated
        exactly on any grid
    evaluations: only for a solver that adapts to the network's replies, and so has no plan: how
        many it spends on so many intervals
    options: the keyword arguments of ops that a user may set, with their defaults, as pairs:
        (("eta", 1.0), ("noise", 1.003))
    ranges: what each of them may be; any finite number where nothing is said
    consistency: only for networks that were distilled into consistency functions, D(x, sigma) = the
        end of the path through x; of others it draws from another law than that of the data
    """

    name: str
    ops: Callable[..., Ops]
    prediction: Prediction
    depth: int
    order: int
    degree: int = 0
    variable: Literal["sigma", "log_snr"] = "sigma"
    stochastic: bool = False
    evaluations: Callable[[int], int] | None = None
    options: tuple[tuple[str, float], ...] = ()
    summary: str = ""
    ranges: tuple[tuple[str, Range], ...] = ()
    consistency: bool = False

    def __post_init__(self) -> None:
        text("name", self.name)
        function("ops", self.ops, "ops(sigmas)")
        if self.prediction not in ("eps", "x0"):
            raise ValueError(f"prediction must be 'eps' or 'x0', got {self.prediction!r:.80}")
        for what in ("depth", "order", "degree"):
            whole(what, getattr(self, what), int(what == "depth"))
        for what in ("stochastic", "consistency"):
            either(what, getattr(self, what))
        for what, pairs in (("options", self.options), ("ranges", self.ranges)):
            if not isinstance(pairs, tuple) or not all(map(_is_named, pairs)):
                wanted = '(("eta", 1.0),)' if what == "options" else '(("eta", Range(0, 1)),)'
                raise ValueError(
                    f"{what} of {self.name} must be pairs in a tuple, like {wanted}, got {pairs!r}"
                )
        known, ranges = dict(self.options), dict(self.ranges)
        for name, value in known.items():
            allowed = ranges.get(name, Range())
            if type(value) not in (int, float) or value not in allowed:
                raise ValueError(f"{name} of {self.name} must be {allowed}, got {value!r}")
        unknown = [*(ranges.keys() - known), *(known.keys() - _accepted(self.ops, known))]
        if unknown:
            raise ValueError(
                f"{self.name} has options {', '.join(known) or 'none'}, and {unknown[0]!r} is not "
                "both one of them and a keyword argument of its operations"
            )

    def __repr__(self) -> str:
        law = "stochastic, " if self.stochastic else ""
        return f"Solver({self.name!r}, {law}order {self.order}, history of {self.prediction})"

    @property
    def adapts(self) -> bool:
        """Whether it needs the network's replies, so that it has no plan."""
        return self.evaluations is not None

    def ops_on(self, sigmas: Sequence[float], afs: str = "none", final: bool = False) -> Ops:
        """The operations on one grid.

        Args:
            sigmas: strictly decreasing
            afs: the analytic first step, "none", "zero" or "mean"
            final: whether a last denoising step is taken at the grid's end, for one evaluation

        Returns:
            A generator of `Eval` and `Combine`.

        Raises:
            ValueError: for an unknown `afs`, for an analytic first step of a stochastic solver and
                for a last denoising step where the grid already ends at 0.
        """
        if afs not in AFS:
            raise ValueError(f"afs must be one of {', '.join(AFS)}, got {afs!r}")
        if afs != "none" and self.stochastic:
            raise ValueError(
                f"{self.name} is stochastic; an analytic first step goes with ODE solvers"
            )
        if final and sigmas[-1] == 0:
            raise ValueError(
                "final adds a denoising step at the grid's end, but the grid ends at 0"
            )
        ops = self.ops(sigmas)
        if afs != "none":
            ops = with_afs(ops, afs)
        return denoise_last(ops, sigmas[-1], self.prediction) if final else ops

    def plan(
        self,
        sigmas: Sequence[float],
        afs: str = "none",
        final: bool = False,
        grid: str = "custom",
    ) -> Plan:
        """`ops_on`, drained.

        Args:
            sigmas, afs, final: as in `ops_on`
            grid: the name of the grid, for the record

        Raises:
            ValueError: the solver adapts to the network.
        """
        if self.adapts:
            raise ValueError(f"{self.name} adapts to the network's features, so it has no plan")
        # a solver of our own has no state, so its plans may be kept; others may hold anything
        known = _REGISTRY.get(self.name) is self
        return (_remembered if known else _drained)(self, tuple(sigmas), afs, final, grid)

    def on(self, sigmas: Sequence[float], afs: str = "none", final: bool = False) -> Program:
        """What the loop runs on one grid. Errors as in `ops_on`."""
        if self.evaluations is None:
            return self.plan(sigmas, afs, final).program()
        self.ops_on(sigmas, afs, final).close()  # raises now for arguments that do not fit
        return Program(
            functools.partial(self.ops_on, sigmas, afs, final),
            self.prediction,
            self.depth,
            tuple(sigmas),
            self.evaluations(len(sigmas) - 1) - (afs != "none") + final,
            adapts=True,
            name=self.name,
        )

    def with_options(self, **values: float) -> Solver:
        """The same solver with other options.

        Args:
            values: by the names that `options` has

        Returns:
            A solver whose name says the options, as in "ddim-eta:eta=0.5".

        Raises:
            ValueError: it has no such option, or where a value is out of its range.
        """
        known, ranges = dict(self.options), dict(self.ranges)
        for name in values:
            if name not in known:
                have = ", ".join(known) or "none"
                raise ValueError(f"{self.name} has no option {name!r}; it has: {have}")
            allowed = ranges.get(name, Range())
            value = values[name]
            if not isinstance(value, int | float) or value not in allowed:
                raise ValueError(f"{name} of {self.name} must be {allowed}, got {value!r}")
        known.update(values)
        label = ",".join(f"{k}={_number(v)}" for k, v in known.items())
        base = self.name.partition(":")[0]
        return replace(
            self,
            name=f"{base}:{label}",
            ops=functools.partial(self.ops, **values),
            options=tuple(known.items()),
        )


def _is_named(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and str(pair[0]).isidentifier()


def _accepted(ops: Callable[..., Ops], names: Iterable[str]) -> set[str]:
    """Those of the names that the operations take as keyword arguments."""
    try:
        taken = inspect.signature(ops).parameters.values()
    except (TypeError, ValueError):  # of C
        return set(names)
    if any(one.kind is one.VAR_KEYWORD for one in taken):
        return set(names)
    return {one.name for one in taken if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)}


def _number(value: float) -> str:
    """A number in few digits, but always the same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _drained(solver: Solver, sigmas: tuple[float, ...], afs: str, final: bool, grid: str) -> Plan:
    return freeze(
        solver.ops_on(sigmas, afs, final),
        prediction=solver.prediction,
        depth=solver.depth,
        solver=solver.name,
        grid=grid,
        sigmas=sigmas,
    )


_remembered = functools.lru_cache(maxsize=256)(_drained)


def with_afs(ops: Ops, source: str) -> Ops:
    """The same operations, the first evaluation replaced by its analytic stand-in."""
    op = next(ops)
    assert isinstance(op, Eval)  # an ODE solver evaluates before it moves
    op = op._replace(source=source, features=False)
    try:
        while True:
            reply = yield op
            op = ops.send(reply)
    except StopIteration:
        return


def denoise_last(ops: Ops, end: float, prediction: Prediction) -> Ops:
    """The same operations, then one evaluation at the grid's end and x = D."""
    yield from ops
    yield Eval(end)
    yield Combine((1.0,), 0.0, a=0.0) if prediction == "x0" else Combine((-end,), 0.0)


_REGISTRY: dict[str, Solver] = {}
_SPELT: dict[str, tuple[Solver, Solver]] = {}  # other spellings: the registered one, as asked for

ALIASES = {
    "euler": "ddim",
    "consistency-ode": "ddim",
    "dpm-solver-1": "ddim",
    "exp-adams": "exp-adams-3",
    "unipc": "unipc-2",
    "deis": "deis-3",
    "deis-rho": "deis-rho-3",
    "ipndm": "ipndm-4",
    "ipndm-v": "ipndm-v-4",
    "lms": "lms-4",
    "dpm-2": "dpm-solver-2",
    "dpm-solver++": "dpmpp-2m",
    "euler-ancestral": "ddim-eta",
    "euler-a": "ddim-eta",
    "ddpm": "ddim-eta",
}


def _key(name: str) -> str:
    """What two spellings of one name have in common: dpmpp-2m, DPM++ 2M, dpmpp_2m."""
    return "".join(c for c in name.lower().replace("++", "pp") if c not in "-_ ")


def register(solver: Solver) -> Solver:
    """Add a solver under its name.

    Raises:
        ValueError: the name, or one that differs from it in case and hyphens alone, is taken.
    """
    if not isinstance(solver, Solver):
        raise ValueError(f"solver must be a Solver, got {solver!r:.80}")
    for taken in (*_REGISTRY, *ALIASES):
        if _key(taken) == _key(solver.name):
            raise ValueError(f"there is already a solver called {taken!r}")
    _REGISTRY[solver.name] = solver
    return solver


def names(*, stochastic: bool | None = None, consistency: bool = False) -> list[str]:
    """Names of the registered solvers, all of them or only the (non-)stochastic ones.

    Args:
        consistency: those for consistency functions, instead of those for any denoiser
    """
    return [
        s.name
        for s in _REGISTRY.values()
        if stochastic in (None, s.stochastic) and s.consistency == consistency
    ]


def get(name: str) -> Solver:
    """The solver of a name, an alias, or a name with options: "ddim-eta:eta=0.5".

    Case, hyphens, underscores and spaces do not matter, and ++ is pp: "DPM++ 2M" is dpmpp-2m.

    Raises:
        ValueError: with the nearest names.
    """
    if text("name", name) in _REGISTRY:
        return _REGISTRY[name]
    if name in _SPELT:
        registered, found = _SPELT[name]
        if _REGISTRY.get(registered.name) is registered:
            return found
    solver = _spelt(name)
    if len(_SPELT) < MOST_SPELT:
        _SPELT[name] = (_REGISTRY[solver.name.partition(":")[0]], solver)
    return solver


def _spelt(name: str) -> Solver:
    base, _, written = name.partition(":")
    keys = {_key(known): known for known in (*_REGISTRY, *ALIASES)}
    found = keys.get(_key(base), "")
    solver = _REGISTRY.get(ALIASES.get(found, found))
    if solver is None:
        typed = _key(base)
        begin = [key for key in keys if typed and key.startswith(typed)]
        close = difflib.get_close_matches(typed, keys, n=3, cutoff=0.4)
        near = [keys[key] for key in dict.fromkeys((*begin, *close))][:4]
        hint = f"; the nearest: {', '.join(near)}" if near else ""
        raise ValueError(
            f"there is no solver called {base!r}{hint} (`fewstep plan --list` has all)"
        )
    if not written:
        return solver
    try:
        pairs = (part.split("=") for part in written.split(","))
        values = {key.strip(): float(value) for key, value in pairs}
    except ValueError:
        raise ValueError(f"options are written NAME:key=number,key=number, got {name!r}") from None
    return solver.with_options(**values)


def end_at(sigmas: tuple[float, ...], end: str) -> tuple[float, ...]:
    """A named grid that ends at sigma_min, as it comes, or with its last point moved to 0.

    Into 0 every exponential rule is of order 1 (x = D), as public implementations end.

    Raises:
        ValueError: for another `end`.
    """
    if end not in ENDS:
        raise ValueError(f"end must be one of {', '.join(ENDS)}, got {end!r}")
    return (*sigmas[:-1], 0.0) if end == "zero" else sigmas


def _spent(solver: Solver, intervals: int, afs: str, final: bool, end: str) -> int:
    # any decreasing grid will do: no solver's count depends on where the points lie
    sigmas = tuple(80.0 * 0.5 ** (10 * i / intervals) for i in range(intervals + 1))
    return solver.on(end_at(sigmas, end), afs, final).evaluations


def intervals_for(
    solver: Solver,
    budget: int,
    afs: str = "none",
    final: bool = False,
    end: str = "sigma_min",
) -> int:
    """How many intervals spend exactly `budget` evaluations.

    Args:
        solver: whose steps may cost one evaluation or more
        budget: network evaluations, nfe
        afs, final: as in `Solver.ops_on`
        end: "sigma_min" or "zero", where the grid ends

    Raises:
        ValueError: it names the nearest budgets that the solver can spend.
    """
    budget = whole("nfe", budget)
    if not 1 <= budget <= MOST_EVALUATIONS:
        raise ValueError(f"nfe must be from 1 to {MOST_EVALUATIONS}, got {budget}")

    def spent(intervals: int) -> int:
        return _spent(solver, intervals, afs, final, end)

    one, two = spent(1), spent(2)
    low = 1 + max(0, budget - one) // max(1, two - one)  # where every interval costs the same
    if spent(low) != budget:
        low, high = 1, budget + 1
        while low < high:  # the count rises with the intervals
            middle = (low + high) // 2
            enough = spent(middle) >= budget
            low, high = (low, middle) if enough else (middle + 1, high)
    if spent(low) == budget:
        return low
    spend = [n for n in map(spent, range(max(1, low - 2), low + 3)) if n > 0]
    options = [f"afs={afs}"] * (afs != "none") + ["final"] * final
    options += [f"end={end}"] * (end != "sigma_min")
    extra = f" with {', '.join(options)}" if options else ""
    can = f"it can spend {', '.join(map(str, spend))}, ..." if spend else "it spends none"
    raise ValueError(f"{solver.name}{extra} cannot spend exactly {budget} evaluations; {can}")
