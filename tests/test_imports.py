"""Law: imports run one way. Every import of src is read, those inside functions too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
# Not counted: inside a function, to keep a start quick, or still to be turned round.
LAZY = {
    ("fewstep.solving", "fewstep.learned.solver"),  # a folder of a learned solver
    ("fewstep.networks.features", "fewstep.models.network"),  # to be turned round
    ("fewstep.report.tables", "fewstep.report.comparison"),  # to be turned round
}
# A room may not import these rooms, anywhere.
FORBIDDEN = {
    "fewstep.loop": ("fewstep.solving", "fewstep.learned", "fewstep.models", "fewstep.sampling"),
    "fewstep.solver": ("fewstep.loop", "fewstep.solving", "fewstep.models", "fewstep.sampling"),
    "fewstep.plan": ("fewstep.solver", "fewstep.loop", "fewstep.solving"),
    "fewstep.grid": ("fewstep.solver", "fewstep.loop", "fewstep.solving"),
    "fewstep.schedule": ("fewstep.solver", "fewstep.loop", "fewstep.solving"),
    "fewstep.networks": ("fewstep.models", "fewstep.sampling", "fewstep.solver", "fewstep.loop"),
    "fewstep.models": ("fewstep.sampling", "fewstep.learned", "fewstep.solving", "fewstep.loop"),
    "fewstep.sampling": ("fewstep.evaluate", "fewstep.report", "fewstep.cli"),
    "fewstep.learned": ("fewstep.evaluate", "fewstep.report", "fewstep.cli"),
    "fewstep.integrations": ("fewstep.evaluate", "fewstep.report", "fewstep.cli"),
}


def modules() -> dict[str, Path]:
    paths = (path for path in SRC.rglob("*.py"))
    found = {}
    for path in paths:
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports, but for type checkers alone."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in known else node.module for one in inner}
    return {one for one in found if one in known and one != name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    found = {name: imports(name, path, known) for name, path in known.items()}
    return {name: {o for o in others if (name, o) not in LAZY} for name, others in found.items()}


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """One path from a module back to itself, if there is any."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph[name]):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := walk(name, []))), None)


def test_there_is_no_cycle(graph: dict[str, set[str]]) -> None:
    assert cycle(graph) is None


def test_a_cycle_would_be_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_run_one_way(room: str, graph: dict[str, set[str]]) -> None:
    def inside(name: str, of: str) -> bool:
        return name == of or name.startswith(of + ".")

    wrong = [
        f"{name} imports {other}"
        for name, others in graph.items()
        if inside(name, room)
        for other in others
        if any(inside(other, one) for one in FORBIDDEN[room])
    ]
    assert not wrong


def test_nothing_imports_the_package_for_its_version(graph: dict[str, set[str]]) -> None:
    assert [name for name, others in graph.items() if "fewstep" in others] == []
