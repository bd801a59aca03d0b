"""Composing experiments, and turning their mistakes into one readable line."""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dyndet.cli.arguments import check_arguments
from dyndet.cli.config_source import CONFIG_MODULE, DyndetConfigSource
from dyndet.cli.quoting import advice, expand_home
from dyndet.cli.renamed import current, replacement
from dyndet.errors import UserError


def compose_experiment(experiment: str | None = None, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of an experiment, as `dyndet train +experiment=... overrides...` would see it.

    No data is read here: where it would say the number of classes, that of the data set by its name is taken.

    Args:
        experiment: a name under `conf/experiment`; None gives the defaults.
        overrides: Hydra overrides, for instance ["head.depth=4", "budget.weight=0.4"].

    Raises:
        UserError: on an unknown experiment or key.
    """
    if isinstance(overrides, Mapping):
        raise UserError(f'overrides={dict(overrides)}: give a list, ["KEY=VALUE", ...]')
    chosen = [] if experiment is None else [f"+experiment={experiment.removeprefix('+experiment=')}"]
    config = compose_command("train", [*chosen, *([overrides] if isinstance(overrides, str) else overrides)])
    data = config.data
    if "num_classes" in data and not OmegaConf.is_missing(data, "num_classes") and data.num_classes is None:
        data.num_classes = data.get("usual_classes")
    return config


def compose_command(command: str, arguments: Sequence[str] = ()) -> DictConfig:
    """The configuration of `dyndet COMMAND arguments...`, inside or outside a running command.

    Names of experiments and options that were given up are replaced, with a warning.

    Raises:
        UserError: on an unknown key or option.
    """
    if command == "train":
        arguments, notes = current(arguments)
        for note in notes:
            warnings.warn(note, FutureWarning, stacklevel=2)
    try:
        config = _compose(command, arguments)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, arguments, command)) from error
    check_choices(config, arguments)
    expand_home(config)
    return config


def check_choices(config: DictConfig, arguments: Sequence[str]) -> None:
    """Whether chosen parts are what they are called: an experiment's own keys lie on top of them.

    Raises:
        UserError: where a part has another `name` than the option that was chosen on the command line.
    """
    source = DyndetConfigSource("dyndet", "dyndet://conf")
    keys = [argument.lstrip("+").partition("=")[0] for argument in arguments]
    for argument, group in zip(arguments, keys, strict=True):
        option = f"{group}/{argument.partition('=')[2]}"
        if OmegaConf.is_config(config.get(group)) and f"{group}.name" not in keys and source.is_config(option):
            chosen = source.load_config(option).config
            name, now = OmegaConf.select(chosen, "name"), OmegaConf.select(config, f"{group}.name")
            if name not in (None, now):
                raise UserError(f"{argument}: the experiment sets {group}.name={now} on top: add {group}.name={name}")


def config_source(command: str) -> str:
    """Where Hydra composes a command's configuration: among all groups, or in a folder of its own name.

    Convert has a folder: its `experiment` is a key, which the group of that name would hide.
    """
    own = files(CONFIG_MODULE).joinpath(command)
    return str(own) if own.joinpath(f"{command}.yaml").is_file() else f"pkg://{CONFIG_MODULE}"


def _compose(command: str, arguments: Sequence[str]) -> DictConfig:
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        source = config_source(command)
        shared = source.startswith("pkg://")
        start = initialize_config_module if shared else initialize_config_dir
        with start(source.removeprefix("pkg://"), version_base="1.3"):
            return compose(command, overrides=list(arguments))
    finally:
        GlobalHydra.instance().clear()
        if running is not None:
            GlobalHydra.instance().initialize(running)


def build(config: Any, **more: Any) -> Any:
    """Hydra's `instantiate`, with a user's mistake coming out as such instead of wrapped in a target error.

    `more` are passed on top of the configured arguments.

    Raises:
        UserError: naming the key whose arguments do not fit.
    """
    try:
        check_arguments(config)
        built = instantiate(config, **_whitelist(config))
        return built(**more) if more else built
    except OmegaConfBaseException as error:  # some are ValueErrors, too
        raise UserError(explain(error, [])) from error
    except (ValueError, TypeError, MisconfigurationException) as error:
        if not more or isinstance(error, UserError):
            raise
        raise UserError(f"{config._target_}: {error}") from error
    except HydraException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, ValueError | TypeError | ArithmeticError | FileNotFoundError | ImportError):
            where = re.search(r"full_key: (\S+)", str(error))
            target = re.search(r"Error locating target '([^']+)'", str(error))
            if target and (now := replacement(target.group(1))):
                cause = f"{target.group(1)} is now {now}"
            place = where.group(1) if where else "config"
            raise UserError(f"{place}: {cause}") from error
        raise


def _whitelist(config: Any) -> dict[str, Any]:
    """What Hydra from 1.4 on wants to be told: the packages that a configuration may name are those that it names.

    That of a stored file has been checked before, see `dyndet.checkpoints.trusted`.
    """
    if "_execution_whitelist_" not in inspect.signature(instantiate).parameters:
        return {}
    named = _targets(OmegaConf.to_container(config, resolve=True))  # resolved: most parts lie elsewhere
    roots = {target.partition(".")[0] for target in named}
    return {"_execution_whitelist_": [f"{root}.*" for root in sorted(roots)]}


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict) and isinstance(node.get("_target_"), str):
        yield node["_target_"]
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _targets(part)


def fill(config: DictConfig, changes: DictConfig, prefix: str) -> None:
    """Sets the keys of `changes` that are not null.

    Raises:
        UserError: on a key that the configuration does not have.
    """
    for key, value in changes.items():
        if value is None:
            continue
        if key not in config:
            near = _nearest(str(key), [str(known) for known in config])
            raise UserError(f"there is no key '{prefix}.{key}' in this checkpoint's configuration.{near}")
        config[key] = value


_PARTS = ("data", "preprocess", "backbone", "neck", "head", "predictor", "detector", "router")


def explain(error: Exception, arguments: Sequence[str], command: str = "train") -> str:
    """One line: what in the arguments of `dyndet COMMAND` is wrong, and what was probably meant."""
    text = str(error)
    if isinstance(error, OverrideParseException) and "=" in error.override:
        return f"{error.override} is no value that Hydra can read: if it is text, quote it: {advice(error.override)}"
    missing = re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text)
    if isinstance(error, MissingConfigException) and missing:
        group, name = missing.groups()
        if now := replacement(f"{group}={name}"):
            return f"the {group} {name!r} is now: {now}"
        if group in ("hydra/sweeper", "hydra/launcher"):
            return (
                f"there is no {group} {name!r} here: pip install 'dyndet[sweep]' has Optuna, 'dyndet[slurm]' submitit"
            )
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE) or _options(group)
        return f"there is no {group} {name!r}.{_nearest(name, options)} Available: {', '.join(sorted(options))}"
    wrong = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if isinstance(error, ConfigCompositionException) and wrong:
        key = wrong.group(1)
        if now := replacement(key):
            return f"the key {key!r} is now {now!r}"
        if key in _PARTS and command not in ("train", "doctor"):
            return f"{key}= chooses for a training: here it comes with the checkpoint, and {key}.KEY=VALUE changes it"
        near = _nearest(key, _keys(command, arguments, key))
        return f"there is no key {key!r} to set.{near} (--cfg job prints all keys; +{key}=... adds one)"
    missing_value = re.search(r"Missing mandatory value: (\S+)", text)
    if missing_value:
        return f"{missing_value.group(1)} must be given: add {missing_value.group(1)}=... to the command"
    link = re.search(r"Interpolation key '([^']+)' not found", text)
    if link:
        if now := replacement(link.group(1)):
            return f"the configuration refers to {link.group(1)}, which is now {now}"
        part = link.group(1).split(".")[0]
        return f"the configuration refers to {link.group(1)}, which this {part} does not have: choose one that fits"
    return " ".join(text.split())


def _nearest(word: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def _options(group: str) -> list[str]:
    return DyndetConfigSource("dyndet", "dyndet://conf").list(group, ObjectType.CONFIG)


def _keys(command: str, arguments: Sequence[str], wrong: str) -> list[str]:
    """All keys of the configuration without the wrong override."""
    usable = [item for item in arguments if "=" in item and item.split("=")[0].lstrip("+~") != wrong]
    try:
        config = _compose(command, usable)
    except (HydraException, OmegaConfBaseException):
        config = _compose(command, [])
    return _flat(OmegaConf.to_container(config, resolve=False), "")


def _flat(node: Any, prefix: str) -> list[str]:
    if not isinstance(node, dict):
        return [prefix]
    keys = [prefix] if prefix else []
    for key, value in node.items():
        keys += _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return keys
