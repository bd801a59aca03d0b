"""Sections of a page on where compute went: images, gates, routes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dyndet.ops.flops import GIGA
from dyndet.report.charts import PALETTE, Line, Point, histogram, line_chart, scatter_chart
from dyndet.report.findings import Findings
from dyndet.report.page import Content, Html, cards, figure, matrix, section, small


def compute_section(found: Findings | None, metrics: Mapping[str, float], anchor: str) -> Html | None:
    """Multiply-adds over images and objects, open gates by node and level; None where nothing is known."""
    parts: list[Content] = [] if found is None else _over_images(found)
    trade = _over_shares(metrics)
    if trade is not None:
        parts.append(figure(trade, "AP by the share of images on the hard route"))
    gates = _gates(metrics)
    if gates is not None:
        closed, always = (int(metrics.get(f"gates/{name}", 0)) for name in ("dead", "always_open"))
        text = f"Mean over images; {closed} gates never opened, {always} never closed."
        parts.append(figure(gates, ["Open share of every gate", small(text)]))
    if not parts:
        return None
    note = "Multiply-adds that were executed, 1 GMAC = 10⁹, the whole detector, routers included."
    return section("Compute", cards(*parts), anchor=anchor, note=note)


def _over_images(found: Findings) -> list[Content]:
    macs = [item.macs for item in found.detections]
    known = [(value / GIGA, target) for value, target in zip(macs, found.targets, strict=True) if value is not None]
    known = [(value, target) for value, target in known if math.isfinite(value)]
    if not known:
        return []
    values = [value for value, _ in known]
    hard = found.validation.hard
    points = [
        Point(
            len(target.labels),
            value,
            title=f"image {target.image_id}: {len(target.labels)} objects, {value:.3f} GMAC",
            color=PALETTE[1] if hard and len(hard) == len(known) and hard[index] else PALETTE[0],
        )
        for index, (value, target) in enumerate(known)
    ]
    step = max(1, len(points) // 400)
    scatter = scatter_chart(points[::step], x_label="annotated objects", y_label="GMAC", radius=2.6)
    spread = f"mean {sum(values) / len(values):.3f}, {min(values):.3f} to {max(values):.3f}"
    parts: list[Content] = [
        figure(histogram(values, x_label="GMAC per image"), ["Compute per image", small(spread)]),
        figure(scatter, ["Compute against content", small("one point per image")]),
    ]
    return parts


def _over_shares(metrics: Mapping[str, float]) -> Html | None:
    """What a router makes of a share of hard images, where validation measured it."""
    shares = [share for share in range(10, 100, 10) if f"val/hard_{share}/AP" in metrics]
    if not shares:
        return None
    line = Line("AP", [share / 100 for share in shares], [metrics[f"val/hard_{share}/AP"] for share in shares])
    return line_chart([line], x_label="images on the hard route", y_label="AP", percent="x")


def _gates(metrics: Mapping[str, float]) -> Html | None:
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        if key.startswith("gates/") and key.count("/") > 1:
            node, _, level = key.removeprefix("gates/").rpartition("/")
            found.setdefault(node, {})[level] = value
    if not found:
        return None
    levels = list(dict.fromkeys(level for row in found.values() for level in row))
    shares = [[row.get(level) for level in levels] for row in found.values()]
    cells = [["" if share is None else f"{share:.0%}" for share in row] for row in shares]
    return matrix(list(found), levels, cells, shares, corner="node.path")
