"""Where Hydra reads dyndet's configurations: `dyndet://conf`, YAML completed by the constructors that it names.

A file says what differs from its constructors. When it is loaded, every node with a `_target_` of dyndet gets the
arguments that the file leaves out and that have plain defaults, so that each can be set and `--cfg job` shows it. The
file that names a `_target_` is the one that is completed: a derived file that repeats it would reset its base.

Files of `conf/size` give every option that they list a variant: `size/small.yaml` makes `head=plain_small` of
`head=plain`.

Importing this module installs both: the source, and a plugin that puts it in the place of `pkg://dyndet.conf` on
Hydra's search path. Users' own files (`--config-dir`) are read as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from dyndet.cli.defaults import plain_defaults

CONFIG_MODULE = "dyndet.conf"
GIVEN = ("NoHead.channels", "Router.first", "Router.masked", "BoxHead.class_agnostic")
"""Arguments that have a default, but that a `_partial_` part always gets from what completes it: they are no keys."""

_NO_CHOICES = ("convert", "size", "data/files", "optim/router", "predictor/rpn", "predictor/roi")
"""Parts of other choices, which lists of choices leave out."""


class DyndetConfigSource(ConfigSource):
    """The configurations of a package: `dyndet://conf` are those of `dyndet.conf`."""

    @staticmethod
    def scheme() -> str:
        return "dyndet"

    def available(self) -> bool:
        return self.is_group("")

    def is_group(self, config_path: str) -> bool:
        return config_path != "size" and self._at(config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        name = config_path.removesuffix(".yaml")
        return self._at(f"{name}.yaml").is_file() or name in _variants(self.path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> Any:
        inside = f"{config_path}/" if config_path else ""
        names = {item.name.removesuffix(".yaml") for item in self._at(config_path).iterdir()}
        names |= {path.rpartition("/")[2] for path in _variants(self.path) if path.rpartition("/")[0] == config_path}
        wanted = {
            ObjectType.GROUP: self.is_group,
            ObjectType.CONFIG: self.is_config,
            None: lambda path: self.is_group(path) or self.is_config(path),
        }[results_filter]
        hidden = ("__pycache__", *_NO_CHOICES)
        return sorted(name for name in names if inside + name not in hidden and wanted(inside + name))

    def load_config(self, config_path: str) -> ConfigResult:
        name = config_path.removesuffix(".yaml")
        file = self._at(f"{name}.yaml")
        if file.is_file():
            text = file.read_text(encoding="utf-8")
        elif name in _variants(self.path):
            text = OmegaConf.to_yaml(_variants(self.path)[name])
        else:
            raise ConfigLoadError(f"Config not found : {name}")
        config = OmegaConf.create(_loaded(text))
        return ConfigResult(self.provider, self.full_path(), config, self._get_header_dict(text))

    def _at(self, config_path: str) -> Traversable:
        return files(f"dyndet.{self.path}").joinpath(config_path)


@functools.cache
def _variants(package: str) -> dict[str, Any]:
    """What files of `size` make of the options that they list: by path, e.g. "head/plain_small"."""
    found = {}
    for file in files(f"dyndet.{package}").joinpath("size").iterdir():
        size = file.name.removesuffix(".yaml")
        groups: Any = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
        for group, options in groups.items():
            for name, changes in options.items():
                found[f"{group}/{name}_{size}"] = {"defaults": [name, "_self_"], **changes}
    return found


@functools.cache
def _loaded(text: str) -> Any:
    """A file's content with defaults filled in, as plain containers, which are not changed: sweeps read few files."""
    content = OmegaConf.to_container(OmegaConf.create(text))
    return complete(content, _placed(content))


def complete(node: Any, placed: Collection[str] = (), path: str = "") -> Any:
    """A configuration with the arguments that its dyndet targets take by default.

    Args:
        node: plain containers.
        placed: keys that other files fill.
        path: of the node, with a dot at the end.
    """
    if isinstance(node, list):
        return [complete(item) for item in node]
    if not isinstance(node, dict):
        return node
    done = {key: complete(value, placed, f"{path}{key}.") for key, value in node.items()}
    target = str(node.get("_target_", ""))
    if target.startswith("dyndet."):
        name = target.rpartition(".")[2]
        for key, value in plain_defaults(target).items():
            if key not in done and path + key not in placed and f"{name}.{key}" not in GIVEN:
                done[key] = value
    return done


def _placed(content: Any) -> set[str]:
    """Keys that the files of a defaults list fill: "activation" for `activation: tanh`, "first" for `dense@first`."""
    entries = content.get("defaults", []) if isinstance(content, dict) else []
    groups = [next(iter(entry)) if isinstance(entry, dict) else str(entry) for entry in entries]
    return {group.rpartition("@")[2].rpartition("/")[2] for group in groups}


class DyndetSearchPath(SearchPathPlugin):
    """Reads `dyndet.conf` through `DyndetConfigSource`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for element in search_path.get_path():
            if element.path == f"pkg://{CONFIG_MODULE}":
                element.path = f"{DyndetConfigSource.scheme()}://conf"


for plugin in (DyndetConfigSource, DyndetSearchPath):
    Plugins.instance().register(plugin)
