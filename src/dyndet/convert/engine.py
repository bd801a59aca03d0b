"""Applies a table of names to the tensors of a release, and accounts for every tensor on both sides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dyndet.errors import UserError

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """What becomes of the tensors whose whole name matches a pattern; the first rule that matches counts.

    Attributes:
        pattern: regular expression.
        target: our name, with the pattern's groups as in `re.sub`. "NAME[i]" is number i of a vector that the source
            keeps as single numbers. None leaves the tensor out.
        transform: changes the values on the way.
        reason: why it is left out.
        copy: our second name for a part that two detectors share.
    """

    pattern: str
    target: str | None
    transform: Transform | None = None
    reason: str = ""
    copy: str | None = None


@dataclass(frozen=True)
class Fill:
    """A tensor of ours that a source does not keep.

    Attributes:
        pattern: regular expression for our name.
        value: of all its elements.
        reason: why nothing is lost.
    """

    pattern: str
    value: float
    reason: str


def drop(pattern: str, reason: str) -> Rule:
    """A rule that leaves tensors out."""
    return Rule(pattern, None, reason=reason)


@dataclass
class Report:
    """What became of every tensor.

    Attributes:
        used: source name -> ours (several of the first may share one of the second).
        unused: source name -> why it is not needed.
        filled: our name -> why the source does not have it.
    """

    used: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)


def apply_rules(
    weights: Mapping[str, Tensor],
    rules: Sequence[Rule],
    expected: Mapping[str, Tensor],
    *,
    fills: Sequence[Fill] = (),
    what: str = "the checkpoint",
) -> tuple[dict[str, Tensor], Report]:
    """Renames and transforms the tensors of a release.

    Args:
        weights: by the source's names.
        rules: the source's table.
        expected: by our names, for shapes and dtypes (meta tensors will do).
        fills: what the source does not keep.
        what: names source and target in errors.

    Returns:
        Tensors by our names, in the order of `expected`, and what became of every tensor.

    Raises:
        UserError: naming what is missing, left over, or of another shape.
    """
    report = Report()
    found: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    left_over: list[str] = []
    for name, tensor in weights.items():
        rule, target, copy = _first(rules, name)
        if rule is None:
            left_over.append(name)
        elif target is None:
            report.unused[name] = rule.reason
        else:
            value = rule.transform(tensor) if rule.transform else tensor
            if copy is not None:
                found[copy] = value
            vector, index = _indexed(target)
            if vector not in expected or vector in found or index in pieces.get(vector, {}):
                left_over.append(name)
                continue
            if index is None:
                found[target] = value
            else:
                pieces.setdefault(vector, {})[index] = value.reshape(1)
            report.used[name] = target
    found |= {name: torch.cat([numbers[i] for i in sorted(numbers)]) for name, numbers in pieces.items()}
    for name in expected.keys() - found.keys():
        fill = next((fill for fill in fills if re.fullmatch(fill.pattern, name)), None)
        if fill:
            found[name] = torch.full(expected[name].shape, fill.value)
            report.filled[name] = fill.reason
    _check(found, expected, left_over, what)
    return {name: found[name].to(like.dtype) for name, like in expected.items()}, report


def _first(rules: Iterable[Rule], name: str) -> tuple[Rule | None, str | None, str | None]:
    for rule in rules:
        match = re.fullmatch(rule.pattern, name)
        if match:
            target, copy = (None if ours is None else match.expand(ours) for ours in (rule.target, rule.copy))
            return rule, target, copy
    return None, None, None


def _indexed(target: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.+)\[(\d+)\]", target)
    return (match.group(1), int(match.group(2))) if match else (target, None)


def _check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], left_over: Sequence[str], what: str) -> None:
    missing = [name for name in expected if name not in found]
    wrong = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(like.shape)}"
        for name, like in expected.items()
        if name in found and found[name].shape != like.shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for kind, names in (("missing", missing), ("left over", left_over), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise UserError(f"{what}: {'; '.join(problems)}. If it is a release of another experiment, set experiment=NAME")
