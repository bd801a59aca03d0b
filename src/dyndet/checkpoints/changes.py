"""A run that goes on with other settings than it began with: what changed, and what may not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dyndet.errors import UserError
from dyndet.structures import Category

_ELSEWHERE = (
    "name",
    "step",
    "output_dir",
    "ckpt_path",
    "init",
    "trust",
    "on_write_error",
    "hydra",
    "logger",
    "backbone.weights",
)
"""Keys that say nothing about how a run goes on."""

_FIXED = ("optim.optimizer._target_", "optim.optimizer.optimizer._target_", "optim.schedule._target_")
"""What the saved state of the optimizer and of the schedule belongs to."""

_SHOWN = 12

_ABSENT = object()


def check_categories(path: str, saved: Sequence[Category], now: Sequence[Category]) -> None:
    """Whether a run goes on with the classes that it has learned.

    Args:
        path: the checkpoint, for messages.
        saved: categories in it.
        now: those of the data.

    Raises:
        UserError: naming the first difference.
    """
    if list(saved) != list(now):
        raise UserError(
            f"ckpt_path={path} was trained on other categories than the data has: {_difference(saved, now)}. Go on "
            f"with the data of that run, or start a new one from its weights with init={path}"
        )


def check_classes(path: str, saved: Sequence[Category], now: Sequence[Category]) -> None:
    """Whether a detector knows the classes of the data that it is evaluated on; their ids may be others.

    Args:
        path: the checkpoint, for messages.
        saved: categories in it.
        now: those of the data.

    Raises:
        UserError: naming the first difference.
    """
    names = [item.name for item in saved]
    if names != [item.name for item in now]:
        classes = f"[{','.join(names)}]" if len(names) <= _SHOWN else f"[{','.join(names[:_SHOWN])},...]"
        raise UserError(
            f"{path} was trained on other categories than those of the data: {_difference(saved, now)}. Give data with "
            f"its classes in their order (COCO and VOC: +data.classes={classes})"
        )


def _difference(saved: Sequence[Category], now: Sequence[Category]) -> str:
    """In words: another name before another number of classes, and that before another id."""
    pairs = list(enumerate(zip(saved, now, strict=False)))
    other_names = [pair for pair in pairs if pair[1][0].name != pair[1][1].name]
    for label, (then, present) in other_names or (pairs if len(saved) == len(now) else []):
        if then != present:
            return f"label {label} was {then.name!r} (id {then.id}) and is {present.name!r} (id {present.id})"
    return f"there were {len(saved)} and are {len(now)}"


def check_changes(path: str, saved: Any, config: DictConfig) -> str:
    """What is set otherwise than when a checkpoint was written, in one line, "" where nothing is.

    Args:
        path: the checkpoint, for messages.
        saved: the configuration in it, as plain containers with their references.
        config: of the run that goes on.

    Raises:
        UserError: where another kind of optimizer or schedule is chosen.
    """
    now: Any = OmegaConf.to_container(config, resolve=False)
    changes = list(differences(saved, now))
    for key in _FIXED:
        then, present = (_at(content, key) for content in (saved, now))
        if then != present:
            raise UserError(
                f"ckpt_path={path}: {key.removesuffix('._target_')} was {_name(then)} and is {_name(present)}, but a "
                f"resumed run keeps its optimizer and schedule. Go on with the command that started it, or start a new "
                f"run from its weights with init={path}"
            )
    if not changes:
        return ""
    shown = [f"{key} {_text(then)} -> {_text(present)}" for key, then, present in changes[:_SHOWN]]
    more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return f"going on with changed keys, all of which take effect: {', '.join(shown)}{more}"


def differences(saved: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys with their values then and now; a part that is another one counts as a whole."""
    if saved == now or key in _ELSEWHERE:
        return
    same_kind = isinstance(saved, dict) and isinstance(now, dict) and saved.get("_target_") == now.get("_target_")
    if not same_kind:
        if {id(saved), id(now)} != {id(_ABSENT), id(None)}:  # a key that is new, and null
            yield key, saved, now
        return
    for name in [*saved, *(name for name in now if name not in saved)]:
        inner = f"{key}.{name}" if key else str(name)
        yield from differences(saved.get(name, _ABSENT), now.get(name, _ABSENT), inner)


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _name(target: Any) -> str:
    return "none" if target is None else str(target)


def _text(value: Any) -> str:
    if value is _ABSENT:
        return "(unset)"
    if isinstance(value, dict):
        return str(value.get("_target_", "(other keys)")).rpartition(".")[2]
    text = str(value) if not isinstance(value, bool) else str(value).lower()
    return "null" if value is None else text if len(text) <= 60 else f"{text[:57]}..."
