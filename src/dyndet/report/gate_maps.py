"""Where the compute went: gates and executed multiply-adds drawn over the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from dyndet.metrics.compute import pyramid_names
from dyndet.report.draw import DRAWN_FROM, draw_detections, visible
from dyndet.report.style import (
    MIN_SIDE,
    captioned,
    enlarged,
    enlargement,
    heat,
    side_by_side,
    to_picture,
)
from dyndet.routing import Routes, Routing
from dyndet.structures import Detections, Size, Target


def compute_map(routing: Routing, index: int, *, strides: Sequence[int], full: bool = False) -> Tensor:
    """(H, W) float64 multiply-adds of every pixel of the padded image; they sum to `routing.used()[index]`.

    Args:
        routing: of a batch.
        index: which image.
        strides: pixels per position of each level.
        full: what every open gate would have cost instead (sums to `routing.full()[index]`).
    """
    levels = routing.layout.unflat((routing.possible() if full else routing.spent()).cpu().double())
    spread = [_to_pixels(x[index, 0], stride) / stride**2 for x, stride in zip(levels, strides, strict=True)]
    total = torch.zeros(max(len(x) for x in spread), max(x.shape[1] for x in spread), dtype=torch.float64)
    for x in spread:
        total[: x.shape[0], : x.shape[1]] += x
    return total


def gate_map(
    routing: Routing,
    index: int,
    level: int,
    *,
    path: str | None = None,
    node: str | None = None,
    soft: bool = False,
) -> tuple[Tensor, float] | None:
    """The gates of one level, averaged over the nodes.

    Args:
        routing: of a batch.
        index: which image.
        level: of the pyramid.
        path: one of those that the routing names; None averages over all.
        node: only this node.
        soft: the gates' values; by default 1 where a gate is open.

    Returns:
        (h, w) values in 0..1 and the share of open valid positions; None when there is no such gate.
    """
    chosen = [
        number
        for number, item in enumerate(routing.paths)
        if item.on(level) and path in (None, item.path) and node in (None, item.node)
    ]
    if not chosen:
        return None
    gates = routing.maps()[level][index, chosen].detach().float().cpu()
    densities = routing.densities()[chosen, level * routing.layout.batch + index]
    return (gates if soft else (gates > 0).float()).mean(0), float(densities.mean())


def draw_gates(
    image: Tensor,
    routing: Routing,
    index: int,
    *,
    strides: Sequence[int],
    level_names: Sequence[str] | None = None,
    path: str | None = None,
    node: str | None = None,
    soft: bool = False,
    opacity: float = 0.65,
    min_side: int = MIN_SIDE,
) -> Image.Image:
    """A row of panels: compute per pixel (as a share of the full cost there), then the gates of every level.

    Args:
        image: (3, H, W), in the pixels of the batch, with or without the padding at the bottom and right.
        routing: of the batch.
        index: which image of the batch.
        strides: pixels per position of each level.
        level_names: of the levels, default P<log2 stride>.
        path: whose gates to show; None takes the path that costs most.
        node: only this node.
        soft: show the gates' values instead of open or closed.
        opacity: of the heat over the image.
        min_side: smaller images are enlarged by a whole factor.
    """
    panels = gate_panels(
        image,
        routing,
        index,
        strides=strides,
        level_names=level_names,
        path=path,
        node=node,
        soft=soft,
        opacity=opacity,
        min_side=min_side,
    )
    return side_by_side(panels)


def gate_panels(
    image: Tensor,
    routing: Routing,
    index: int,
    *,
    strides: Sequence[int],
    level_names: Sequence[str] | None = None,
    path: str | None = None,
    node: str | None = None,
    soft: bool = False,
    opacity: float = 0.65,
    min_side: int = MIN_SIDE,
) -> list[Image.Image]:
    """The panels of `draw_gates`, one by one."""
    names = pyramid_names(strides) if level_names is None else level_names
    size: Size = (image.shape[-2], image.shape[-1])
    path = path or max(routing.paths, key=lambda item: sum(cost.macs for cost in item.costs)).path
    used = compute_map(routing, index, strides=strides)
    full = compute_map(routing, index, strides=strides, full=True)
    share = float(used.sum() / full.sum().clamp(min=1))
    panels = [(used / full.clamp(min=1e-9), f"compute {share:.1%}")]
    what = " ".join(part for part in (node, path) if part)
    for level in range(len(routing.layout.shapes)):
        found = gate_map(routing, index, level, path=path, node=node, soft=soft)
        if found is not None:
            values, density = found
            panels.append((_to_pixels(values, strides[level]), f"{names[level]} {what} {density:.1%}"))
    picture = to_picture(image)
    factor = enlargement(picture, min_side)
    base = enlarged(picture, factor)
    return [
        _with_scale(captioned(_overlay(base, _cropped(values, size), opacity), caption)) for values, caption in panels
    ]


def preview(
    image: Tensor,
    target: Target | None,
    detections: Detections | None,
    routing: Routing | Routes | None,
    index: int = 0,
    *,
    names: Sequence[str],
    strides: Sequence[int] = (),
    size: Size | None = None,
    original_size: Size | None = None,
    score_threshold: float = DRAWN_FROM,
    min_side: int = MIN_SIDE,
) -> Image.Image:
    """One strip: ground truth, detections, compute map, the dearest path's gates by level. None leaves panels out.

    Args:
        image: (3, H, W) of the batch, maybe padded.
        target: in pixels of `image`.
        detections: in pixels of the image on disk, see `original_size`; their `macs`, if known, are written above.
        routing: of the batch.
        index: which image of the batch.
        names: of the classes.
        strides: pixels per position of each level.
        size: H, W without padding, which is cut off.
        original_size: H, W of the image on disk; by default that of the target, else of `image` without padding.
        score_threshold: detections below it are left out.
        min_side: smaller images are enlarged by a whole factor.
    """
    caption = "" if detections is None else f"detections {summary(detections, routing, index, score_threshold)}"
    if isinstance(routing, Routes):
        routing, index = routing.of(index)
    height, width = size or (image.shape[-2], image.shape[-1])
    image = image[:, :height, :width]
    panels: list[Image.Image] = []
    if target is not None:
        boxes = draw_detections(image, _cut(target, (height, width)), names, min_side=min_side)
        panels.append(captioned(boxes, f"ground truth ({len(target.labels)})"))
    if detections is not None:
        if original_size is None and target is not None and target.original_size != (0, 0):
            original_size = target.original_size
        boxes = draw_detections(
            image,
            detections,
            names,
            score_threshold=score_threshold,
            boxes_size=original_size or (height, width),
            min_side=min_side,
        )
        panels.append(captioned(boxes, caption))
    if routing is not None:
        panels += gate_panels(image, routing, index, strides=strides, min_side=min_side)
    return side_by_side(panels or [captioned(to_picture(image), "image")])


def summary(
    found: Detections, routing: Routing | Routes | None, index: int = 0, score_threshold: float = DRAWN_FROM
) -> str:
    """How many detections a picture shows ("5 of 8" where it leaves some of the same objects out), and their price.

    Args:
        found: with their `macs`, if known.
        routing: of the batch.
        index: which image of the batch.
        score_threshold: of the picture.
    """
    shown, there = len(visible(found, score_threshold)), int((found.scores >= score_threshold).sum())
    parts = [f"({shown})" if shown == there else f"({shown} of {there}, one per object)"]
    if isinstance(routing, Routes):
        parts.append(_way(routing, index))
    if found.macs is not None:
        parts.append(f"{found.macs / 1e9:.3g} GMAC")
    return ", ".join(parts)


def _way(routes: Routes, index: int) -> str:
    way = "hard" if routes.hard[index] else "easy"
    if routes.difficulty is None:
        return way
    return f"{way} (difficulty {float(routes.difficulty[index].sigmoid()):.2f})"


def _cut(target: Target, size: Size) -> Target:
    if target.masks is None:
        return target
    return Target(target.boxes, target.labels, target.crowd, target.masks[:, : size[0], : size[1]])


def _to_pixels(values: Tensor, stride: int) -> Tensor:
    return values.repeat_interleave(stride, 0).repeat_interleave(stride, 1)


def _cropped(values: Tensor, size: Size) -> Tensor:
    """To the image's size; the map of a level can be a little smaller or larger than the image."""
    height, width = size
    missing = (0, max(0, width - values.shape[1]), 0, max(0, height - values.shape[0]))
    return F.pad(values, missing)[:height, :width]


def _overlay(base: Image.Image, values: Tensor, opacity: float) -> Image.Image:
    """Heat over the grey image, so that no colour of the image is read as heat."""
    warm = heat(values).resize(base.size, Image.Resampling.NEAREST)
    return Image.blend(base.convert("L").convert("RGB"), warm, opacity)


def _with_scale(panel: Image.Image) -> Image.Image:
    """Adds the colour scale from 0 to 1 at the right of the caption."""
    width, height = 48, 8
    scale = heat(torch.linspace(0, 1, width).expand(height, width))
    left, top = panel.width - width - 2, 7
    panel.paste(scale, (left, top))
    ImageDraw.Draw(panel).rectangle((left - 1, top - 1, left + width, top + height), outline=(150, 150, 150))
    return panel
