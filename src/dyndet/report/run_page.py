"""Everything about one run, as sections of a page."""

from __future__ import annotations

from pathlib import Path

from dyndet.metrics.validation import read_validation
from dyndet.ops.flops import GIGA
from dyndet.report.accuracy import ap_table, class_section, confusion_section, error_section, number
from dyndet.report.charts import Line, Point, line_chart, scatter_chart
from dyndet.report.findings import Findings
from dyndet.report.gallery import Gallery, preview_section
from dyndet.report.history import History, line_of
from dyndet.report.page import Content, Html, cards, details, facts, figure, paragraph, section, small, table
from dyndet.report.runs import Run
from dyndet.report.spending import compute_section

ACCURACIES = {"val/AP": "AP", "val/AP50": "AP50", "val/AP75": "AP75", "val/segm/AP": "mask AP"}


def run_sections(
    run: Run, history: History, *, images: str | Path | None = None, pictures: int = 10, prefix: str = ""
) -> dict[str, Html]:
    """Sections by their anchors, which are their names in small letters.

    Args:
        run: with its numbers.
        history: of these over its steps.
        images: folder of image files that are not where they were, see `Gallery`.
        pictures: in a row.
        prefix: of the anchors, so that several runs fit on a page.
    """
    found, missing = _findings(run)
    metrics = run.metrics
    parts = {
        "summary": _summary(run, found, missing, f"{prefix}summary"),
        "curves": curve_section({"": history}, f"{prefix}curves"),
        "compute": compute_section(found, metrics, f"{prefix}compute"),
        "gates": preview_section(run.folder, f"{prefix}gates"),
    }
    if found is not None:
        gallery = Gallery(found, images, count=pictures)
        parts |= {
            "classes": class_section(found, metrics, f"{prefix}classes"),
            "confusion": confusion_section(found, f"{prefix}confusion"),
            "errors": error_section(found, f"{prefix}errors"),
            "worst-errors": gallery.errors(f"{prefix}worst-errors"),
            "images": gallery.extremes(f"{prefix}images"),
        }
    order = ("summary", "curves", "classes", "confusion", "errors", "worst-errors", "compute", "gates", "images")
    return {prefix + name: part for name in order if (part := parts.get(name)) is not None}


def curve_section(histories: dict[str, History], anchor: str) -> Html | None:
    """Loss, accuracy, share of the head and learning rate over steps, of one run or of several.

    Args:
        histories: name of a run to its history; of one run every term is shown, of several the main one.
        anchor: of the section.
    """
    keys = list(dict.fromkeys(key for history in histories.values() for key in history))
    losses = [key for key in keys if key.startswith("train/") and key != "train/head_ratio"]
    losses.sort(key=lambda key: key != "train/loss")
    charts = [
        ("Loss", losses, ""),
        ("Accuracy", [key for key in ACCURACIES if key in keys], ""),
        ("Executed share of the head", [key for key in ("macs/head_ratio", "train/head_ratio") if key in keys], "y"),
        ("Learning rate", [key for key in keys if key.startswith("lr-")], ""),
    ]
    figures: list[Content] = []
    for title, names, percent in charts:
        if not names:
            continue
        if len(histories) == 1:
            (history,) = histories.values()
            lines = _distinct([line_of(history, key, _short(key)) for key in names])
            what = ""
        else:
            lines = [line_of(history, names[0], run) for run, history in histories.items()]
            what = _short(names[0])
        chart = line_chart(lines, x_label="step", y_label=what, percent=percent)
        figures.append(figure(chart, title))
    figures += [_path(history) for history in histories.values() if len(histories) == 1]
    return section("Curves", cards(*figures), anchor=anchor) if figures else None


def _summary(run: Run, found: Findings | None, missing: str, anchor: str) -> Html:
    metrics = run.metrics
    tiles: dict[str, Content] = {
        "AP": number(metrics.get("val/AP")),
        "AP50": number(metrics.get("val/AP50")),
        "mask AP": number(metrics.get("val/segm/AP")),
        "head executed": _percent(metrics.get("macs/head_ratio")),
        "GMAC per image": _giga(metrics.get("macs/total_mean")),
        "hard route": _percent(metrics.get("route/hard")),
    }
    if found is not None:
        tiles |= {"images": str(len(found.targets)), "objects": str(int(found.matches.objects.sum()))}
    if "step" in metrics:
        tiles["steps"] = str(int(metrics["step"]))
    settings = table([{"setting": key, "value": value} for key, value in run.settings.items()])
    return section(
        "Summary",
        facts({name: value for name, value in tiles.items() if value}),
        ap_table(metrics),
        paragraph(run.problem, kind="problem") if run.problem else None,
        paragraph(missing, kind="problem") if missing else None,
        details(f"{len(run.settings)} settings differ from the defaults", settings) if run.settings else None,
        anchor=anchor,
        note=str(run.folder),
    )


def _findings(run: Run) -> tuple[Findings | None, str]:
    """What the files of the run say, and if nothing, why."""
    try:
        validation = read_validation(run.folder)
    except ValueError as error:
        return None, str(error)
    if validation is None:
        return (
            None,
            "This run left no detections.json, ground_truth.json and compute.json: evaluate it once to get them.",
        )
    if not validation.targets:
        return None, "The validation had no images."
    return Findings(validation), ""


def _path(history: History) -> Html | None:
    """Accuracy against compute, validation by validation."""
    share, ap = history.get("macs/head_ratio", {}), history.get("val/AP", {})
    steps = sorted(set(share) & set(ap))
    if len(steps) < 2 or len({share[step] for step in steps}) < 2:
        return None
    points = [
        Point(
            share[step], ap[step], str(step) if step in (steps[0], steps[-1]) else "", f"step {step}: AP {ap[step]:.3f}"
        )
        for step in steps
    ]
    way = [(point.x, point.y) for point in points]
    label = "executed share of the head"
    chart = scatter_chart(points, x_label=label, y_label="AP", percent="x", front=way, front_name="step by step")
    return figure(chart, ["Accuracy against compute", small("one point per validation, first and last step named")])


def _distinct(lines: list[Line]) -> list[Line]:
    """Without lines that repeat another: parameter groups often share a rate."""
    kept: list[Line] = []
    for line in lines:
        if not any(line.x == other.x and line.y == other.y for other in kept):
            kept.append(line)
    return kept


def _short(key: str) -> str:
    names = {"macs/head_ratio": "validation", "train/head_ratio": "training"}
    return names.get(key) or ACCURACIES.get(key) or key.removeprefix("train/").removeprefix("lr-")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _giga(value: float | None) -> str:
    return "" if value is None else f"{value / GIGA:.3f}"
