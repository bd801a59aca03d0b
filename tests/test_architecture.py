"""The house rules that a machine can check: one direction of imports, small files, no registries."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "dyndet"

# A module may import from its own layer and from those before it.
LAYERS = [
    ("errors", "disk", "sealed", "layout", "moved", "routing", "signals", "structures", "inputs"),
    ("ops", "kernels"),
    ("models",),
    ("data",),
    ("metrics", "report", "checkup"),
    ("speeds",),
    ("cli", "conf"),
    ("checkpoints",),
    ("lightning",),
    ("api",),
    ("train", "evaluate", "predict", "calibrate", "convert", "doctor", "replay", "report.__main__", "__main__"),
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


NAMES = {name_of(path) for path in MODULES}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dyndet."):
            module = node.module.removeprefix("dyndet.")
            parts = {f"{module}.{alias.name}" for alias in node.names}
            found |= (parts & NAMES) or {module}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("dyndet.") for alias in node.names if alias.name.startswith("dyndet.")}
    return found


def test_imports_point_one_way() -> None:
    """Further in or beside; the package itself offers the API lazily."""
    names = {name_of(path): imports(path) for path in MODULES if name_of(path)}
    wrong = [f"{name} imports {item}" for name, items in names.items() for item in items if layer(item) > layer(name)]
    assert not wrong, "these import what lies further out"


def test_nothing_goes_round_in_circles() -> None:
    """Module by module: what a module imports never leads back to it."""
    graph = {name_of(path): imports(path) for path in MODULES if name_of(path)}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for item in sorted(graph.get(name, set())):
                visit(item, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_files_stay_small() -> None:
    assert not [str(path) for path in MODULES if len(path.read_text().splitlines()) > 400]


def test_no_two_files_of_one_name_where_a_reader_must_guess() -> None:
    """But for packages' own files, commands, and the back ends, which answer each other by name."""
    names = Counter(path.stem for path in MODULES if not {"kernels", "sparse"} & set(path.parts))
    assert {name for name, count in names.items() if count > 1} == {"__init__", "__main__"}


def test_kernels_are_imported_from_one_place() -> None:
    users = {name_of(path) for path in MODULES if any(item.startswith("kernels") for item in imports(path))}
    assert {user for user in users if not user.startswith("kernels")} == {"ops.sparse.triton_backend"}
