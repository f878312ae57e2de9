"""Imports of fewstep run one way: a room may import the rooms before it. There are no cycles.

Imports inside functions count too; those for type checkers alone do not.
"""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
PACKAGE = SRC / "fewstep"
MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Rooms in their order, the lowest first. A room is a module or a package. A part of a package that
# has another place than the rest stands by its own name. Rooms in one line do not import each
# other.
ORDER = [
    ("_lazy", "extras", "text", "arguments"),
    ("sampling.settings",),
    ("files", "provenance"),
    ("data.bounds",),
    ("records", "cache"),
    ("tensors", "pickles", "schedule", "noise"),
    ("grid", "denoiser"),
    ("plan",),
    ("solver",),
    ("loop",),
    ("data", "networks"),
    ("train",),
    ("solving",),
    ("reference",),
    ("models",),
    ("train.network",),
    ("data.training", "networks.features"),
    ("learned",),
    ("sampling",),
    ("evaluate",),
    ("scale",),
    ("distillation",),
    ("report",),
    ("integrations",),
    ("serve",),
    ("cli",),
]
# Imports against the order, inside functions: most runs never reach them.
DEFERRED = {
    "solving": {"learned"},  # a solver by the folder of a learned one
}
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def room_of(module: str) -> str:
    """The longest name of a room that a module is in; "" for the package itself."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((name for name in names if name in RANK), ".".join(parts))


def imported_by(path: Path, lazy: bool = True) -> set[str]:
    """Modules of fewstep that a file imports; `lazy`: those inside functions too."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if not lazy and isinstance(node, ast.FunctionDef):
            return
        if isinstance(node, ast.Import):
            found.update(one.name for one in node.names)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{one.name}" for one in node.names}
            found.update(name if name in MODULES else node.module for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return {name for name in found if name in MODULES}


def test_every_room_has_its_place():
    assert {room_of(module) for module in MODULES} - {"", "__main__"} <= set(RANK)


def test_the_design_lists_the_rooms_in_their_order():
    """Modules with a place of their own inside a room have no line of theirs."""
    text = (SRC.parent / "docs" / "design.md").read_text(encoding="utf-8")
    section = text[text.index("| room | what it holds |") : text.index("There are no cycles.")]
    cells = [line.split("|")[1] for line in section.strip().splitlines()]
    listed = [
        room.removesuffix(".py") for room in re.findall(r"`(\w+(?:\.py)?)/?`", "".join(cells))
    ]
    assert sorted(listed) == sorted(room for room in RANK if "." not in room and room != "_lazy")
    assert [RANK[room] for room in listed] == sorted(RANK[room] for room in listed)


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) in RANK])
def test_a_module_imports_only_rooms_below_its_own(module):
    own = room_of(module)
    wrong = [
        other
        for other in sorted(imported_by(MODULES[module]))
        if room_of(other) not in {own, *DEFERRED.get(own, ())}
        and RANK.get(room_of(other), len(ORDER)) >= RANK[own]
    ]
    assert not wrong, f"{module} imports {', '.join(wrong)}"


def test_no_modules_import_each_other_in_a_cycle():
    graph = {module: imported_by(path, lazy=False) for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle: {' <- '.join(error.args[1])}")
