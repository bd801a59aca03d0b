"""Configured values against the types that their targets declare, so that a mistake is named by its key."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf

from dyndet.cli.quoting import advice_on_brackets
from dyndet.errors import UserError

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    Path: "a path",
    NoneType: "null",
}


def check_arguments(config: Any) -> None:
    """Checks the numbers, flags and words of every `_target_` in a configuration; anything else is left to the target.

    Raises:
        UserError: naming the key, what it may be, and what it is.
    """
    if isinstance(config, ListConfig):
        for index in range(len(config)):
            if not OmegaConf.is_missing(config, index):
                check_arguments(config[index])
        return
    if not isinstance(config, DictConfig) or OmegaConf.is_missing(config, "_target_"):
        return
    accepted = _accepted(config["_target_"]) if "_target_" in config else {}
    names = _names(config["_target_"]) if "_target_" in config else None
    for key in config:
        if names is not None and key not in names and not str(key).startswith("_"):
            path, part = config._get_full_key(key), config["_target_"].rpartition(".")[2]
            raise UserError(f"{path}: {part} has no argument {str(key)!r}; ~{path} drops what an experiment set")
        if OmegaConf.is_missing(config, key):
            continue
        value = config[key]
        if OmegaConf.is_config(value):
            check_arguments(value)
        if key in accepted and not _is_part(value) and not any(_fits(value, kind) for kind in accepted[key]):
            shown = "null" if value is None else repr(value)
            if int in accepted[key] and isinstance(value, float) and value.is_integer():
                shown += f": write {int(value)}"
            wanted = " or ".join(_described(kind) for kind in accepted[key])
            bracketed = Path in accepted[key] and OmegaConf.is_config(value)
            more = f": {advice_on_brackets(_source(config, key))}" if bracketed else ""
            raise UserError(f"{_source(config, key)} must be {wanted}, got {shown}{more}")


def _is_part(value: Any) -> bool:
    """What is built in its place, and may be anything."""
    return isinstance(value, DictConfig) and "_target_" in value


def _source(config: DictConfig, key: Any) -> str:
    """The key that sets a value: where it refers to another, that one."""
    raw = OmegaConf.to_container(config, resolve=False)
    link = re.fullmatch(r"\$\{(\w[\w.]*)\}", str(raw[key])) if isinstance(raw, dict) else None
    return link.group(1) if link else str(config._get_full_key(key))


@functools.cache
def _names(target: str) -> frozenset[str] | None:
    """The arguments of one of dyndet's own parts; None where it takes any, or is not ours to explain."""
    try:
        parameters = inspect.signature(resolve_name(target)).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError):
        return None
    anything = any(item.kind is item.VAR_KEYWORD for item in parameters)
    return None if anything or not target.startswith("dyndet.") else frozenset(item.name for item in parameters)


@functools.cache
def _accepted(target: str) -> dict[Any, tuple[Any, ...]]:
    """What the target's simply typed arguments may be: kinds of `_WORDS`, or a Literal."""
    try:
        called = resolve_name(target)
        hints = get_type_hints(called.__init__ if inspect.isclass(called) else called)
    except (ImportError, AttributeError, ValueError, NameError, TypeError):
        return {}  # no such target, which building explains; or names that exist for type checkers only
    kinds = {name: _alternatives(hint) for name, hint in hints.items() if name != "return"}
    return {name: kind for name, kind in kinds.items() if all(k in _WORDS or get_origin(k) is Literal for k in kind)}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for item in get_args(hint) for kind in _alternatives(item))
    return (hint,)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {float: (int, float), Path: (str, Path)}.get(kind, kind))


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join('null' if item is None else str(item) for item in get_args(kind))}"
    return _WORDS[kind]
