"""CBNetV2 (Liang et al., TIP 2022): mmdetection's Faster R-CNN on two linked ResNets, which lack a router.

Both backbones of a release share neck, RPN and heads, so both routes do. The second backbone has no stem
and, in the "d1" variant, no first stage either. Releases on Swin and Res2Net have heads or blocks that dyndet does not
have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dyndet.convert import mmdet
from dyndet.convert.engine import Rule, drop
from dyndet.convert.recipe import Recipe, Shapes, has
from dyndet.convert.source import Source
from dyndet.errors import UserError

NAME = "CBNetV2"

_FIRST, _SECOND = r"backbone\.cb_modules\.0\.", r"backbone\.cb_modules\.1\."
_STAGES = 4


def recognise(shapes: Shapes) -> bool:
    """Whether names are those of a composite backbone."""
    return has(shapes, _SECOND)


def recipe(source: Source) -> Recipe:
    """The experiment of a release.

    Raises:
        UserError: if none of ours has its backbones and head.
    """
    one = _one_backbone(source)
    plain = mmdet.recipe(one)
    if not plain.experiment.startswith("faster_rcnn") or "backbone.name" not in plain.settings:
        raise UserError(f"{source.path}: of CBNetV2's releases dyndet converts Faster R-CNN on two ResNets")
    kept = 1 if has(source.shapes, _SECOND + r"layer1\.") else 2  # the first stage that the second backbone has
    shared = {"detector.share_neck_head": True, "detector.shared_stages": kept, "detector.first_link": kept}
    return replace(
        plain,
        experiment="dy_faster_rcnn_r50",
        rules=[
            drop(_SECOND + r"bn1\..+", "the second backbone has no stem"),
            *_links(kept),
            *(rule for one in plain.rules for rule in _for_both(one)),
        ],
        settings={**plain.settings, **shared},
        remarks=["all images are hard until step 2 has trained a router: +router=exact and the settings above"],
    )


def _one_backbone(source: Source) -> Source:
    """The release as if it had its first backbone alone."""
    weights = {
        re.sub("^" + _FIRST, "backbone.", name): tensor
        for name, tensor in source.weights.items()
        if not re.match(_SECOND + r"|backbone\.cb_linears\.", name)
    }
    return replace(source, weights=weights)


def _for_both(rule: Rule) -> Iterator[Rule]:
    """A rule of a single detector for two: each backbone has its own tensors, the rest is one for both."""
    if rule.target is None:
        yield rule
    elif rule.pattern.startswith(r"backbone\."):
        for source, target in ((_FIRST, "first."), (_SECOND, "second.")):
            yield replace(rule, pattern=source + rule.pattern.removeprefix(r"backbone\."), target=target + rule.target)
    else:
        yield replace(rule, target="first." + rule.target, copy="second." + rule.target)


def _links(kept: int) -> Sequence[Rule]:
    """`cb_linears.i.j` leads from stage i + j + 1 to stage i + 1, counted with the stem as 0."""
    return [
        Rule(
            rf"backbone\.cb_linears\.{reader - 1}\.{source - reader}\.(.+)",
            rf"links.sources.{source - kept}.links.{reader - kept}.\1",
        )
        for reader in range(kept, _STAGES + 1)
        for source in range(reader, _STAGES + 1)
    ]
