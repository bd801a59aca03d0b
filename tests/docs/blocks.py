"""Code blocks of the pages: finding them, and checking every command in them against the program.

A comment before a block says how it is tested. Nothing: every command's configuration is composed and its values are
checked. Otherwise the first word is one of

    <!-- test: run KEY=VALUE calibrate: KEY=VALUE -->   run for real, these added to `train` and to `calibrate`
    <!-- test: slow ... -->                             the same, among the slow tests
    <!-- test: skip REASON -->                          needs GPUs, downloads or a cluster: composed
    <!-- test: pending ... -->                          of a part that is not there yet; what follows is as above
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from dyndet.cli.arguments import check_arguments
from dyndet.cli.compose import compose_command

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("train", "evaluate", "predict", "calibrate", "report", "convert", "doctor")
# Lines of a shell that are no business of ours, by their first word.
SHELL = ("cd", "ls", "cat", "git", "source", "sbatch", "open", "unzip", "docker")
PARTS = ("preprocess", "backbone", "neck", "head", "predictor", "budget", "optim", "router_loss", "router")

FLAGS = ("-m", "--multirun", "--help", "-h", "--cfg", "job")
Call = tuple[str, list[str]]
"""A command of dyndet and its arguments."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, its lines, and the words of the comment before it."""

    page: str
    line: int
    language: str
    text: str
    mark: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def pending(self) -> bool:
        return self.mark[:1] == ("pending",)

    @property
    def how(self) -> str:
        """run, slow, skip, or "" for composing."""
        words = self.mark[1:] if self.pending else self.mark
        return words[0] if words and words[0] in ("run", "slow", "skip") else ""

    def added(self, command: str) -> list[str]:
        """What the test adds to a command."""
        words = self.mark[self.mark.index(self.how) + 1 :] if self.how in ("run", "slow") else ()
        added, to = [], "train"
        for word in words:
            if word.endswith(":"):
                to = word[:-1]
            elif to == command:
                added.append(word)
        return added


def blocks_of(page: Path) -> list[Block]:
    """Blocks of commands and code, in order. One without a language counts if a line of it starts like a command."""
    found: list[Block] = []
    mark: tuple[str, ...] = ()
    variables: dict[str, str] = {}  # of the shell in which a reader types one block after the other
    start, language, lines = 0, None, []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = re.fullmatch(r"\s*```(\S*)\s*", line)
        comment = re.fullmatch(r"\s*<!-- test: (.+) -->", line)
        if language is not None and fence:
            text = "\n".join(lines)
            if not language and re.search(r"^(dyndet|python|make|pip) ", text, re.M):
                language = "bash"
            if language:
                found.append(Block(page.name, start, language, text, mark, variables))
            start, language, lines, mark = 0, None, [], ()
        elif language is not None:
            lines.append(line)
        elif fence:
            start, language = number, fence.group(1)
        elif comment:
            mark = tuple(comment.group(1).split())
        elif line.strip():
            mark = ()
    assert language is None, f"{page.name}:{start}: the block has no end"
    return found


def lines_of(block: Block) -> Iterator[list[str]]:
    """Words of every command line, with variables put in and comments left out."""
    text = re.sub(r"<(\w+)>", r"\1", block.text)  # <date> stands for a name
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    variables = block.variables
    for line in text.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b|\${{{name}}}", value, line)
        words = shlex.split(line, comments=True)
        if len(words) == 1 and re.match(r"[A-Za-z_]\w*=", words[0]):
            name, _, value = words[0].partition("=")
            variables[name] = value
        elif words:
            yield words


def call_of(words: list[str]) -> Call | None:
    """The command of dyndet that a line calls, if it does."""
    match words:
        case ["dyndet", name, *arguments] | ["python", "-m", "dyndet", name, *arguments]:
            return name, arguments
        case ["python", "-m", module, *arguments] if module.startswith("dyndet."):
            return module.removeprefix("dyndet."), arguments
        case ["make", "train", *rest]:
            added = [word.removeprefix("ARGS=").split() for word in rest]
            return "train", ["+experiment=shapes_dyn", *(item for words in added for item in words)]
    return None


def check_line(words: list[str]) -> None:
    """Whether a line can be run: its command, its flags, its keys and the kinds of their values.

    Raises:
        AssertionError, UserError: saying what is wrong with it.
    """
    called = call_of(words)
    if called is not None:
        check_call(*called)
        return
    match words:
        case ["dyndet"] | ["python", "-m", "dyndet"]:
            pass
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"the Makefile has no {target}"
        case ["python", script, *arguments]:
            source = (ROOT / script).read_text()
            flags = [word for word in arguments if word.startswith("--")]
            assert all(f'"{flag}"' in source for flag in flags), f"{script} does not take {flags}"
        case ["pip" | "uv", *rest]:
            check_install(rest)
        case [first, *_]:
            assert first in SHELL, f"{first!r} is no command that the tests of the pages know"


def check_call(name: str, arguments: list[str]) -> None:
    assert name in COMMANDS, f"there is no command {name!r}"
    words = [word for word in arguments if word not in FLAGS and not word.startswith("hydra.")]
    for job in sweep(words) if {"-m", "--multirun"} & {*arguments} else [words]:
        check_job(name, tuple(job))


@cache
def check_job(name: str, job: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of names that were given up
        config = compose_command(name, job)
    if name == "train" and config.data.num_classes is None:  # the data says it
        config.data.num_classes = 80
    for part in (config.get(part) for part in PARTS):
        if OmegaConf.is_config(part):
            check_arguments(part)
    if name == "train":
        check_arguments(config.data.module)


def sweep(arguments: list[str]) -> list[list[str]]:
    """Jobs of a multirun in which every choice of a part or an experiment occurs; of numbers the first ones do."""
    choices, jobs = [], 1
    for item in OverridesParser.create().parse_overrides(arguments):
        text = item.input_line or ""
        values = [str(value) for value in item.sweep_string_iterator()] if item.is_sweep_override() else []
        choices.append([f"{text.partition('=')[0]}={value}" for value in values] or [text])
        if any(re.match("[a-z]", value) for value in values):
            jobs = max(jobs, len(values))
    return [[values[index % len(values)] for values in choices] for index in range(jobs)]


def check_install(words: list[str]) -> None:
    """The extras that are installed are ours."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        assert {*names.split(",")} <= {*extras}, f"pyproject.toml has no extras {names}"


def check_block(block: Block) -> None:
    """Whether a block says what can be run, without running it."""
    if block.language == "python":
        compile(block.text, str(block), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    elif block.language in ("bash", "console"):
        for words in lines_of(block):
            try:
                check_line(words)
            except Exception as error:
                raise AssertionError(f"{block}: {shlex.join(words)}\n{error}") from error
    elif block.language == "yaml":
        OmegaConf.create(block.text)
    elif block.language == "json":
        json.loads(block.text)
    else:
        assert block.language in ("text",), f"{block}: a block in {block.language!r} is not tested: say text"
