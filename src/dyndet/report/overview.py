"""The page of a folder of runs: their table, the Pareto front, curves, then single runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dyndet.ops.flops import GIGA
from dyndet.report.charts import Point, scatter_chart
from dyndet.report.history import read_history
from dyndet.report.page import Content, Html, details, document, element, figure, section, small, table
from dyndet.report.run_page import curve_section, run_sections
from dyndet.report.runs import Group, Run
from dyndet.report.tables import in_gmac, metric_label, pareto_front, point_names, ranked_groups, report_rows


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
    numbered = [(number, run) for number, group in enumerate(groups, 1) for run in group.runs]
    names = {run.folder: f"#{number} {run.folder.name}" for number, run in numbered}
    shown = [(number, run) for number, run in numbered if run.metrics][:full]
    parts: dict[str, Html | None] = {
        "runs": _table(runs, groups, {run.folder for _, run in shown}, x, y, ignore),
        "pareto": _pareto(groups, x, y),
        "curves": curve_section({names[home]: histories[home] for home in names}, "curves"),
    }
    links = {_heading(name): name for name, part in parts.items() if part is not None}
    for _, run in shown:
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
    """Accuracy against compute, a point per setting."""
    shown = [group for group in groups if math.isfinite(group.mean(x)) and math.isfinite(group.mean(y))]
    if not shown:
        return None
    scale = 1 / GIGA if in_gmac(x) else 1.0
    places = [(group.mean(x) * scale, group.mean(y)) for group in shown]
    points = [
        Point(*place, f"#{groups.index(group) + 1}", name, bool(group.problem))
        for place, group, name in zip(places, shown, point_names(groups, shown), strict=True)
    ]
    finished = [place for place, group in zip(places, shown, strict=True) if not group.problem]
    front = [finished[index] for index in pareto_front(finished)]
    percent = "x" if x.endswith("ratio") else ""
    chart = scatter_chart(points, x_label=metric_label(x), y_label=metric_label(y), percent=percent, front=front)
    caption = ["Accuracy against compute", small("numbers are those of the table; unfinished runs are hollow")]
    return section("Pareto front", figure(chart, caption), anchor="pareto")


def _anchor(run: Run) -> str:
    """Of the run's part of the page."""
    return "run-" + "".join(letter if letter.isalnum() else "-" for letter in str(run.folder))


def _heading(anchor: str) -> str:
    return anchor.replace("-", " ").capitalize()
