"""Paths as a user types them: Hydra's grammar has its own uses for =, (, [, {, commas, quotes and spaces."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, read_write

from dyndet.errors import UserError

_NAMES = r"ckpt|ckpt_path|init|source|out|runs|root|config|weights|folder|dir|dirpath|\w*annotations|\w*images"
_PATH_KEY = re.compile(rf"\+{{0,2}}(?:[\w.]+\.)?(?:{_NAMES})")
_COUNTS = re.compile(r"(?:.*\.)?\w*images")
"""Keys that are a folder here and a number of images there."""
_WITH_VALUE = (
    "-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir",
    "--experimental-rerun",
)  # fmt: skip

_FLAGS = {
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun",
    "--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info",
}  # fmt: skip
"""Of Hydra, which would take any that starts alike for one of them."""


def quote(text: str) -> str:
    """Text in the quotes that make Hydra take it as it is."""
    literal = re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", text)  # no interpolation
    return QuotedString(literal, Quote.single if '"' in literal and "'" not in literal else Quote.double).with_quotes()


def raw(overrides: Sequence[str]) -> list[str]:
    """Hydra's own list of overrides as they were given: what they refer to may not be known yet, or lie elsewhere."""
    given: Any = OmegaConf.to_container(overrides, resolve=False)
    return list(given)


def flags_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, and the overrides: Hydra itself wants either in one piece."""
    flags, overrides = [], []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_flag = argument.startswith("-") or before in _WITH_VALUE or not ("=" in argument or argument[0:1] == "~")
        (flags if is_flag else overrides).append(argument)
    return flags, overrides


def check_words(arguments: Sequence[str]) -> None:
    """Whether every argument is a flag, the value of one, or sets a key.

    Raises:
        UserError: naming the first that is not.
    """
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=False):
        key, sign, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and f"--{key}" not in _FLAGS:
            meant = f"{'+' * (key == 'experiment')}{key}={value if sign else after or 'VALUE'}"
            raise UserError(f"there is no flag --{key}: keys have no dashes; write {meant}")
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_value = before in (*_WITH_VALUE, "--info", "-i")
        if not (argument.startswith(("-", "~")) or is_value or "=" in argument):
            raise UserError(f"{argument!r} sets nothing: write KEY=VALUE, without spaces around the =; --help has keys")


def read_paths(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments whose paths arrive as they were typed.

    A path key's value that Hydra would not read as this text is put into quotes, and a leading ~ is replaced. Lists
    ([a.jpg,b.jpg]), the values of a sweep (-m ckpt=a,b), interpolations and what stands in quotes stay what they are,
    unless a file of that very name is there.

    Args:
        arguments: of a command line.

    Returns:
        The arguments, and from those that changed to what they were read as.
    """
    sweeping = bool({"-m", "--multirun"} & set(arguments))
    read = [_read(argument, sweeping) for argument in arguments]
    return read, {old: new for old, new in zip(arguments, read, strict=True) if old != new}


def added_or_set(argument: str) -> str:
    """`+a.b=c`, which is refused where that key is there (in a later version, say), as `++a.b=c`, which sets it."""
    return f"+{argument}" if re.match(r"\+\w+(\.\w+)+=", argument) else argument


def advice(argument: str) -> str:
    """How to write an argument that Hydra cannot read, for a shell."""
    key, _, value = argument.partition("=")
    return shlex.quote(f"{key}={quote(value)}")


def check_single(config: DictConfig) -> None:
    """Whether keys of one path have one.

    Raises:
        UserError: with the quoting that makes a path of what Hydra reads as a list.
    """
    for key in ("ckpt", "ckpt_path", "init", "runs", "out"):
        value = config.get(key)
        if OmegaConf.is_config(value):
            raise UserError(f"{key} must be one path, got {value}: {advice_on_brackets(key)}")


def advice_on_brackets(key: str) -> str:
    """What to say where a list was read in place of a path."""
    return f"a path with brackets goes in quotes twice, '{key}=\"[...]\"'"


def expand_home(config: DictConfig) -> None:
    """Replaces a leading ~ in the paths of a configuration, those of files included."""
    with read_write(config):
        _expand(config)


def _read(argument: str, sweeping: bool) -> str:
    key, sign, value = argument.partition("=")
    if not sign or not _PATH_KEY.fullmatch(key) or value in ("", "???") or value.lower() == "null":
        return argument
    return f"{key}={_as_typed(key, value, sweeping)}"


def _as_typed(key: str, value: str, sweeping: bool) -> str:
    """What to write after a key; `value` where Hydra reads what was meant."""
    path = os.path.expanduser(value) if value.startswith("~") else value  # noqa: PTH111 (Path would tidy the rest)
    parsed = _parsed(key, value)
    there = _exists(path)
    meant = None if parsed is None or parsed.is_sweep_override() else parsed.value()
    if there:
        return value if meant == value == path else quote(path)
    several = sweeping and "," in value and not _in_quotes(value)
    listed = value.startswith("[") and value.endswith("]")
    if parsed is None and (several or listed):
        inner = value[1:-1] if listed else value
        joined = ",".join(_as_typed(key, item, False) for item in inner.split(","))
        joined = f"[{joined}]" if listed else joined
        return joined if _parsed(key, joined) else quote(path)
    if parsed is None or path != value:
        return quote(path)
    if parsed.is_sweep_override():
        return value if sweeping else quote(value)
    if isinstance(meant, str):
        as_written = meant == value or _in_quotes(value) or "\\" in value
        return value if as_written or "${" in value else quote(value)
    kept = meant is None or isinstance(meant, list)
    count = isinstance(meant, int) and not isinstance(meant, bool) and _COUNTS.fullmatch(key.lstrip("+"))
    return value if kept or count else quote(value)


def _parsed(key: str, value: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        return None


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or a null byte
        return False


def _in_quotes(value: str) -> bool:
    return len(value) > 1 and value[0] in "'\"" and value[0] == value[-1]


def _expand(node: Any) -> None:
    keys = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        value = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if OmegaConf.is_config(value):
            _expand(value)
            continue
        raw = getattr(value, "_value", lambda: None)()
        name = node._get_full_key("") if isinstance(node, ListConfig) else str(key)
        if isinstance(raw, str) and raw.startswith("~") and _PATH_KEY.fullmatch(re.sub(r"(\[.*)|\.$", "", name)):
            node[key] = os.path.expanduser(raw)  # noqa: PTH111
