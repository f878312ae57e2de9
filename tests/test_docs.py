"""What the documents say is so: their code runs, their tables agree with the registry."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from fewstep.solver import get, names, registry

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")])
DESIGN = ROOT / "docs" / "design.md"
LAWS = ROOT / "docs" / "laws.md"

# A block that needs a file or minutes has this comment, with the reason, on the line before it.
NOT_RUN = re.compile(r"<!-- not run: .+ -->")

# Each example's main(...) with arguments that keep it short.
EXAMPLES = {
    "compare_solvers": {"solvers": ("heun", "dpmpp-2m"), "budgets": (4, 10), "points": 64},
    "own_network": {"updates": 200, "solvers": ("dpmpp-2m",), "points": 200},
    "previews": {"seeds": (1_000_000,), "nfe": 3},
}


def blocks(path: Path) -> list[tuple[int, str]]:
    """The ```python blocks that are to be run, with the line on which each begins."""
    found, lines = [], path.read_text(encoding="utf-8").splitlines()
    start = None
    for i, line in enumerate(lines):
        if start is None and line.strip() == "```python":
            start = i + 1
        elif start is not None and line.strip() == "```":
            if not (start > 1 and NOT_RUN.fullmatch(lines[start - 2].strip())):
                found.append((start, "\n".join(lines[start:i]) + "\n"))
            start = None
    assert start is None, f"{path.name} has a code block without an end"
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if blocks(p)], ids=name_of)
def test_code_in_the_documents_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # what they add goes again
    namespace = {"__name__": "document"}
    grad = torch.is_grad_enabled()
    for start, text in blocks(path):
        code = compile("\n" * start + text, str(path), "exec")  # so that tracebacks name the line
        exec(code, namespace)
    assert torch.is_grad_enabled() == grad


@pytest.mark.parametrize("name", sorted(p.stem for p in ROOT.glob("examples/*.py")))
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(f"examples.{name}").main(**EXAMPLES[name]) is not None


def table_rows() -> dict[str, list[str]]:
    """The cells behind each solver's name in the tables of docs/design.md."""
    text = DESIGN.read_text(encoding="utf-8")
    section = text[text.index("## Every solver") : text.index("Other names for some")]
    rows: dict[str, list[str]] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        for name in re.findall(r"`([^`]+)`", cells[0]) if line.startswith("|") else []:
            assert name not in rows, f"{name} has two rows"
            rows[name] = cells[1:]
    return rows


def test_the_tables_have_every_solver():
    assert sorted(table_rows()) == sorted(names())


@pytest.mark.parametrize("name", names())
def test_the_tables_agree_with_the_registry(name):
    solver, sigmas = get(name), [8.0, 4.0, 2.0, 1.0]
    spent = solver.on(sigmas).evaluations // 3
    degree = f"{solver.degree} in {solver.variable}" if solver.degree else "0"
    cells = [solver.prediction, str(solver.order), degree, str(solver.depth), str(spent)]
    cells += [", ".join(f"`{k}` = {v:g}" for k, v in solver.options)] * solver.stochastic
    assert table_rows()[name] == cells


def test_the_aliases_are_listed():
    text = DESIGN.read_text(encoding="utf-8")
    section = text[text.index("Other names for some") : text.index("## Published slips")]
    rows = re.findall(r"^\| (`.+`) \| `(.+)` \|$", section, re.MULTILINE)
    listed = {alias: name for left, name in rows for alias in re.findall(r"`([^`]+)`", left)}
    assert listed == registry.ALIASES


def test_what_to_add_is_named_where_it_is():
    """The files of the table are there, and so are the tables in them."""
    text = DESIGN.read_text(encoding="utf-8")
    section = text[text.index("| to add | write |") : text.index("### A command")]
    places = set(re.findall(r"`([\w/]+(?:/|\.py|\.md))`", section))
    home = {
        place: next(p for p in (ROOT / "src/fewstep" / place, ROOT / place) if p.exists())
        for place in places
    }
    named = re.findall(r"((?:`[A-Z]+`(?: and )?)+) in `([\w/]+\.py)`", section)
    assert len(named) > 8
    for tables, place in named:
        for table in re.findall(r"[A-Z]+", tables):
            assert re.search(rf"^{table}\b", home[place].read_text(encoding="utf-8"), re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as they are made on the web."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        other = path.parent / file if file else path
        assert other.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(other), f"{target} has no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_lines_are_at_most_120_columns(path):
    """Rows of tables may be as wide as what they hold."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    assert not [i for i, line in lines if len(line) > 120 and not line.startswith("|")]


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_laws_are_tests_that_are_there():
    """docs/laws.md names each test by file and function, and has every file of tests/laws."""
    named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", LAWS.read_text(encoding="utf-8"))
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert not missing
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/laws/test_*.py")}
    assert files <= {file for file, _ in named}
