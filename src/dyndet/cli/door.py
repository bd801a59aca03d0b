"""`dyndet COMMAND ...`: one door to the commands. Nothing heavy is imported before one is chosen."""

from __future__ import annotations

import difflib
import runpy
import sys
from importlib.util import find_spec

from dyndet import __version__
from dyndet.cli.usage import COMMANDS, command_help, overview


def main() -> None:
    """Runs the command that the first argument names, with the others as its own; exits with 2 on a wrong one."""
    available = [name for name in COMMANDS if find_spec(f"dyndet.{name}") is not None]
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview(available))
    elif name in ("-V", "--version"):
        print(f"dyndet {__version__}")
    elif name not in available:
        print(f"error: {_unknown(name, available)}", file=sys.stderr)
        sys.exit(2)
    elif (text := command_help(name, arguments)) is not None:
        print(text)
    else:
        # As `python -m dyndet.NAME` does: processes that join a run start by what `__main__` is called.
        sys.argv = [f"dyndet {name}", *arguments]
        runpy.run_module(f"dyndet.{name}", run_name="__main__", alter_sys=True)


def _unknown(name: str, available: list[str]) -> str:
    if "=" in name or name.startswith("-"):
        return f"the command comes first: dyndet {'|'.join(available)} {name} ..."
    near = difflib.get_close_matches(name, available, n=1)
    meant = f"Did you mean {near[0]!r}?" if near else f"Commands: {', '.join(available)}."
    return f"there is no command {name!r}. {meant} (dyndet --help says what they do)"
