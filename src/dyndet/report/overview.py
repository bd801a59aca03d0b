"""The page of a folder of runs: their table, the Pareto front, curves, then single runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dyndet.ops.flops import GIGA
from dyndet.report.charts import Point, scatter_chart
from dyndet.report.history import read_history
from dyndet.report.page import Content, Html, cards, details, document, element, figure, section, table
from dyndet.report.run_page import curve_section, run_sections
from dyndet.report.runs import Group, Run
from dyndet.report.tables import in_gmac, metric_label, pareto_front, point_names, ranked_groups, report_rows

SHORT = 14
"""Longest name of a point that is written beside it; others have a number and a tooltip."""


def report_page(
    runs: Sequence[Run],
    *,
    title: str,
    x: str,
    y: str,
    ignore: Sequence[str] = ("seed",),
    full: int = 4,
    pictures: int = 10,
    images: str | Path | None = None,
) -> str:
    """The file's text: of one run everything, of several what sets them apart and then the best of them.

    Args:
        runs: from `collect_runs`.
        title: of the page.
        x: name of the compute number.
        y: name of the accuracy number.
        ignore: settings that do not set runs apart.
        full: so many runs, the best first, are shown with everything.
        pictures: in a row.
        images: folder of image files that are not where they were.
    """
    homes = [run.folder for run in runs]
    histories = {run.folder: read_history(run.folder, homes) for run in runs}

    def everything(run: Run, prefix: str = "") -> dict[str, Html]:
        return run_sections(run, histories[run.folder], images=images, pictures=pictures, prefix=prefix)

    if len(runs) == 1:
        sections = everything(runs[0])
        return document(title, *sections.values(), links={_heading(name): name for name in sections})
    groups = ranked_groups(runs, y, ignore)
    names = _run_names(groups)
    shown = [run for group in groups for run in group.runs if run.metrics][:full]
    parts: dict[str, Html | None] = {
        "runs": _table(runs, groups, {run.folder for run in shown}, x, y, ignore),
        "pareto": _pareto(groups, x, y),
        "curves": curve_section({names[home]: histories[home] for home in names}, "curves"),
    }
    links = {_heading(name): name for name, part in parts.items() if part is not None}
    for run in shown:
        anchor = _anchor(run)
        inside = everything(run, f"{anchor}-").values()
        parts[anchor] = section(
            f"Run {names[run.folder]}", details("everything about this run", *inside), anchor=anchor
        )
        links[f"Run {names[run.folder]}"] = anchor
    return document(title, *parts.values(), links=links, subtitle=f"{len(runs)} runs")


def _table(
    runs: Sequence[Run], groups: Sequence[Group], shown: set[Path], x: str, y: str, ignore: Sequence[str]
) -> Html:
    rows: list[dict[str, Content]] = [dict(row) for row in report_rows(runs, x=x, y=y, ignore=ignore)]
    for row, group in zip(rows, groups, strict=True):
        if group.runs[0].folder in shown:
            row["#"] = element("a", row["#"], href=f"#{_anchor(group.runs[0])}")
    return section("Runs", table(rows), anchor="runs", note="Best first; mean ± standard deviation where seeds differ.")


def _pareto(groups: Sequence[Group], x: str, y: str) -> Html | None:
    """Accuracy against compute, a point per setting: by the number that was chosen, and by all that was executed."""
    charts = [chart for key in dict.fromkeys((x, "macs/total_mean")) if (chart := _front(groups, key, y)) is not None]
    note = "Hollow points are unfinished runs; bars are standard deviations over seeds."
    return section("Pareto front", cards(*charts), anchor="pareto", note=note) if charts else None


def _front(groups: Sequence[Group], x: str, y: str) -> Html | None:
    shown = [group for group in groups if math.isfinite(group.mean(x)) and math.isfinite(group.mean(y))]
    if not shown:
        return None
    scale = 1 / GIGA if in_gmac(x) else 1.0
    places = [(group.mean(x) * scale, group.mean(y)) for group in shown]
    names = point_names(groups, shown)
    short = max(map(len, names)) <= SHORT
    points = [
        Point(
            *place,
            name if short else f"#{groups.index(group) + 1}",
            f"{name}: {place[1]:.3f} at {place[0]:.3f}",
            hollow=bool(group.problem),
            spread=0.0 if math.isnan(group.std(y)) else group.std(y),
        )
        for place, group, name in zip(places, shown, names, strict=True)
    ]
    finished = [place for place, group in zip(places, shown, strict=True) if not group.problem]
    front = [finished[index] for index in pareto_front(finished)]
    label, percent = metric_label(x), "x" if x.endswith("ratio") else ""
    chart = scatter_chart(points, x_label=label, y_label=metric_label(y), percent=percent, front=front)
    return figure(chart, f"{metric_label(y)} against {label}")


def _run_names(groups: Sequence[Group]) -> dict[Path, str]:
    """Folder of every run to its number in the table and what sets it apart, or to its folder's name."""
    names: dict[Path, str] = {}
    for number, (group, name) in enumerate(zip(groups, point_names(groups, groups), strict=True), 1):
        for run in group.runs:
            apart = [] if name == f"#{number}" else [name]
            apart += [run.folder.name] if len(group.runs) > 1 or not apart else []
            names[run.folder] = " ".join([f"#{number}", *dict.fromkeys(apart)])
    return names


def _anchor(run: Run) -> str:
    """Of the run's part of the page."""
    return "run-" + "".join(letter if letter.isalnum() else "-" for letter in str(run.folder))


def _heading(anchor: str) -> str:
    return anchor.replace("-", " ").capitalize()
