"""The house rules that a machine can check: one direction of imports, small files, no registries."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "dyndet"

# A module may import from its own layer and from those before it.
LAYERS = [
    ("errors", "layout", "routing", "structures"),
    ("ops", "kernels"),
    ("models",),
    ("data",),
    ("metrics", "report"),
    ("speeds",),
    ("cli", "conf"),
    ("checkpoints",),
    ("lightning",),
    ("api",),
    ("train", "evaluate", "predict", "calibrate", "convert", "report.__main__"),
]
MODULES = sorted(path for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def layer(module: str) -> int:
    """Of a module named without the package, e.g. "models.heads.gates"."""
    places = [
        (len(name), index)
        for index, names in enumerate(LAYERS)
        for name in names
        if f"{module}.".startswith(f"{name}.")
    ]
    assert places, f"{module} belongs to no layer: add it to LAYERS"
    return max(places)[1]


def name_of(path: Path) -> str:
    if path.is_relative_to(PACKAGE):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
    else:
        parts = ("kernels", *path.relative_to(ROOT / "kernels").with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dyndet."):
            found.add(node.module.removeprefix("dyndet."))
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("dyndet.") for alias in node.names if alias.name.startswith("dyndet.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(path) or "dyndet")
def test_imports_point_one_way(path: Path) -> None:
    name = name_of(path)
    if not name:  # the package itself offers the API lazily
        return
    for imported in imports(path):
        assert layer(imported) <= layer(name), f"{name} imports {imported}, which lies further out"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(path) or "dyndet")
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_kernels_are_imported_from_one_place() -> None:
    users = {name_of(path) for path in MODULES if any(item.startswith("kernels") for item in imports(path))}
    assert {user for user in users if not user.startswith("kernels")} == {"ops.sparse.execute.triton"}
