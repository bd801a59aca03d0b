"""Defaults of constructors, read from their source: configurations are composed without importing torch."""

from __future__ import annotations

import ast
import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_NOT_PLAIN = object()


@functools.cache
def plain_defaults(target: str) -> dict[str, Any]:
    """The arguments of a class, a function or a method of dyndet that have plain defaults, in the signature's order.

    Plain are numbers, strings, booleans, None, and lists of them (tuples become lists).

    Args:
        target: dotted, as in `_target_`.
    """
    found = _find(target)
    return {} if found is None else _of(*found)


def _find(target: str) -> tuple[ast.AST, str] | None:
    """What a dotted name means: its definition and the module that holds it."""
    module, names = _split(target)
    node: ast.AST | None = _tree(module)
    for name in names:
        node = next((item for item in ast.iter_child_nodes(node) if getattr(item, "name", None) == name), None)
        if node is None:
            home = _imports(module).get(name) if name == names[0] else None
            return _find(".".join([home, *names[1:]])) if home else None
    return node, module


def _split(target: str) -> tuple[str, list[str]]:
    """The module of a dotted name, and what follows. Only packages are imported on the way, which hold no code."""
    parts = target.split(".")
    for end in range(1, len(parts)):
        inner = ".".join(parts[: end + 1])
        spec = find_spec(".".join(parts[:end]))
        if spec is None or spec.submodule_search_locations is None or find_spec(inner) is None:
            return ".".join(parts[:end]), parts[end:]
    return target, []


@functools.cache
def _tree(module: str) -> ast.Module:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return ast.Module([], [])
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _imports(module: str) -> dict[str, str]:
    """Names that a module takes from others of dyndet."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in _tree(module).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dyndet.")
        for alias in node.names
    }


def _of(node: ast.AST, module: str) -> dict[str, Any]:
    if isinstance(node, ast.FunctionDef):
        return _of_function(node, module)
    if not isinstance(node, ast.ClassDef):
        return {}
    start = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    if start is not None:
        return _of_function(start, module)
    inherited: dict[str, Any] = {}
    for base in node.bases:
        name = ast.unparse(base)
        home = _find(_imports(module).get(name, f"{module}.{name}"))
        inherited |= {} if home is None else _of(*home)
    if any("dataclass" in ast.unparse(item) for item in node.decorator_list):
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        return inherited | _plain({ast.unparse(item.target): item.value for item in fields}, module)
    return inherited


def _of_function(node: ast.FunctionDef, module: str) -> dict[str, Any]:
    names = [*node.args.posonlyargs, *node.args.args]
    values: list[ast.expr | None] = [None] * (len(names) - len(node.args.defaults)) + list(node.args.defaults)
    pairs = [*zip(names, values, strict=True), *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    return _plain({name.arg: value for name, value in pairs}, module)


def _plain(values: dict[str, ast.expr | None], module: str) -> dict[str, Any]:
    read = {name: _value(value, module) for name, value in values.items() if value is not None}
    return {name: value for name, value in read.items() if value is not _NOT_PLAIN}


def _value(node: ast.expr, module: str) -> Any:
    try:
        return _listed(ast.literal_eval(node))
    except ValueError:
        name = ast.unparse(node)
    if home := _imports(module).get(name):
        module, _, name = home.rpartition(".")
    assigned = (item for item in _tree(module).body if isinstance(item, ast.Assign))
    named = (item.value for item in assigned if ast.unparse(item.targets[0]) == name)
    return next((_value(value, module) for value in named), _NOT_PLAIN)


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        items = [_listed(item) for item in value]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else items
    return value if value is None or isinstance(value, bool | int | float | str) else _NOT_PLAIN
