"""A learned solver and its folder.

`solver.json` says what it is, on which grid, for which network, and how it was made;
`predictor.safetensors` holds the weights of methods that have any. Nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fewstep.arguments import place
from fewstep.denoiser import Denoiser
from fewstep.files import file_hash, open_folder, write_json, write_whole
from fewstep.grid import check_grid
from fewstep.learned.kinds import READABLE
from fewstep.learned.method import Method
from fewstep.loop import finish
from fewstep.plan import Eval, Op, Ops, Plan, Program, in_numbers
from fewstep.records import Digest, Int, Levels, Slug, read_json, record, shown
from fewstep.tensors import load_tensors

__all__ = ["PREDICTOR_FILE", "SOLVER_FILE", "LearnedSolver", "budgets", "trained_on"]

SOLVER_FILE, PREDICTOR_FILE = "solver.json", "predictor.safetensors"
FORMAT = "fewstep-solver/1"


@record
class Facts:
    """What solver.json says, beside its format.

    base: the solver that it starts from, where the method has one
    settings: what was learned, as its method writes it
    predictor_sha256: of the file of weights beside it; None where there is none
    """

    method: Slug
    nfe: Int
    afs: Slug
    sigmas: Levels
    settings: dict[str, Any]
    base: Slug | None = None
    predictor_sha256: Digest | None = None
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, repr=False)
class LearnedSolver:
    """A solver that was trained for one network, budget and grid; stands where a name could.

    method: what was learned
    model: of the network that it was trained on: name, weights (their hash) and conditions, where
        they are known
    training, validation: how it was made and how well it did, JSON-ready
    """

    method: Method
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<LearnedSolver: {self.program().name}, {self.nfe} evaluations>"

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The grid between whose points it learned to go."""
        return self.method.sigmas

    @property
    def nfe(self) -> int:
        """Evaluations that it spends."""
        return self.method.program().evaluations

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that name what was learned, wherever it is kept."""
        facts = self._facts(None)  # which follows from the rest
        facts["first"] = facts.pop("afs")  # the name that published digests were taken over
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        return digest.hexdigest()[:12]

    def program(self) -> Program:
        """For the loop."""
        program = self.method.program()
        weights, known = str(self.model.get("weights") or ""), self.model.get("checksums")
        return replace(
            program,
            name=f"{program.name} {self.digest}",
            learned_on=weights,
            checksums=known if isinstance(known, dict) else {},
        )

    def plan(self, denoiser: Denoiser | None = None, x_T: Tensor | None = None) -> Plan:
        """The same as a static plan, every number in it; `fewstep.plan.levels(plan.ops)` are the
        sigmas at which the network is evaluated.

        Args:
            denoiser, x_T: where the numbers differ between samples, those of the plan are their
                means over these samples, and it is the same solver only as far as they are alike

        Raises:
            ValueError: they differ and no samples are given; it thresholds D, which is not linear.
        """
        program = self.method.program()
        if program.quantile is not None:
            raise ValueError(f"{program.name} thresholds D, which no plan says; use it as it is")
        if not program.adapts or denoiser is None or x_T is None:
            return self.method.plan()
        return averaged(program, denoiser, x_T)

    def save(self, folder: Path | str) -> None:
        """Write the folder, weights first, each file whole.

        Raises:
            OSError: it cannot be.
        """
        folder = Path(folder)
        open_folder(folder)
        if data := self._data():
            write_whole(folder / PREDICTOR_FILE, data)
        about = {name: getattr(self, name) for name in ("model", "training", "validation")}
        write_json(folder / SOLVER_FILE, {"format": FORMAT, **self._facts(self.nfe), **about})

    @classmethod
    def load(cls, folder: Path | str, nfe: int | None = None) -> LearnedSolver:
        """From a folder, or, given a budget, from one that has such a folder for each under its
        number.

        Raises:
            ValueError: there is none, or it is damaged, or newer.
        """
        folder = place("folder", folder)
        path = folder / SOLVER_FILE
        if not path.is_file() and (have := budgets(folder)):
            if nfe not in have:
                known = ", ".join(map(str, have))
                raise ValueError(f"{folder} has solvers for nfe={known}, got nfe={nfe}")
            folder = folder / str(nfe)
            path = folder / SOLVER_FILE
        if not path.is_file():
            what = f"it has no {SOLVER_FILE}" if folder.is_dir() else "there is no such folder"
            raise ValueError(f"{folder} is not a learned solver: {what}")
        values = read_json(path, "a learned solver of fewstep, or was cut short")
        found, kind = values.pop("format", None), values.get("method")
        if found != FORMAT or kind not in tuple(READABLE):
            what = f"format {shown(found)} and method {shown(kind)}"
            raise ValueError(
                f"{path} has {what}, this version reads {FORMAT!r} with {', '.join(READABLE)}; "
                "update fewstep"
            )
        try:
            facts = Facts(**values)
            tensors = _read(folder / PREDICTOR_FILE, facts.predictor_sha256)
            method = READABLE[facts.method].read(
                facts.base, check_grid(facts.sigmas), facts.afs, facts.settings, tensors
            )
            solver = cls(method, facts.model, facts.training, facts.validation)
            if solver.nfe != facts.nfe:
                raise ValueError(f"nfe is {facts.nfe}, but it spends {solver.nfe}")
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} cannot be used: {reason}; train or fetch it again") from None
        return solver

    def _facts(self, nfe: int | None) -> dict[str, Any]:
        data = self._data()
        return {
            "method": self.method.kind,
            "base": self.method.base,
            "nfe": nfe,
            "afs": self.method.afs,
            "sigmas": list(self.method.sigmas),
            "settings": self.method.settings(),
            "predictor_sha256": _hash(data) if data else None,
        }

    def _data(self) -> bytes:
        tensors = {
            name: value.detach().to("cpu", torch.float32).contiguous()
            for name, value in self.method.tensors().items()
        }
        return safetensors.torch.save(tensors) if tensors else b""


def trained_on(folder: Path) -> tuple[str, str]:
    """Of a learned solver, or of the first in a folder of them: the hashes of the network's weights
    and, of a student, of its teacher's; "" for what is not known."""
    files = [folder / SOLVER_FILE, *(folder / str(nfe) / SOLVER_FILE for nfe in budgets(folder))]
    path = next((path for path in files if path.is_file()), None)
    found: Any = {} if path is None else read_json(path, "a learned solver of fewstep").get("model")
    teacher = found.get("teacher") if isinstance(found, dict) else None
    known = (one.get("weights") if isinstance(one, dict) else "" for one in (found, teacher))
    network, taught = (str(one or "") for one in known)
    return network, taught


def budgets(folder: Path) -> list[int]:
    """Of the solvers in a folder that has one for each budget under its number."""
    found = (path.parent.name for path in folder.glob(f"*/{SOLVER_FILE}"))
    return sorted(int(name) for name in found if name.isdecimal())


@torch.no_grad()
def averaged(program: Program, denoiser: Denoiser, x_T: Tensor) -> Plan:
    """A plan of the operations that a program makes of these samples, each number their mean."""
    seen: list[Op] = []

    def noted() -> Ops:
        ops, reply = program.start(), None
        while True:
            try:
                op = ops.send(reply)
            except StopIteration:
                return
            seen.append(in_numbers(op))
            reply = yield op

    finish(replace(program, start=noted), denoiser, x_T)
    ops = tuple(op._replace(features=False) if isinstance(op, Eval) else op for op in seen)
    name, sigmas = program.name, program.sigmas
    return Plan(program.prediction, program.depth, name, "learned", sigmas, ops)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path, digest: str | None) -> dict[str, Tensor]:
    """The weights beside the record; none where it names none."""
    if not digest:
        return {}
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if file_hash(path) != digest:
        raise ValueError(f"{path.name} is damaged or of another solver")
    return load_tensors(path)
