"""Advice names keys that exist: on the command line with `data.`, in Python as an argument of a constructor."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

import dyndet.conf
import dyndet.data
from dyndet.cli.compose import compose_experiment

FOLDER = Path(dyndet.data.__path__[0])
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
CONF = Path(__file__).parents[2] / "conf"
SETS = sorted(path.stem for path in (CONF / "data").glob("*.yaml") if path.stem != "files")
KEY = re.compile(r"(?<![\w.{])data\.([a-z_]+(?:[.][a-z_]+)*)(?![\w(])")
ARGUMENT = re.compile(r"(?<![\w./])([a-z_]+)=(?=[\w(\[{'\"])")


def messages(module: str) -> list[tuple[int, str]]:
    """Texts of what is raised or logged, with values replaced by {}, so that a key that ends in one is seen as such."""
    found = []
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            found.append((node.lineno, "".join(str(part) for part in parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            found.append((node.lineno, node.value))
    return found


def arguments(module: str) -> set[str]:
    """Of all functions and classes that a module has or imports."""
    names: set[str] = set()
    for value in vars(import_module(f"dyndet.data.{module}")).values():
        if inspect.isclass(value) or inspect.isfunction(value):
            try:
                names |= set(inspect.signature(value).parameters)
            except ValueError:
                continue
    return names


@pytest.fixture(scope="module")
def configs() -> list[DictConfig]:
    augmented = compose_experiment(None, ["data=coco", "+data/augment=yolo_masks"])
    return [augmented, *(compose_experiment(None, [f"data={name}"]) for name in SETS)]


def test_keys_in_messages_exist(configs: list[DictConfig]) -> None:
    checked = 0
    for module in MODULES:
        for line, text in messages(module):
            for key in KEY.findall(text):
                if f"data.{key}{{}}" in text or key.endswith("_"):  # the rest is a value
                    continue
                known = any(OmegaConf.select(config.data, key, default="?") != "?" for config in configs)
                assert known or (FOLDER / f"{key.split('.')[0]}.py").exists(), f"{module}.py line {line}: data.{key}"
                checked += known
    assert checked >= 8


def test_arguments_are_named_as_such() -> None:
    """`load_masks=false` is no key: a message that names an argument says that it is one, of Python."""
    commands = {key for file in CONF.glob("*.yaml") for key in yaml.safe_load(file.read_text())}
    checked = 0
    for module in MODULES:
        for line, text in messages(module):
            for name in ARGUMENT.findall(re.sub(r"data\.[a-z_.]+=", "", text)):
                known = name in arguments(module) if "in Python" in text else name in commands
                assert known, f"{module}.py line {line}: {name}= in {text!r}"
                checked += 1
    assert checked >= 2
