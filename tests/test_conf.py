"""Constructor defaults are the one truth: configurations say what differs, and show the rest."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.types import RunMode
from omegaconf import OmegaConf

from dyndet.cli.compose import compose_command
from dyndet.cli.config_source import GIVEN, DyndetConfigSource
from dyndet.cli.defaults import plain_defaults
from dyndet.errors import UserError
from dyndet.models.heads.branches import BRANCHES

CONF = Path(__file__).parents[1] / "conf"
FILES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))
SOURCE = DyndetConfigSource("test", "dyndet://conf")
GROUPS = [
    "backbone", "data", "detector", "head", "head/activation", "neck", "optim", "predictor", "preprocess", "trainer",
]  # fmt: skip

NOTHING = object()


@cache
def as_written(name: str) -> Any:
    if name not in FILES:  # a variant of conf/size
        group, _, option = name.rpartition("/")
        base, _, size = option.rpartition("_")
        return yaml.safe_load((CONF / "size" / f"{size}.yaml").read_text())[group][base]
    return OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))


@cache
def as_loaded(name: str) -> Any:
    return OmegaConf.to_container(SOURCE.load_config(name).config)


def nodes(node: Any, path: str = "") -> Any:
    """All mappings, with their paths."""
    if isinstance(node, dict):
        yield path, node
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from nodes(value, f"{path}{key}.")


def targets() -> set[str]:
    found = {node["_target_"] for name in FILES for _, node in nodes(as_written(name)) if "_target_" in node}
    return {target for target in found if target.startswith("dyndet.")}


def constructor(target: str) -> dict[str, Any]:
    """Defaults as Python itself gives them."""
    parameters = inspect.signature(resolve_name(target)).parameters
    return {name: item.default for name, item in parameters.items() if item.default is not inspect.Parameter.empty}


def plain(value: Any) -> Any:
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def test_defaults_read_from_source_are_those_of_python() -> None:
    for target in sorted(targets()):
        start = getattr(resolve_name(target), "__init__", None)
        if inspect.isfunction(start) and not start.__module__.startswith("dyndet."):
            assert plain_defaults(target) == {}, f"{target}: the arguments are another library's"
            continue
        expected = {
            name: plain(value)
            for name, value in constructor(target).items()
            if (value is None or isinstance(value, bool | int | float | str | list | tuple)) and value is not BRANCHES
        }
        assert plain_defaults(target) == expected, target
        assert list(plain_defaults(target)) == list(expected), target


def layers(loader: ConfigLoader, *overrides: str) -> list[tuple[str, str]]:
    """Files that a command line merges, in this order, with the place of each."""
    listed = loader.compute_defaults_list("train", list(overrides), RunMode.RUN).defaults
    paths = [(str(item.config_path), str(item.package or "").replace("_global_", "")) for item in listed]
    return [(path, package) for path, package in paths if SOURCE.is_config(path)]


def command_lines() -> Iterator[tuple[str, ...]]:
    """All experiments, options and routers, one at a time."""
    yield from ((f"+experiment={name}",) for name in SOURCE.list("experiment", ObjectType.CONFIG))
    for group in GROUPS:
        yield from ((f"{group}={name}",) for name in SOURCE.list(group, ObjectType.CONFIG))
    for group, name in (("callbacks", "ema"), ("callbacks", "budget_warmup"), ("logger", "wandb")):
        yield (f"{group}=[{name}]",)
    yield from ((f"+data/augment={name}",) for name in SOURCE.list("data/augment", ObjectType.CONFIG))
    yield ("+experiment=mask_rcnn_r50", "predictor/roi@predictor.roi.box=cascade")
    yield from ((f"+experiment={name}", "+router=exact") for name in ("bccd_dy_plain", "dy_mask_rcnn_swint"))
    yield ("+experiment=dyhead_faster_rcnn_r50", "detector=dynamic_two_stage", "+router=exact")
    yield ("+experiment=shapes_dy_yolo", "+router=online")
    yield ("+experiment=dy_yolov7", "+router=yolo")


def at(package: str, content: dict[str, Any]) -> dict[str, Any]:
    for part in reversed(package.split(".") if package else []):
        content = {part: content}
    return content


def written_keys(raw: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(raw, dict) or not raw:
        yield path, raw
        return
    for key, value in raw.items():
        yield from written_keys(value, (*path, key))


def looked_up(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(config, dict) or key not in config:
            return NOTHING
        config = config[key]
    return config


def overlaid(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: overlaid(below.get(key), value) for key, value in above.items()}


@cache
def merges() -> list[tuple[tuple[str, ...], list[tuple[str, Any, Any]]]]:
    """For every command line its files in order: name, content as written and as loaded."""
    found = []
    with initialize_config_module("dyndet.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for line in command_lines():
            contents = [
                (
                    name,
                    *(
                        at(package, {key: value for key, value in content.items() if key not in ("defaults", "hydra")})
                        for content in (as_written(name), as_loaded(name))
                    ),
                )
                for name, package in layers(loader, *line)
            ]
            found.append((line, contents))
    return found


def verdicts() -> Iterator[tuple[str, str, Any, Any]]:
    """For every key in a file that sets an argument of dyndet: file, key, its value there and what it is without."""
    for _, contents in merges():
        config: Any = {}
        for name, raw, loaded in contents:
            after = overlaid(config, loaded)
            for path, value in written_keys(raw):
                target = str(looked_up(after, (*path[:-1], "_target_")))
                if target.startswith("dyndet.") and not path[-1].startswith("_"):
                    without = looked_up(config, path)
                    if without is NOTHING:
                        without = plain_defaults(target).get(path[-1], NOTHING)  # not those of other libraries
                    yield name, ".".join(path), value, without
            config = after


def test_no_file_repeats_a_default() -> None:
    """No key says what its constructor or its base says anyway, on every command line that reads the file."""
    repeats: dict[tuple[str, str], bool] = {}
    for name, key, value, without in verdicts():
        same = value == without and isinstance(value, bool) == isinstance(without, bool)
        repeats[name, key] = repeats.get((name, key), True) and same
    found = [f"conf/{name}.yaml: {key}" for (name, key), always in repeats.items() if always]
    assert not found, "these keys change nothing:\n" + "\n".join(sorted(found))
    assert len(repeats) > 200


def test_what_differs_from_the_constructor_says_so() -> None:
    """In the file that names a part's `_target_`, a line that sets another value than the default has a comment."""
    for name in FILES:
        content = as_written(name)
        defaults = constructor(content["_target_"]) if str(content.get("_target_")).startswith("dyndet.") else {}
        lines = (CONF / f"{name}.yaml").read_text().splitlines()
        for key, value in content.items():
            if key in defaults and not isinstance(value, dict) and "${" not in str(value):
                (line,) = [line for line in lines if line.startswith(f"{key}:")]
                assert "the constructor takes" in line, f"conf/{name}.yaml: {line} (constructor: {defaults[key]!r})"


def test_no_file_resets_its_base() -> None:
    """A file that names a `_target_` is completed: over a base that had set these arguments, that would undo them."""
    for line, contents in merges():
        config: Any = {}
        for name, raw, loaded in contents:
            written = dict(nodes(raw))
            for path, node in nodes(loaded):
                below = looked_up(config, tuple(path.split(".")[:-1]))
                if isinstance(below, dict):
                    reset = {key for key in node.keys() - written.get(path, {}).keys() if key in below}
                    assert not reset, f"conf/{name}.yaml: {path} names a _target_ over {reset} of its base ({line})"
            config = overlaid(config, loaded)


def test_every_default_is_a_key() -> None:
    given = set()
    for line, contents in merges():
        config: Any = {}
        for _, _, loaded in contents:
            config = overlaid(config, loaded)
        for path, node in nodes(config):
            target = str(node.get("_target_"))
            if target.startswith("dyndet."):
                left_out = {name for name in plain_defaults(target) if name not in node}
                left_out = {f"{target.rpartition('.')[2]}.{name}" for name in left_out}
                assert left_out <= set(GIVEN), f"{line}: {path} lacks {left_out}"
                given |= left_out
    assert given == set(GIVEN)  # and every exception is one


def test_what_completes_a_part_comes_from_its_constructor() -> None:
    """The keys of today's default head, in the constructor's order, after those that the files write."""
    head = compose_command("train").head
    signature = [
        name
        for name in inspect.signature(resolve_name(head._target_)).parameters
        if name not in ("channels", "branches")
    ]
    assert sorted(set(head) - {"_target_", "_partial_"}) == sorted(signature)
    assert head.activation.tau == 1.5 and head.norm_stats == "active"


@pytest.mark.parametrize("override", ["head.depth=4", "neck.extra_source=P5", "predictor.postprocess.topk=500"])
def test_defaults_are_set_without_a_plus(override: str) -> None:
    key, _, value = override.partition("=")
    assert str(OmegaConf.select(compose_command("train", [override]), key)) == value


def test_users_files_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "mine.yaml").write_text("defaults: [plain]\nnum_convs: 1\n")
    (tmp_path / "head" / "own.yaml").write_text("_target_: dyndet.models.heads.plain.PlainHead\n_partial_: true\n")
    search = [f"hydra.searchpath=[file://{tmp_path}]"]
    mine = compose_command("train", [*search, "head=mine"]).head  # on top of ours, which is completed
    assert (mine.num_convs, mine.norm_groups, mine.conv_bias) == (1, 32, True)
    assert list(compose_command("train", [*search, "head=own"]).head) == ["_target_", "_partial_"]


def test_variants_of_a_size() -> None:
    overlay = yaml.safe_load((CONF / "size" / "small.yaml").read_text())
    listed = {(group, name) for group, options in overlay.items() for name in options}
    for group, name in listed:
        assert f"{name}_small" in SOURCE.list(group, ObjectType.CONFIG)
        assert f"{group}/{name}" in FILES, f"conf/size/small.yaml: there is no {group}={name}"
    head = compose_command("train", ["head=plain_small"]).head
    assert (head.num_convs, head.norm_groups, head.conv_bias) == (2, 8, True)
    with pytest.raises(UserError, match="Did you mean 'plain_small'"):
        compose_command("train", ["head=plane_small"])
    with pytest.raises(UserError, match="no predictor 'yolo_p6_small'"):
        compose_command("train", ["predictor=yolo_p6_small"])


def test_lists_of_choices_hold_choices() -> None:
    top = {group for group in GROUPS if "/" not in group} | {"callbacks", "experiment", "logger", "router", "sweep"}
    assert set(SOURCE.list("", ObjectType.GROUP)) == top
    assert "files" not in SOURCE.list("data", ObjectType.CONFIG) and "rpn" not in SOURCE.list("predictor", None)


def test_composing_needs_no_torch() -> None:
    line = "import sys; from dyndet.cli.config_source import plain_defaults; assert plain_defaults(sys.argv[1]); "
    line += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", line, "dyndet.models.predictors.fcos.FCOS"], check=True)
