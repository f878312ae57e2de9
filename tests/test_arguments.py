"""Arguments of the wrong kind are refused in one line that names them, wherever they come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep import learned
from fewstep.arguments import number, sides, text, whole
from fewstep.data.captions import read_captions
from fewstep.denoiser import Clipped, Counted, Guided, Predicted, Thresholded
from fewstep.models import of
from fewstep.sampling.request import Request
from fewstep.sampling.settings import Settings
from fewstep.schedule import VP
from tests.support.testbed import Mixture

D, NONE = Mixture(), object()
X = torch.ones(2, 3, dtype=torch.float64)
WRONG: tuple[Any, ...] = (NONE, b"x", {}, lambda: 0, torch.zeros(2), float("nan"))


def solved(**how: Any) -> Any:
    x = {"denoiser": D, "x_T": X, "solver": "ddim", "nfe": 2, "seeds": [0, 1], **how}
    return fewstep.solve(**x)


def trained(**how: Any) -> Any:
    return learned.train(**{"denoiser": D, "shape": (3,), "nfe": 2, "trajectories": 2, **how})


Case = tuple[Callable[..., Any], str, tuple[Any, ...]]
CASES: list[Case] = [
    (solved, "denoiser", (None, True, "x", [], *WRONG[:3], int)),
    (solved, "x_T", (None, True, 1.5, "x", [1.0], *WRONG[:4])),
    (solved, "solver", (True, 1.5, [], "", *WRONG)),
    (solved, "nfe", (True, False, 1.5, "2", [2], *WRONG)),
    (solved, "grid", (True, 3, "", [True, 1.0], ["a"], *WRONG)),
    (solved, "sigma_min", (True, "0.1", [], *WRONG[:5])),
    (solved, "sigma_max", (True, "80", [], *WRONG[:5])),
    (solved, "seeds", (True, 5, *WRONG[:2])),
    (solved, "afs", (True, "", 0, [], *WRONG)),
    (solved, "final", (None, 1, 0, "no", "", *WRONG)),
    (solved, "end", (True, "", 0, [], *WRONG)),
    (fewstep.solver.get, "name", (None, True, 3, "", [], *WRONG)),
    (fewstep.register, "solver", (None, "ddim", 3, *WRONG)),
    (fewstep.nfe, "plan", (None, "ddim", [], *WRONG)),
    (fewstep.flatten, "plan", (None, "ddim", [], *WRONG)),
    (fewstep.load, "name_or_path", (None, True, 3, "", "a\0b", [], *WRONG)),
    (trained, "denoiser", (None, True, "x", int)),
    (trained, "shape", (None, 3, "3", [True], (0,), *WRONG)),
    (trained, "method", (None, True, [], "", *WRONG)),
    (trained, "nfe", (None, True, 1.5, "2", *WRONG)),
    (trained, "batch", (None, True, 1.5, *WRONG)),
    (trained, "base", (True, 3, [], "", *WRONG)),
    (trained, "inner", (True, 1.5, -1, "2", *WRONG)),
    (trained, "lr", (True, "0.1", [], *WRONG)),
    (trained, "fallback", (None, 1, "no", *WRONG)),
    (learned.LearnedSolver.load, "folder", (None, True, 3, "", [], *WRONG)),
    (read_captions, "path", (None, True, 3, "", [], *WRONG)),
    (fewstep.Plan.read, "path", (None, True, 3, "", [], *WRONG)),
    (Clipped, "denoiser", (None, True, "x")),
    (Counted, "denoiser", (None, True, "x")),
    (Thresholded, "denoiser", (None, True, "x")),
]


@pytest.mark.parametrize(
    "function, name, values", CASES, ids=lambda one: getattr(one, "__name__", "")
)
def test_a_value_of_the_wrong_kind_is_refused_in_one_line(function, name, values) -> None:
    for value in values:
        with pytest.raises(ValueError, match=r"^[^\n]{20,400}$"):
            function(**{name: value})


@pytest.mark.parametrize("make", [
    lambda: Predicted(None, VP.linear(), "eps"), lambda: Predicted(D, None, "eps"),  # type: ignore[arg-type]
    lambda: Predicted(D, VP.linear(), ["eps"]), lambda: Guided(None, 2.0, X, X),  # type: ignore[arg-type]
    lambda: Guided(D, "2", X, X), lambda: Guided(D, True, X, X), lambda: Clipped(D, "a", 1.0),  # type: ignore[arg-type]
    lambda: Thresholded(D, quantile=True), lambda: of(D, name="", shape=(3,)),
    lambda: of(None, name="x", shape=(3,)), lambda: of(D, name=None, shape=(3,)),  # type: ignore[arg-type]
    lambda: fewstep.freeze("x", prediction="x0", depth=1),  # type: ignore[arg-type]
    lambda: fewstep.freeze([fewstep.Combine(1.0, 1.0)], prediction="x0", depth=1),  # type: ignore[arg-type]
    lambda: fewstep.Solver("", lambda s: iter(()), "x0", 1, 1),  # type: ignore[arg-type]
    lambda: fewstep.Solver("x", None, "x0", 1, 1),  # type: ignore[arg-type]
    lambda: fewstep.Solver("x", lambda s: iter(()), "v", 1, 1),  # type: ignore[arg-type]
    lambda: fewstep.Solver("x", lambda s: iter(()), "x0", True, 1),  # type: ignore[arg-type]
    lambda: fewstep.Solver("x", lambda s: iter(()), "x0", 1, 1.5),  # type: ignore[arg-type]
    lambda: Request([True]), lambda: Request("12"), lambda: Request(b"12"), lambda: Request([1.0]),  # type: ignore[arg-type]
    lambda: Request([1], guidance="2"), lambda: Request([1], guidance=True),  # type: ignore[arg-type]
    lambda: Request([1], image="x", strength="0.5"), lambda: Settings(head_start="3"),  # type: ignore[arg-type]
    lambda: Settings(head_start=True), lambda: fewstep.load("x", device=3),  # type: ignore[arg-type]
    lambda: fewstep.load("x", dtype=None), lambda: fewstep.load("x", compile=1),  # type: ignore[arg-type]
])  # fmt: skip
def test_so_is_one_where_something_is_made(make) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{20,400}$"):
        make()


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_numpy_and_torch_are_whole_numbers(value) -> None:
    assert type(whole("n", value)) is int
    assert Request((value,)).seeds == (3,)
    assert Settings(nfe=value).nfe == 3
    assert type(number("n", value)) is float


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True)])
def test_a_bool_is_no_number(value) -> None:
    for kind in (whole, number, text):
        with pytest.raises(ValueError, match=r"^n must be"):
            kind("n", value)
    assert sides("shape", [3, 4]) == (3, 4)
