"""Charts as SVG inside of a page: sharp at any width, small, with values as tooltips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from dyndet.report.page import Content, Html, element, html

PALETTE = ("#2b6cb0", "#d9622b", "#2f855a", "#8b5cb6", "#b7791f", "#c2417c", "#2c8ea3", "#7a5c3e", "#5a6472", "#97a11f")
GREY = "#8a8a96"
FEW = 24
"""So many points of a line get a dot each."""


@dataclass(frozen=True)
class Line:
    """Points joined by a line.

    Attributes:
        name: in the legend and the tooltip.
        x: of the points.
        y: likewise; those that are not finite are left out.
        color: None takes one of `PALETTE`.
        dashed: drawn so.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Frame:
    """Where data lie on a chart: ranges of x and y, in a drawing of some pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = 380
    height: int = 236
    left: int = 46
    right: int = 14
    top: int = 28
    bottom: int = 40

    def across(self, x: float) -> float:
        share = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        return self.left + share * (self.width - self.left - self.right)

    def down(self, y: float) -> float:
        share = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def drawn(self, *marks: Content, x_label: str, y_label: str, percent: str = "") -> Html:
        """The marks on a grid with ticks and labels.

        Args:
            marks: SVG elements.
            x_label: below the chart.
            y_label: above it, "" where a caption says it.
            percent: the axes that are shares: "x", "y", "xy".
        """
        end, base = self.width - self.right, self.height - self.bottom
        parts: list[Content] = []
        for tick in _ticks(*self.y):
            y = self.down(tick)
            parts.append(element("line", x1=self.left, x2=end, y1=y, y2=y, stroke="#e6e6ec"))
            text = _number(tick, "y" in percent)
            parts.append(element("text", text, x=self.left - 6, y=y + 4, text_anchor="end", class_="quiet"))
        for tick in _ticks(*self.x):
            x = self.across(tick)
            parts.append(element("line", x1=x, x2=x, y1=base, y2=base + 4, stroke="#b9b9c4"))
            text = _number(tick, "x" in percent)
            parts.append(element("text", text, x=x, y=base + 16, text_anchor="middle", class_="quiet"))
        parts.append(element("line", x1=self.left, x2=end, y1=base, y2=base, stroke="#b9b9c4"))
        parts.append(element("text", x_label, x=(self.left + end) / 2, y=self.height - 6, text_anchor="middle"))
        if y_label:
            parts.append(element("text", y_label, x=4, y=13))
        label = f"{y_label or 'values'} against {x_label}"
        box = f"0 0 {self.width} {self.height}"
        return element("svg", *parts, *marks, viewBox=box, role="img", aria_label=label)


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    percent: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    points: Sequence[tuple[float, float, str, str]] = (),
    legend: int = 12,
) -> Html:
    """Lines, and points on their own, with a legend.

    Args:
        lines: what is drawn; those without a finite point are left out.
        x_label: see `Frame.drawn`.
        y_label: likewise.
        percent: likewise.
        x_range: None: that of the data.
        y_range: likewise.
        points: x, y, colour and tooltip of single points.
        legend: with more lines than this there is none, and tooltips must do.
    """
    kept = [
        (line, [pair for pair in zip(line.x, line.y, strict=True) if all(map(math.isfinite, pair))]) for line in lines
    ]
    kept = [(line, pairs) for line, pairs in kept if pairs]
    every = [pair for _, pairs in kept for pair in pairs] + [(x, y) for x, y, _, _ in points]
    if not every:
        return element("p", "nothing to draw", class_="note")
    top = 28 if y_label else 12
    frame = Frame(x_range or _range([x for x, _ in every]), y_range or _range([y for _, y in every]), top=top)
    marks: list[Content] = []
    names: list[tuple[str, str]] = []
    for number, (line, pairs) in enumerate(kept):
        color = line.color or PALETTE[number % len(PALETTE)]
        names.append((line.name, color))
        path = " ".join(f"{frame.across(x):.1f},{frame.down(y):.1f}" for x, y in pairs)
        title = element("title", line.name)
        dash = "5 4" if line.dashed else None
        marks.append(
            element("polyline", title, points=path, fill="none", stroke=color, stroke_width=1.8, stroke_dasharray=dash)
        )
        if len(pairs) <= FEW and not line.dashed:
            marks += [_dot(frame, x, y, color, f"{line.name}: {_number(y)} at {_number(x)}") for x, y in pairs]
    marks += [_dot(frame, x, y, color, text, radius=5) for x, y, color, text in points]
    chart = frame.drawn(*marks, x_label=x_label, y_label=y_label, percent=percent)
    return html([chart, color_legend(names) if 1 < len(names) <= legend else None])


@dataclass(frozen=True)
class Point:
    """One thing on a scatter chart.

    Attributes:
        x: where it is.
        y: likewise.
        name: written beside it, "" for none.
        title: its tooltip.
        hollow: drawn so.
        color: of it.
        spread: up and down from it, as a bar.
    """

    x: float
    y: float
    name: str = ""
    title: str = ""
    hollow: bool = False
    color: str = PALETTE[0]
    spread: float = 0.0


def scatter_chart(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    percent: str = "",
    front: Sequence[tuple[float, float]] = (),
    front_name: str = "Pareto front",
    radius: float = 4.5,
) -> Html:
    """Points with their names, and a line through some of them.

    Args:
        points: at least one.
        x_label: see `Frame.drawn`.
        y_label: likewise.
        percent: likewise.
        front: points of the line, from left to right.
        front_name: of the line, in the legend.
        radius: of a point in pixels.
    """
    ends = [point.y + sign * point.spread for point in points for sign in (-1, 1)]
    frame = Frame(_range([point.x for point in points], 0.08), _range(ends, 0.12))
    marks: list[Content] = []
    if len(front) > 1:
        path = " ".join(f"{frame.across(x):.1f},{frame.down(y):.1f}" for x, y in front)
        marks.append(element("polyline", points=path, fill="none", stroke=PALETTE[1], stroke_width=1.8))
    for point in points:
        x, y = frame.across(point.x), frame.down(point.y)
        if point.spread:
            low, high = frame.down(point.y - point.spread), frame.down(point.y + point.spread)
            marks.append(element("line", x1=x, x2=x, y1=low, y2=high, stroke=GREY))
        marks.append(_dot(frame, point.x, point.y, point.color, point.title, radius=radius, hollow=point.hollow))
        if point.name:
            right = x > 0.8 * frame.width
            anchor = "end" if right else "start"
            place = (x - 8, y - 5) if right else (x + 8, y + 13)  # off a line that rises to the right
            marks.append(element("text", point.name, x=place[0], y=place[1], text_anchor=anchor, class_="name"))
    chart = frame.drawn(*marks, x_label=x_label, y_label=y_label, percent=percent)
    return html([chart, color_legend([(front_name, PALETTE[1])]) if len(front) > 1 else None])


def histogram(values: Sequence[float], *, x_label: str, y_label: str = "images", bins: int = 20) -> Html:
    """How many values lie where.

    Args:
        values: at least one.
        x_label: what they are.
        y_label: what is counted.
        bins: at most so many bars.
    """
    low, high = min(values), max(values)
    bins = min(bins, round(2 * math.sqrt(len(values))))
    if high - low <= 1e-9 * abs(high):  # all the same
        low, high, bins = low * 0.95, high * 1.05 or 1.0, 1
    counts, step = [0] * bins, (high - low) / bins
    for value in values:
        counts[min(int((value - low) / step), bins - 1)] += 1
    frame = Frame((low, high), (0, max(counts) * 1.05))
    bars: list[Content] = []
    for number, count in enumerate(counts):
        start, stop = low + number * step, low + (number + 1) * step
        x, y = frame.across(start), frame.down(count)
        title = element("title", f"{_number(start)} to {_number(stop)}: {count} {y_label}")
        width, height = frame.across(stop) - x - 1, frame.down(0) - y
        bars.append(element("rect", title, x=x + 0.5, y=y, width=width, height=height, fill=PALETTE[0]))
    return frame.drawn(*bars, x_label=x_label, y_label=y_label)


def bar_chart(values: Mapping[str, float], texts: Mapping[str, str], colors: Mapping[str, str]) -> Html:
    """Horizontal bars from 0, with a name at the left and a text at the end.

    Args:
        values: name to length, none negative.
        texts: what is written at the end of each.
        colors: of each.
    """
    left, width, row = 100, 380, 28
    space = width - left - 50
    longest = max(values.values(), default=0) or 1
    parts: list[Content] = []
    for number, (name, value) in enumerate(values.items()):
        y, length = number * row + 4, max(1.0, space * value / longest)
        parts.append(element("text", name, x=left - 8, y=y + 13, text_anchor="end"))
        parts.append(element("rect", x=left, y=y, width=length, height=row - 8, rx=3, fill=colors[name]))
        parts.append(element("text", texts[name], x=left + length + 6, y=y + 13, class_="quiet"))
    return element("svg", *parts, viewBox=f"0 0 {width} {len(values) * row + 4}", role="img")


def color_legend(names: Sequence[tuple[str, str]]) -> Html:
    """Names with their colours; wraps where it must."""
    entries = (element("span", element("i", style=f"background:{color}"), name) for name, color in names)
    return element("div", *entries, class_="legend")


def _dot(
    frame: Frame, x: float, y: float, color: str, title: str, *, radius: float = 2.6, hollow: bool = False
) -> Html:
    fill = "#ffffff" if hollow else color
    inside = element("title", title) if title else None
    return element("circle", inside, cx=frame.across(x), cy=frame.down(y), r=radius, fill=fill, stroke=color)


def _range(values: Sequence[float], margin: float = 0.04) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * margin or abs(high) * 0.1 or 0.5
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    values = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    slack = (high - low) * 1e-6
    return [float(value) for value in values if low - slack <= value <= high + slack]


def _number(value: float, percent: bool = False) -> str:
    if percent:
        return f"{value * 100:.3g}%"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{0.0 + value:.4g}"
