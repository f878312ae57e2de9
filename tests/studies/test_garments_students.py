"""Which rows of the file of students are made, and which are there already."""

from __future__ import annotations

import json
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep.learned import LearnedSolver
from fewstep.learned.tuned import Tuned
from fewstep.models import read_card
from fewstep.models.formats.loras import DIFFUSERS, save_lora
from fewstep.models.formats.native import save_folder
from studies import garments_students
from studies.commands import ended
from studies.garments_students import FIELDS, Sampler
from studies.rows import same

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "garments" / "students.json"
SIGMAS = {2: (80.0, 1.0, 0.002), 4: (80.0, 15.0, 4.0, 0.7, 0.002)}


@pytest.fixture
def made(tmp_path, monkeypatch) -> list[tuple[str, int]]:
    """The solver and budget of all pictures that are made; nothing is sampled or judged."""
    found: list[tuple[str, int]] = []

    def pictures(model: Any, texts, first: int, guidance, nfe: int, solver: str) -> np.ndarray:
        found.append((solver, nfe))
        return np.zeros((len(texts), 1, 1, 3), dtype=np.uint8)

    network = SimpleNamespace(full_name="a network")
    judges = SimpleNamespace(tells=network, sees=network, row=lambda images, asked: {"all": 0.5})
    monkeypatch.setattr(garments_students, "pictures_of", pictures)
    monkeypatch.setattr(garments_students, "Judges", SimpleNamespace(load=lambda folder: judges))
    monkeypatch.chdir(tmp_path)
    return found


def study(*more: str) -> list[dict[str, Any]]:
    given = ["--model", "fashion-mnist", "--judges", ".", "--count", "2", "--out", "rows.json"]
    return garments_students.main([*given, *more])


def table(folder: Path | str, nfe: int, change: float) -> None:
    method = Tuned.start("ddim", SIGMAS[nfe], "none")
    for value in method.learned.values():
        value += change
    LearnedSolver(method, {"weights": read_card("fashion-mnist").weights_sha256}).save(folder)


def student(to: str, change: float) -> None:
    model: Any = fewstep.load("fashion-mnist-splam")
    with torch.no_grad():
        next(model.net.parameters()).add_(change)
    save_folder(Path(to), model.card, model.net, model.stats)


def test_a_student_of_the_same_folder_name_is_made_too(made) -> None:
    student("a/splam", 0.0)
    student("b/splam", 0.1)
    rows = study("--rows", "a/splam", "b/splam", "unipc-2", "--nfe", "2")
    assert [row["row"] for row in rows] == ["splam", "splam", "unipc-2"]
    assert rows[0]["weights"] != rows[1]["weights"]
    assert study("--rows", "b/splam", "a/splam", "unipc-2", "--nfe", "2") == rows
    card = json.loads(Path("a/splam/card.json").read_text())
    card["about"]["levels"] = {}  # its levels were chosen since
    Path("a/splam/card.json").write_text(json.dumps(card))
    again = study("--rows", "a/splam", "--nfe", "2")
    assert again[:3] == rows
    assert again[3]["chosen"]["grid"] == card["auto"]["2"]["grid"]
    assert study("--rows", "a/splam", "--nfe", "2") == again
    assert made == [("auto", 2), ("auto", 2), ("unipc-2", 2), ("auto", 2)]


def test_a_folder_of_solvers_has_a_row_for_each_budget(made) -> None:
    for nfe in SIGMAS:
        table(f"tuned/{nfe}", nfe, 0.01)
    rows = study("--rows", "./tuned", "--nfe", "2", "4")
    assert [(row["row"], row["nfe"]) for row in rows] == [("tuned", 2), ("tuned", 4)]
    assert [row["solver"] for row in rows] == [
        LearnedSolver.load("tuned", nfe).digest for nfe in SIGMAS
    ]
    assert study("--rows", "tuned/", "--nfe", "2", "4") == rows
    table("tuned/4", 4, 0.02)  # trained again
    assert len(study("--rows", "./tuned", "--nfe", "2", "4")) == 3
    assert made == [("./tuned", 2), ("./tuned", 4), ("./tuned", 4)]


@pytest.mark.parametrize(
    "given, message",
    [
        ("--rows unipc-2 ./tuned --nfe 4 8", "tuned has solvers for nfe=2, 4, got nfe=8"),
        ("--rows unipc-2 ./tuned/4 --nfe 2", "was trained for nfe=4, got nfe=2"),
        ("--rows unipc-2 fashion-mnist-splam --nfe 64", "not for 64"),
        ("--rows unipc-2 ./nowhere --nfe 2", "nowhere"),
        ("--rows unipc-2 --nfe 2 --guidance 2", "is of other prompts, models or judges"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_pictures(given, message, made, capsys) -> None:
    for nfe in SIGMAS:
        table(f"tuned/{nfe}", nfe, 0.01)
    study("--rows", "ddim", "--nfe", "2")
    assert ended(lambda: study(*given.split())) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert made == [("ddim", 2)]


def test_every_row_of_the_results_names_what_was_sampled() -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    for row in rows:
        assert ("adapter" in row) == (row["row"] == "lora")
        assert ("solver" in row) == (row["row"] in ("tuned", "amed-plugin"))
        assert sum(same(one, row, FIELDS) for one in rows) == 1


NAMES = {
    "SPLAM, whole": "splam",
    "LCM, whole": "lcm",
    "SPLAM, adapters of rank 64": "lora",
    "SPLAM in segments, `--loss decoder`": "phases",
    "trajectories from there, 6,400": "trajectories",
    "trajectories, 8,960 more": "further",
    "`dpmpp-2m`": "dpmpp-2m",
    "`unipc`": "unipc",
    "`tuned`, 640 trajectories": "tuned",
    "`amed-plugin`, 640 trajectories": "amed-plugin",
}


def rounded(value: Decimal, step: str) -> str:
    """Halves go up."""
    return str(value.quantize(Decimal(step), ROUND_HALF_UP))


def test_the_table_of_the_page_is_the_file() -> None:
    found = json.loads(RESULTS.read_text(), parse_float=Decimal)["rows"]
    rows = {(row["row"], row["nfe"]): row for row in found}

    def cell(name: str, nfe: int) -> str:
        if (name, nfe) not in rows:
            return "-"
        row = rows[name, nfe]
        share, error = (rounded(100 * row[key], "0.1") for key in ("all", "error"))
        return f"{share} ± {error}, {rounded(row['frechet'] - row['frechet_bias'], '0.01')}"

    page = (ROOT / "docs" / "garments.md").read_text()
    table = page.split("| | 1 | 2 | 4 | 8 |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == len(NAMES)
    for line in table:
        name, *cells = (part.strip() for part in line.strip("|").split("|"))
        assert cells == [cell(NAMES[name], nfe) for nfe in (1, 2, 4, 8)]


@pytest.mark.slow
def test_adapters_are_told_apart_by_their_file(tmp_path) -> None:
    base: Any = fewstep.load("garments")
    name = next(n for n, _ in base.net.named_modules() if n.endswith("to_q"))
    out, inner = dict(base.net.named_parameters())[f"{name}.weight"].shape
    found = []
    for part, value in (("a", 0.0), ("b", 0.1)):
        file = tmp_path / part / "lora" / DIFFUSERS
        file.parent.mkdir(parents=True)
        pair = torch.full((2, inner), value), torch.zeros(out, 2)
        save_lora(file, {name: pair}, "unet", base.card)
        found.append(Sampler.of(str(file.parent), "garments", 5.0).known(2))
    first, second = found
    assert first["row"] == second["row"] == "lora"
    assert first["weights"] == second["weights"] == base.card.weights_sha256
    assert first["adapter"] != second["adapter"]
