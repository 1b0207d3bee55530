"""Who may import whom: rooms below import nothing from above, a command's room nothing of another's, and no circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from support.command import ROOT

PACKAGE = ROOT / "gemma_tune"
# From below to above; an import goes to a line below one's own, or stays inside the package.
FLOORS = (("base", "samples"), ("config", "hub", "encoding"), ("data", "gguf", "ollama", "answers", "lora"),
          ("models",), ("measure", "run"), ("report", "rewards"), ("prepare", "train", "chat", "evaluate", "merge", "export"),
          ("api", "doctor"),
          ("cli",))
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports_of(path: Path) -> set[str]:
    """Modules of gemma_tune that a file imports anywhere: at its top, in functions, for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("gemma_tune.")}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively, which this test does not follow"
            if node.module and node.module.split(".")[0] == "gemma_tune":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {name if name in MODULES else node.module for name in names}
    return found


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
GRAPH = {name: imports_of(path) - {"gemma_tune"} for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def package(module: str) -> str:
    """The innermost package that a module lies in."""
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return e.args[1]
    return []


def test_every_import_names_a_module():
    assert len(GRAPH) > 100
    assert {used for imports in GRAPH.values() for used in imports} <= MODULES.keys()


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES if name not in ("gemma_tune", "gemma_tune.__main__")} == FLOOR.keys()


def test_imports_go_down():
    upward = [f"{name} -> {used}" for name, imports in GRAPH.items() for used in sorted(imports)
              if name not in ("gemma_tune", "gemma_tune.__main__")
              and room(used) != room(name) and FLOOR[room(used)] >= FLOOR[room(name)]]
    assert not upward


def test_no_circle_of_files():
    assert not circle(GRAPH)


def test_no_circle_of_packages():
    """A package inside another is a part of it, as the number formats are of the GGUF room."""
    packages: dict[str, set[str]] = {}
    for name, imports in GRAPH.items():
        own = package(name)
        packages.setdefault(own, set()).update(
            other for other in map(package, imports) if not f"{own}.".startswith(f"{other}.")
            and not f"{other}.".startswith(f"{own}."))
    assert not circle(packages)


def test_package_files_hold_nothing():
    """An `__init__` that imports would load a room when one of its files is needed; registries are few and listed."""
    filled = {name for name, path in MODULES.items() if path.name == "__init__.py" and path.read_text().strip()}
    assert filled == {"gemma_tune", "gemma_tune.encoding.templates", "gemma_tune.gguf.vocabulary", "gemma_tune.samples"}
