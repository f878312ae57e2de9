"""The study of learned solvers on one model: train all variants, compare them, say what holds.

    python -m studies.learned_study --out study --device cuda     trains, compares, judges
    python -m studies.learned_study --out study --list            what is done and what is left
    python -m studies.learned_study --out study --only tuned plugin-ddim --budgets 5
    python -m studies.learned_study --out study --only judge      the expectations, again

Parts are run by `fewstep train solver` and `fewstep compare`, whose commands are printed, so each
can be run by hand. Both resume: what is done is skipped, and an interrupted part goes on when the
same command is run again. A variant VARIANT trained with seed S at budget N lies in
OUT/solvers/VARIANT-sS/N. The comparisons are OUT/comparison/comparison.json and
OUT/ablation/comparison.json; copied into results/, `make results` takes them.

Odd budgets have the analytic first step that a variant names, even ones none.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.cli.parsing import parse_budgets
from fewstep.learned.solver import SOLVER_FILE
from fewstep.learned.tuned import PARTS
from studies.commands import positive, run, stop_after

# the bases of the plugin, each with the grid on which the untrained plugin ends nearest
BASES = {
    **dict.fromkeys(("ddim", "ipndm-2", "ipndm-3", "ipndm-4"), "time-uniform"),
    **dict.fromkeys(("dpm-solver-2", "dpmpp-2m", "dpmpp-3m"), "karras"),
}
SEVERAL = ("heun", "dpm-solver-2")  # training-free solvers of two evaluations a step
AUTHORS = "--not-fallback --batch 128"
OURS = "--not-fallback --batch 32 --validation-seeds 256 --validate-every 32"
AMED, PLUGIN = "--method amed --lr 0.005", "--method amed-plugin --lr 0.005"
TUNED = f"--method tuned {OURS}"
# name -> options of `fewstep train solver`
VARIANTS = {
    "amed-authors": f"{AMED} --grid time-uniform --afs zero --teacher heun --inner 1 {AUTHORS}",
    "amed": f"{AMED} --grid time-uniform --afs mean {OURS}",
    "amed-karras": f"{AMED} --afs mean --grid karras {OURS}",
    "plugin-authors": (
        f"{PLUGIN} --base ipndm-4 --grid karras --afs zero --teacher ipndm-4 --inner 2 {AUTHORS}"
    ),
    **{
        f"plugin-{base}": f"{PLUGIN} --base {base} --grid {grid} --afs mean {OURS}"
        for base, grid in BASES.items()
    },
    **{
        f"plugin-{base}-zero": f"{PLUGIN} --base {base} --grid {BASES[base]} --afs zero {OURS}"
        for base in ("ipndm-2", "ipndm-3", "ipndm-4")
    },
    "grid": f"--method grid {OURS}",
    "tuned": TUNED,
    "tuned-fashion-a": f"{TUNED} --loss fashion-a",
}
# what each part of `tuned` is worth, at one budget
ABLATION = {
    **{f"only-{part}": f"{TUNED} --parts {part}" for part in PARTS},
    **{
        f"without-{part}": f"{TUNED} --parts {','.join(p for p in PARTS if p != part)}"
        for part in PARTS
    },
    "squared": f"{TUNED} --squared",
    **{f"first-{first}": f"{TUNED} --afs {first}" for first in ("none", "zero")},
    **{f"base-{base}": f"{TUNED} --base {base}" for base in ("ddim", "ipndm-2", "dpmpp-2m")},
    **{f"grid-{grid}": f"{TUNED} --grid {grid}" for grid in ("karras", "log-snr", "time-uniform")},
}
PARTS_OF_STUDY = ("compare", "ablation", "judge")


class Other(ValueError):
    """What is there is of another run."""


@dataclass(frozen=True)
class Training:
    """One solver to be trained: its variant, seed and budget, and the command."""

    variant: str
    seed: int
    nfe: int
    folder: Path
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.variant}-s{self.seed} at {self.nfe}"

    def done(self) -> bool:
        """Errors: ValueError where the folder has a run of another length or batch."""
        try:
            found = json.loads((self.folder / SOLVER_FILE).read_text())["training"]
            for name in ("trajectories", "batch"):
                asked = int(self.command[self.command.index(f"--{name}") + 1])
                if found[name] != asked:
                    raise Other(
                        f"{self.folder} was trained with {name} {found[name]}, now {asked}; give "
                        "another --out"
                    )
        except Other:
            raise
        except (OSError, ValueError, KeyError):
            return False
        return True


def trainings(options: argparse.Namespace, variants: Sequence[str]) -> list[Training]:
    """All of these variants, by budget, so that the first budget is whole first."""
    known = {**VARIANTS, **ABLATION}
    out = []
    for nfe in options.budgets:
        for variant in variants:
            if variant in ABLATION and nfe != options.ablation_budget:
                continue
            for seed in range(options.training_seeds):
                folder = options.out / "solvers" / f"{variant}-s{seed}" / str(nfe)
                command = train_command(options, known[variant], nfe)
                ends = ("--seed", str(seed), "--out", str(folder))
                out.append(Training(variant, seed, nfe, folder, (*command, *ends)))
    return out


def train_command(options: argparse.Namespace, variant: str, nfe: int) -> tuple[str, ...]:
    words = shlex.split(variant)
    if nfe % 2 == 0 and "--afs" in words:
        words[words.index("--afs") + 1] = "none"
    return (
        *("fewstep", "train", "solver", options.model, *words, "--nfe", str(nfe)),
        *("--trajectories", str(options.trajectories)),
        *("--device", options.device, "--dtype", options.dtype),
        *(["--compile"] if options.compile else []),
    )


def compare_command(options: argparse.Namespace, variants: Sequence[str], out: str) -> list[str]:
    """Of all seeds of the variants that are trained, beside the stored comparison, if one is
    given."""
    seeds = range(options.training_seeds)
    folders = [options.out / "solvers" / f"{name}-s{seed}" for name in variants for seed in seeds]
    there = [str(folder) for folder in folders if any(folder.glob(f"*/{SOLVER_FILE}"))]
    if not there:
        raise ValueError(f"{options.out} has none of {', '.join(variants)} to compare yet")
    budgets = [options.ablation_budget] if out == "ablation" else options.budgets
    free = options.solvers.split(",") if options.solvers and out == "comparison" else []
    return [
        *("fewstep", "compare", options.model, "--solvers", ",".join([*free, *there])),
        *("--nfe", ",".join(map(str, budgets)), "--seeds", options.seeds),
        *("--population", str(options.population), "--screen", str(options.screen)),
        *("--device", options.device, "--dtype", options.compare_dtype),
        *(["--compile"] if options.compile else []),
        *("--out", str(options.out / out), *shlex.split(options.compare)),
        *(["--beside", str(options.beside)] if options.beside and out == "comparison" else []),
    ]


# -- what is expected, and whether it is so -------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of a comparison, with the seeds of each variant side by side."""

    rows: list[dict[str, Any]]
    judge: str | None

    @classmethod
    def read(cls, path: Path) -> Rows:
        record = json.loads(path.read_text())
        return cls(record["rows"], list(record["floor"])[-1] if record["floor"] else None)

    def learned(self, variant: str, nfe: int) -> list[dict[str, Any]]:
        """One row for each training seed."""
        return [
            row for row in self.rows
            if row["nfe"] == nfe and Path(row["sampler"]).name.rpartition("-s")[0] == variant
        ]  # fmt: skip

    def free(self, nfe: int, names: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Training-free solvers, all or those named."""
        return [
            row for row in self.rows
            if row["nfe"] == nfe and row["grid"] is not None and not row.get("stochastic")
            and (not names or row["solver"] in names)
        ]  # fmt: skip

    def score(self, rows: list[dict[str, Any]]) -> float:
        """Mean over rows of the judge's excess distance, or of the error without a judge."""
        if not rows:
            return math.nan
        return sum(self._value(row) for row in rows) / len(rows)

    def best(self, rows: list[dict[str, Any]]) -> float:
        return min(map(self._value, rows), default=math.nan)

    def spread(self, rows: list[dict[str, Any]]) -> float:
        """The largest standard error of these rows."""
        judge = self.judge
        return max(
            (row["fd"][judge]["excess_se"] if judge else row["error_se"] or 0.0 for row in rows),
            default=math.nan,
        )

    def _value(self, row: dict[str, Any]) -> float:
        return row["fd"][self.judge]["excess"] if self.judge else row["error"]


def expectations(rows: Rows, budgets: Sequence[int]) -> list[tuple[str, float, float, bool]]:
    """(what is expected, the number that should be smaller, the other, whether it is); those whose
    rows are not there are left out."""
    out: list[tuple[str, float, float]] = []
    for nfe in budgets:
        for base in ("ddim", "ipndm-2", "dpmpp-2m") if nfe in (3, 5) else ():
            plain = [row for row in rows.free(nfe, [base]) if row["afs"] == "mean"]
            plain = plain or rows.free(nfe, [base])
            ours = rows.score(rows.learned(f"plugin-{base}", nfe))
            out.append((f"plugin on {base} at {nfe} is below {base}", ours, rows.best(plain)))
        for variant in ("amed-authors", "amed", "amed-karras"):
            ours = rows.score(rows.learned(variant, nfe))
            for names in (SEVERAL, ("ddim",), ("dpmpp-2m",)):
                what = f"{variant} at {nfe} is below {' and '.join(names)}"
                out.append((what, ours, rows.best(rows.free(nfe, names))))
    tuned = {name: rows.score(rows.learned(name, 5)) for name in ("tuned", "tuned-fashion-a")}
    for name, ours in tuned.items():
        for nfe in (7, 8):
            best = rows.best(rows.free(nfe))
            out.append((f"{name} at 5 reaches the best training-free solver at {nfe}", ours, best))
    for nfe in budgets:
        plugins = [row for base in BASES for row in rows.learned(f"plugin-{base}", nfe)]
        best = rows.best(plugins)
        if best > 5 * rows.spread([row for row in plugins if rows._value(row) == best]):
            for name in tuned:
                ours = rows.score(rows.learned(name, nfe))
                out.append((f"{name} at {nfe} is 40% below the best plugin", ours, 0.6 * best))
    return [(what, a, b, a <= b) for what, a, b in out if math.isfinite(a + b)]


def judge(path: Path, budgets: Sequence[int], out: Path) -> None:
    """Print and store the expectations."""
    rows = Rows.read(path)
    found = expectations(rows, budgets)
    measure = f"excess FD-{rows.judge}" if rows.judge else "error"
    print(f"\n{measure}, learned ones as the mean over training seeds:")
    for what, ours, theirs, holds in found:
        print(f"  {'pass' if holds else 'FAIL'}  {what}: {ours:.4g} against {theirs:.4g}")
    keys = ("expectation", "value", "against", "holds")
    record = [dict(zip(keys, one, strict=True)) for one in found]
    out.write_text(json.dumps({"measure": measure, "expectations": record}, indent=1) + "\n")
    print(out)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    every = [*VARIANTS, *ABLATION, *PARTS_OF_STUDY]
    chosen = [name for name in every if not options.only or name in options.only]
    planned = trainings(options, [name for name in chosen if name not in PARTS_OF_STUDY])
    left = [one for one in planned if not one.done()]
    print(f"{len(planned) - len(left)} of {len(planned)} solvers are trained")
    if options.list:
        for one in planned:
            print(f"  {'left' if one in left else 'done'}  {one.name}: {shlex.join(one.command)}")
        return
    stop_after(options.minutes)
    for i, one in enumerate(left):
        print(f"\n{one.name}, {len(left) - i} left", flush=True)
        run(one.command)
    comparison = options.out / "comparison" / "comparison.json"
    if "compare" in chosen:
        run(compare_command(options, list(VARIANTS), "comparison"))
    if "ablation" in chosen:
        run(compare_command(options, ["tuned", *ABLATION], "ablation"))
    if "judge" in chosen:
        judge(comparison, options.budgets, options.out / "expectations.json")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    every = ", ".join([*VARIANTS, *ABLATION, *PARTS_OF_STUDY])
    add("--out", type=Path, default=Path("study"))
    add("--model", default="fashion-mnist")
    add("--only", nargs="+", default=[], metavar="PART", help=f"of: {every}")
    add("--budgets", type=parse_budgets, default=(3, 5, 7, 9), help="such as 5, or 3,5,7")
    add("--ablation-budget", type=int, default=5)
    add("--training-seeds", type=int, default=2, help="how many of each variant")
    add("--trajectories", type=int, default=10_000)
    add("--device", default="cpu")
    add("--dtype", default="bfloat16", help="of training")
    add("--compile", action="store_true")
    add("--seeds", default="0-4999", help="of the test")
    add("--population", type=int, default=10_000)
    add("--screen", type=int, default=1000)
    add("--solvers", default="", help="training-free ones to compare as well, with commas")
    add("--compare-dtype", default="float32")
    add("--compare", default="", help="more options of fewstep compare, as one string")
    add("--beside", type=Path, help="a stored comparison of training-free solvers")
    add("--minutes", type=positive, help="stop then; the same command goes on from there")
    add("--list", action="store_true", help="say what is done and what is left, and do nothing")
    options = parser.parse_args(arguments)
    known = {*VARIANTS, *ABLATION, *PARTS_OF_STUDY}
    if unknown := [name for name in options.only if name not in known]:
        parser.error(f"no part is called {unknown[0]!r}; there are {every}")
    return options


if __name__ == "__main__":
    main()
