"""What loggers get of a configuration: everything but the values of environment variables."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dyndet.errors import UserError


def hyperparameters(config: DictConfig, *, named: Collection[str] = ()) -> dict[str, Any]:
    """A configuration in plain containers, its references resolved.

    A variable of the environment (`${oc.env:TOKEN}`) stands there by its name, `$TOKEN`: loggers send what they get to
    other machines.

    Args:
        config: of a run.
        named: variables whose values may be logged.

    Raises:
        UserError: if `named` is no list of names.
    """
    if isinstance(named, str) or not all(isinstance(name, str) for name in named):
        raise UserError(f"logged_env={named}: give a list of names, logged_env=[COCO]")
    with _hidden(set(named)):
        return _plain(config)


@contextmanager
def _hidden(named: set[str]) -> Iterator[None]:
    from omegaconf.resolvers import oc

    def shown(key: str, *default: Any) -> Any:
        return oc.env(key, *default) if key in named or (default and key not in os.environ) else f"${key}"

    OmegaConf.register_new_resolver("oc.env", shown, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _plain(node: Any) -> Any:
    if isinstance(node, DictConfig):
        return {str(key): _plain(_value(node, key)) for key in node}
    if isinstance(node, ListConfig):
        return [_plain(_value(node, index)) for index in range(len(node))]
    return node


def _value(node: Any, key: Any) -> Any:
    if OmegaConf.is_missing(node, key):
        return "???"
    try:
        return node[key]
    except OmegaConfBaseException:  # the name of a variable where its value, a number, is asked for
        raw: Any = OmegaConf.to_container(node, resolve=False)
        return str(raw[key])
