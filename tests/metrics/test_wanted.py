"""Which detections are taken, against the definition."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.ops import box_iou

from dyndet.metrics.wanted import Wanted
from dyndet.structures import Category, Detections

CATEGORIES = [Category(10 * k, name) for k, name in enumerate(["circle", "square", "triangle", "star"], 1)]


def test_what_is_wanted_of_the_detections() -> None:
    generator = torch.Generator().manual_seed(0)
    corners, sides = 60 * torch.rand(40, 2, generator=generator), 1 + 40 * torch.rand(40, 2, generator=generator)
    scores = torch.rand(40, generator=generator).sort(descending=True)[0]
    labels = torch.randint(0, 4, (40,), generator=generator)
    every = Detections(torch.cat([corners, corners + sides], 1), scores, labels)
    kept: list[int] = []  # one by one, by the definition
    for index, box in enumerate(every.boxes):
        if all(box_iou(box[None], every.boxes[other : other + 1]).item() <= 0.3 for other in kept):
            kept.append(index)
    assert 5 < len(kept) < 35
    expected: list[tuple[dict[str, Any], list[int]]] = [
        ({}, list(range(40))),
        ({"score_threshold": float(scores[15])}, list(range(16))),
        ({"max_detections": 4}, [0, 1, 2, 3]),
        ({"classes": ["square", "star"]}, [i for i in range(40) if labels[i] in (1, 3)]),
        ({"classes": ["square"], "max_detections": 1}, [labels.tolist().index(1)]),
        ({"agnostic_nms": 0.3}, kept),
        ({"agnostic_nms": 0.3, "score_threshold": float(scores[15])}, [i for i in kept if i < 16]),
    ]
    for wishes, indices in expected:
        assert torch.equal(Wanted(CATEGORIES, **wishes)(every).boxes, every.boxes[indices]), wishes
