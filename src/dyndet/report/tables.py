"""Runs as a markdown table, and as a picture of accuracy against executed compute."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Bbox

from dyndet.errors import UserError
from dyndet.report.runs import Group, Run, differences, group_runs

GIGA = 1e9
LONGEST_NAME = 44
MORE = ("val/AP50", "val/segm/AP", "macs/head_used_mean", "macs/total_mean")
INK, GREY, BLUE, ORANGE = "#222228", "#9a9aa4", "#2b6cb0", "#d9622b"


def markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """A table that reads well as plain text too; columns of numbers are set flush right.

    Args:
        rows: column name to cell; missing cells stay empty.
        columns: which, in order; default all, in the order in which they first appear.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else list(columns)
    cells = [[str(row.get(column, "")).replace("|", "\\|") for column in columns] for row in rows]
    heads = [column.replace("|", "\\|") for column in columns]
    widths = [max(3, *(len(line[index]) for line in [heads, *cells])) for index in range(len(columns))]
    right = [_all_numbers(line[index] for line in cells) for index in range(len(columns))]
    rule = ["-" * (width - 1) + ":" if flush else "-" * width for width, flush in zip(widths, right, strict=True)]
    lines = [heads, rule, *cells]
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        )
        + " |"
        for line in lines
    )


def report_table(
    runs: Sequence[Run],
    *,
    x: str = "macs/head_ratio",
    y: str = "val/AP",
    more: Sequence[str] = MORE,
    ignore: Sequence[str] = ("seed",),
) -> str:
    """The rows of `report_rows` as a markdown table."""
    return markdown_table(report_rows(runs, x=x, y=y, more=more, ignore=ignore))


def report_rows(
    runs: Sequence[Run], *, x: str, y: str, more: Sequence[str] = MORE, ignore: Sequence[str] = ("seed",)
) -> list[dict[str, str]]:
    """One numbered row per setting, best first: mean ± standard deviation over its seeds; then runs with a problem.

    Args:
        runs: from `collect_runs`.
        x: name of the compute number.
        y: name of the accuracy number, the higher the better.
        more: other numbers, shown where any run has them.
        ignore: settings that do not set runs apart.
    """
    groups = ranked_groups(runs, y, ignore)
    settings = differences(groups)
    numbers = [key for key in dict.fromkeys((y, x, *more)) if any(key in run.metrics for run in runs)]
    several, problems = any(len(group.runs) > 1 for group in groups), any(group.problem for group in groups)
    rows: list[dict[str, str]] = []
    for number, group in enumerate(groups, 1):
        row = {"#": str(number)}
        row |= {key: group.settings.get(key, "") for key in settings} or {"run": group.runs[0].folder.name}
        row |= {"runs": str(len(group.runs))} if several else {}
        row |= {metric_label(key): _spread(group, key) for key in numbers}
        rows.append(row | ({"status": _status(group)} if problems else {}))
    return rows


def metric_label(key: str) -> str:
    """What a logged number is called for a reader, with its unit."""
    if key == "macs/head_ratio":
        return "executed share of head MACs"
    if in_gmac(key):
        part, _, kind = key.removeprefix("macs/").replace("_used", "").rpartition("_")
        return f"{part.replace('_', ' ')} GMAC" + ("" if kind == "mean" else f" ({kind})")
    return key.removeprefix("val/").replace("segm/", "mask ")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, by rising x, of the points that no other beats in both: smaller x, larger y."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def pareto_plot(
    runs: Sequence[Run],
    path: str | Path,
    *,
    x: str = "macs/head_ratio",
    y: str = "val/AP",
    references: Mapping[str, float] | None = None,
    ignore: Sequence[str] = ("seed",),
) -> Path:
    """Accuracy against compute as a png: one point per setting (bars: standard deviation over seeds), and the front.

    Unfinished runs are hollow and not part of the front; runs without the two numbers are counted below the axes.
    Points are named by what sets them apart, or, where that gets too long, by their row in `report_table`.

    Args:
        runs: from `collect_runs`.
        path: of the picture.
        x: name of the compute number, the lower the better; MACs are shown in GMAC per image.
        y: name of the accuracy number, the higher the better.
        references: accuracy of static detectors, drawn as horizontal lines.
        ignore: settings that do not set runs apart.

    Raises:
        UserError: if there are numbers, but none of that name.
    """
    for key in (x, y):
        known = sorted({name for run in runs for name in run.metrics})
        if known and key not in known:
            raise UserError(f"no run has {key}; there are: {', '.join(known)}")
    groups = ranked_groups(runs, y, ignore)
    shown = [group for group in groups if math.isfinite(group.mean(x)) and math.isfinite(group.mean(y))]
    figure = Figure(figsize=(7.5, 5), layout="constrained", dpi=150)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _dress(axes, x, y, without=sum(len(group.runs) for group in groups) - sum(len(group.runs) for group in shown))
    scale = 1 / GIGA if in_gmac(x) else 1.0
    points = [(group.mean(x) * scale, group.mean(y)) for group in shown]
    for group, point in zip(shown, points, strict=True):
        errors: dict[str, Any] = {
            f"{axis}err": None if math.isnan(group.std(key)) else group.std(key) * factor
            for axis, key, factor in (("x", x, scale), ("y", y, 1.0))
        }
        fill = "white" if group.problem else BLUE
        axes.errorbar(*point, **errors, fmt="o", ms=7, color=BLUE, mfc=fill, ecolor=GREY, elinewidth=1, capsize=2)
    finished = [point for group, point in zip(shown, points, strict=True) if not group.problem]
    front = [finished[index] for index in pareto_front(finished)]
    if len(front) > 1:
        horizontal, vertical = zip(*front, strict=True)
        axes.plot(horizontal, vertical, color=ORANGE, lw=1.5, zorder=1, label="Pareto front")
    for index, (name, value) in enumerate((references or {}).items()):
        axes.axhline(value, color=INK, lw=1, ls=("--", ":", "-.")[index % 3], zorder=1, label=f"{name}: {value:.3f}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", frameon=False)
    axes.margins(x=0.12, y=0.14)
    canvas.draw()
    _label(axes, points, point_names(groups, shown))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def ranked_groups(runs: Sequence[Run], y: str, ignore: Sequence[str]) -> list[Group]:
    """Groups, best first, those with a problem last."""
    groups = group_runs(runs, ignore=ignore)
    return sorted(groups, key=lambda group: (bool(group.problem), _descending(group.mean(y))))


def _status(group: Group) -> str:
    return f"{group.problem} ({group.runs[0].folder.name})" if group.problem else "finished"


def _dress(axes: Axes, x: str, y: str, *, without: int) -> None:
    note = f"\n({without} run{'s' * (without > 1)} without these numbers)" if without else ""
    axes.set_xlabel(metric_label(x) + (" per image" if in_gmac(x) else "") + note, color=INK)
    axes.set_ylabel(metric_label(y), color=INK)
    if x.endswith("ratio"):
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color="#e6e6ea", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def point_names(groups: Sequence[Group], shown: Sequence[Group]) -> list[str]:
    """What sets each point apart, keys by their last part where that is unambiguous."""
    keys = differences(shown)
    lasts = [key.rpartition(".")[2] for key in keys]
    short = {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)}
    names: list[str] = []
    for group in shown:
        parts = [f"{short[key]}={group.settings[key]}" for key in keys if key in group.settings]
        name = ", ".join(parts) or ("default" if keys else group.runs[0].folder.name)
        names.append(name + (" (unfinished)" if group.problem else ""))
    too_long = any(len(name) > LONGEST_NAME for name in names)
    return [f"#{groups.index(group) + 1}" for group in shown] if too_long else names


def _label(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Puts each name beside its point, at the first place where it covers nothing."""
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    centres = [axes.transData.transform(point) for point in points]
    legend = axes.get_legend()
    taken = [Bbox.from_bounds(left - 7, low - 7, 14, 14) for left, low in centres]
    taken += [legend.get_window_extent(renderer)] if legend else []
    places = [(right * 6, up * 6 * step) for step in (1, 2.2, 3.4) for up in (-1, 0, 1) for right in (1, -1, 0)]
    for point, name in zip(points, names, strict=True):
        tries: list[tuple[float, Any]] = []
        for offset in [place for place in places if place != (0, 0)]:
            text = axes.annotate(
                name,
                point,
                xytext=offset,
                textcoords="offset points",
                fontsize=8,
                color=INK,
                ha={1: "left", -1: "right", 0: "center"}[(offset[0] > 0) - (offset[0] < 0)],
                in_layout=False,
                path_effects=[withStroke(linewidth=2, foreground="white")],
                va={1: "bottom", -1: "top", 0: "center"}[(offset[1] > 0) - (offset[1] < 0)],
            )
            box = text.get_window_extent(renderer)
            outside = box.width * box.height - _shared(box, frame)
            tries.append((outside + sum(_shared(box, other) for other in taken), text))
            if tries[-1][0] <= 0.5:
                break
        best = min(tries, key=lambda item: item[0])[1]
        for _, text in tries:
            if text is not best:
                text.remove()
        taken.append(best.get_window_extent(renderer))


def _shared(one: Bbox, other: Bbox) -> float:
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else common.width * common.height


def _spread(group: Group, key: str) -> str:
    mean, std = group.mean(key), group.std(key)
    if math.isnan(mean):
        return ""
    scale, digits, unit = (1 / GIGA, 3, "") if in_gmac(key) else (100, 1, "%") if key.endswith("ratio") else (1, 3, "")
    text = f"{mean * scale:.{digits}f}"
    return text + ("" if math.isnan(std) else f" ± {std * scale:.{digits}f}") + unit


def in_gmac(key: str) -> bool:
    return key.startswith("macs/") and key.endswith(("_mean", "_min", "_max"))


def _descending(value: float) -> float:
    return math.inf if math.isnan(value) else -value


def _all_numbers(cells: Iterable[str]) -> bool:
    filled = [cell for cell in cells if cell]
    return bool(filled) and all(cell.lstrip("-")[:1].isdigit() for cell in filled)
