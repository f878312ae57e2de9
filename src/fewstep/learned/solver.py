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
from safetensors import SafetensorError

from fewstep.files import check_writable, write_json, write_whole
from fewstep.grid import check_grid
from fewstep.learned.kinds import KINDS
from fewstep.learned.method import Method
from fewstep.plan import Plan, Program

__all__ = ["PREDICTOR_FILE", "SOLVER_FILE", "LearnedSolver"]

SOLVER_FILE, PREDICTOR_FILE = "solver.json", "predictor.safetensors"
FORMAT = "fewstep-solver/1"


@dataclass(frozen=True, eq=False)
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
        facts = {**self._facts(), "nfe": None}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        return digest.hexdigest()[:12]

    def program(self) -> Program:
        """For the loop."""
        program = self.method.program()
        weights = str(self.model.get("weights") or "")
        return replace(program, name=f"{program.name} {self.digest}", learned_on=weights)

    def plan(self) -> Plan:
        """The same as a static plan, every number in it.

        Errors: ValueError where the numbers differ between samples.
        """
        return self.method.plan()

    def save(self, folder: Path | str) -> None:
        """Write the folder, weights first, each file whole. Errors: OSError where it cannot be."""
        folder = Path(folder)
        check_writable(folder)
        if data := self._data():
            write_whole(folder / PREDICTOR_FILE, data)
        about = {name: getattr(self, name) for name in ("model", "training", "validation")}
        write_json(folder / SOLVER_FILE, {"format": FORMAT, **self._facts(), **about})

    @classmethod
    def load(cls, folder: Path | str) -> LearnedSolver:
        """From a folder. Errors: ValueError where there is none, or it is damaged, or newer."""
        folder = Path(folder)
        path = folder / SOLVER_FILE
        if not path.is_file():
            raise ValueError(f"{folder} is not a learned solver: it has no {SOLVER_FILE}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = values["format"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a learned solver of fewstep: {error!r}") from None
        if found != FORMAT or values.get("method") not in KINDS:
            what = f"format {found!r} and method {values.get('method')!r}"
            raise ValueError(
                f"{path} has {what}, this version reads {FORMAT!r} with {', '.join(KINDS)}; "
                "update fewstep"
            )
        try:
            data = _read(folder / PREDICTOR_FILE) if values["predictor_sha256"] else b""
            if (_hash(data) if data else None) != values["predictor_sha256"]:
                raise ValueError(f"{PREDICTOR_FILE} is damaged or of another solver")
            tensors = safetensors.torch.load(data) if data else {}
            method = KINDS[values["method"]].read(
                values["base"],
                check_grid(values["sigmas"]),
                values["first"],
                values["settings"],
                tensors,
            )
            solver = cls(method, *(dict(values[k]) for k in ("model", "training", "validation")))
            if solver.nfe != values["nfe"]:
                raise ValueError(f"nfe is {values['nfe']!r}, but it spends {solver.nfe}")
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} cannot be used: {reason}; train or fetch it again") from None
        return solver

    def _facts(self) -> dict[str, Any]:
        data = self._data()
        return {
            "method": self.method.kind,
            "base": self.method.base,
            "nfe": self.nfe,
            "first": self.method.first,
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


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    return path.read_bytes()
