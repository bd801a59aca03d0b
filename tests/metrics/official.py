"""What pycocotools says."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def official(truth: dict[str, Any], results: list[dict[str, Any]], iou_type: str = "bbox") -> dict[str, float]:
    """`CocoMetric`'s numbers for the content of two json files, in float64.

    For masks boxes are left out, as their areas would decide the size range of detections.
    """
    results = [{key: value for key, value in row.items() if iou_type == "bbox" or key != "bbox"} for row in results]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = dict(zip(NAMES, evaluation.stats[:6].tolist(), strict=True)) | {"AR100": float(evaluation.stats[8])}
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    for index, category in enumerate(coco.loadCats(evaluation.params.catIds)):
        known = precision[:, :, index][precision[:, :, index] > -1]
        values[f"AP/{category['name']}"] = float(known.mean()) if known.size else -1.0
    return {key: math.nan if value < 0 else value for key, value in values.items()}
