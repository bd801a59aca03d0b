"""Sections of a page on what a run found: classes, thresholds, confusions, kinds of errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np

from dyndet.metrics.confusion import confusion_matrix
from dyndet.metrics.curves import RECALLS
from dyndet.metrics.error_split import KINDS
from dyndet.report.charts import GREY, PALETTE, Line, bar_chart, line_chart
from dyndet.report.findings import Findings
from dyndet.report.page import Content, Html, cards, element, figure, matrix, paragraph, section, table

SIZES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
MOST_CLASSES = 20
"""Of a confusion matrix; with more classes, those that are confused most are shown."""
THRESHOLDS = np.linspace(0, 1, 101)
KIND_COLORS = dict(zip(KINDS, PALETTE, strict=False))


def ap_table(metrics: Mapping[str, float]) -> Html:
    """AP of boxes, and of masks where there are any, by IoU and by size."""
    kinds = {"boxes": "val/", "masks": "val/segm/", "boxes, first detector": "val/first/"}
    rows = [
        {"": kind} | {name: number(metrics.get(prefix + name)) for name in SIZES}
        for kind, prefix in kinds.items()
        if prefix + "AP" in metrics
    ]
    return table(rows)


def class_section(found: Findings, metrics: Mapping[str, float], anchor: str) -> Html:
    """Every class: how many objects, AP, and the threshold that suits it best."""
    rows: list[dict[str, Content]] = []
    order = sorted(range(len(found.names)), key=lambda label: -_or_zero(found.curves[label].average_precision()))
    for label in order:
        curve, best, name = found.curves[label], found.best[label], found.names[label]
        row: dict[str, Content] = {"class": _named(name, label), "objects": str(curve.objects)}
        row |= {"AP": number(metrics.get(f"val/AP/{name}")), "AP50": number(curve.average_precision())}
        if curve.objects:
            row |= {"threshold": number(math.floor(best.threshold * 1000) / 1000), "F1": number(best.f1)}
            row |= {"precision": number(best.precision), "recall": number(best.recall)}
        rows.append(row)
    note = "The threshold is the score from which on F1 is highest, at IoU 0.5: a good score_threshold for pictures."
    return section("Classes", table(rows), _curves(found), anchor=anchor, note=note)


def confusion_section(found: Findings, anchor: str) -> Html:
    """Annotated against detected classes at the best thresholds."""
    counts = confusion_matrix(found.detections, found.targets, found.thresholds)
    totals = np.maximum(counts.sum(1), 1)
    names, note = [*found.names, "background"], ""
    if len(found.names) > MOST_CLASSES:
        wrong = counts - np.diag(np.diag(counts))
        most = np.argsort(-(wrong.sum(0) + wrong.sum(1))[:-1], kind="stable")[:MOST_CLASSES]
        keep = [*sorted(most.tolist()), len(found.names)]
        counts, totals, names = counts[np.ix_(keep, keep)], totals[keep], [names[index] for index in keep]
        note = f" Of {len(found.names)} classes the {MOST_CLASSES} with most errors are shown."
    shares = (counts / totals[:, None]).tolist()
    cells = [[str(count) if count else "" for count in row] for row in counts.tolist()]
    columns = [*names[:-1], "missed"]
    titles = [
        [f"{name}: {shares[row][column]:.0%} {other}" for column, other in enumerate(columns)]
        for row, name in enumerate(names)
    ]
    explained = (
        "Rows are annotated classes, columns what they were detected as, at IoU 0.5 and each class's best threshold; "
        "colours are shares of the row. The last column was missed, the last row is detections where nothing is." + note
    )
    body = matrix(names, columns, cells, shares, titles=titles, corner="annotated")
    return section("Confusion", body, anchor=anchor, note=explained)


def error_section(found: Findings, anchor: str) -> Html:
    """What every kind of error costs, and how often it happens at the best thresholds."""
    counts = Counter(item.kind for item in found.counted_mistakes)
    gains = found.gains
    chart = bar_chart(gains, {kind: f"{gain:.3f}" for kind, gain in gains.items()}, KIND_COLORS)
    rows = [
        {"error": kind, "what it is": meaning, "AP50 lost": f"{gains[kind]:.3f}", "count": str(counts[kind])}
        for kind, meaning in KINDS.items()
    ]
    note = (
        "How much AP50 would rise if the errors of one kind were gone, all detections counted (TIDE, Bolya et al. "
        "2020), and how many there are among detections that reach their class's best threshold."
    )
    body = cards(figure(chart, "AP50 lost to each kind of error"), figure(table(rows), "Kinds of errors", span="two"))
    return section("Errors", body, anchor=anchor, note=note)


def number(value: float | None, digits: int = 3) -> str:
    """Three decimals; nothing where it is not defined."""
    return "" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def class_color(label: int) -> str:
    """Of its curves; dark enough for lines on white."""
    return PALETTE[label % len(PALETTE)]


def _curves(found: Findings) -> Html:
    """Precision over recall and F1 over the threshold, a line per class."""
    classes = [label for label, curve in enumerate(found.curves) if curve.objects]
    if not classes:
        return paragraph("No objects are annotated: there are no curves.")
    mean = np.mean([found.curves[i].interpolated() for i in classes], 0).tolist()
    recalls, thresholds = RECALLS.tolist(), THRESHOLDS.tolist()
    precision, f1, peaks = list[Line](), list[Line](), list[tuple[float, float, str, str]]()
    for i in classes:
        name, curve, best, color = found.names[i], found.curves[i], found.best[i], class_color(i)
        precision.append(Line(name, recalls, curve.interpolated().tolist(), color))
        f1.append(Line(name, thresholds, curve.f1_at(THRESHOLDS).tolist(), color))
        told = f"{name}: F1 {best.f1:.3f} at score {best.threshold:.3f}"
        peaks.append((best.threshold, best.f1, color, told))
    if len(classes) > 1:
        precision.append(Line("mean", recalls, mean, GREY, dashed=True))
    unit = (0.0, 1.0)
    curve = line_chart(precision, x_label="recall", y_label="precision at IoU 0.5", x_range=unit, y_range=(0, 1.02))
    scores = line_chart(f1, x_label="score threshold", y_label="F1", x_range=unit, y_range=(0, 1.02), points=peaks)
    return cards(figure(curve, "Precision and recall"), figure(scores, "F1; the dots are the best thresholds"))


def _named(name: str, label: int) -> Html:
    swatch = element("i", style=f"background:{class_color(label)}")
    return element("div", element("span", swatch, name), class_="legend")


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else -1.0
