"""The floors of gptcli/README.md hold: imports go down, nothing imports in a circle, files stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gptcli"
FLOORS = {
    "errors": 0, "files": 0, "randomness": 0, "config": 0,
    "hub": 1, "tokenizer": 1, "model": 1, "contracts": 1,
    "modeldir": 2, "dist": 2, "data": 2, "generate": 2,
    "train": 3, "exchange": 3,
    "eval": 4, "inspect": 4, "doctor": 4, "report": 4, "rlhf": 4,
    "stages": 5, "api": 5, "serve": 5,
    "cli": 6,
}  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))
NO_TORCH = ("config", "tokenizer", "errors", "randomness", "hub", "cli")


def imported(path: Path, *, top_only: bool) -> set[str]:
    """Dotted names of what a module imports from gptcli (and torch), type-checking blocks left out."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    typing_only = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for n in ast.walk(block)
    }
    out = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            out |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
    return out


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    if room(path) in ("__init__", "__main__"):
        return
    for name in imported(path, top_only=False):
        parts = name.split(".")
        if parts[0] != "gptcli" or len(parts) < 2 or parts[1] not in FLOORS:
            continue
        if parts[1] != room(path):
            assert FLOORS[parts[1]] <= FLOORS[room(path)], f"{path.name} imports {name} from a higher floor"


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) in NO_TORCH], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_torch_where_it_must_not_be(path: Path) -> None:
    assert not any(name.split(".")[0] == "torch" for name in imported(path, top_only=True))


def test_no_import_circles() -> None:
    def dotted(path: Path) -> str:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    graph = {dotted(p): imported(p, top_only=True) for p in MODULES}
    graph = {m: {n for n in names if n in graph and n != m} for m, names in graph.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for child in graph[module]:
                visit(child, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_every_room_has_a_floor() -> None:
    rooms = {room(p) for p in MODULES} - {"__init__", "__main__"}
    assert rooms == FLOORS.keys()
