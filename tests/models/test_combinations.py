"""Every head with every predictor, on backbones and necks of every kind."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from small_detectors import HEADS as ALL_HEADS
from small_detectors import ONE_STAGE, TWO_STAGE, targets, tiny

from dyndet import build_detector
from dyndet.structures import Target

COARSE = "fine_grained_small head.coarse=true"
HEADS = [
    "plain_small", "fixed_small", "fine_grained_small", "dyhead_small", "dyhead_fine_grained_small",
    "separable_small", COARSE,
]  # fmt: skip
PREDICTORS = ["fcos_small", "atss_small", "retinanet_small", "freeanchor_small"]
CONVNEXT = "swin_tiny backbone.name=convnext_tiny.fb_in1k"
BACKBONES = ["resnet50", "lite0", "swin_tiny", CONVNEXT]
NECKS = ["fpn_small", "bifpn_small"]

# Each head with each predictor; backbones and necks go round, so that all pairs meet.
WALK = [
    (head, predictor, BACKBONES[(h + p) % 4], NECKS[(h // 2 + p) % 2])
    for (h, head), (p, predictor) in product(enumerate(HEADS), enumerate(PREDICTORS))
]


def test_the_walk_covers_all_pairs() -> None:
    groups = [HEADS, PREDICTORS, BACKBONES, NECKS]
    for first, second in combinations(range(4), 2):
        assert {(row[first], row[second]) for row in WALK} == set(product(groups[first], groups[second]))


def scene() -> tuple[list[torch.Tensor], list[Target]]:
    """Two images of different sizes with bright and dark squares; one of them empty."""
    images = [torch.full((3, 64, 64), 0.5), torch.full((3, 48, 56), 0.5)]
    boxes = torch.tensor([[4.0, 6, 26, 30], [34, 30, 60, 58]])
    for box, value in zip(boxes.int().tolist(), (1.0, 0.0), strict=True):
        images[0][:, box[1] : box[3], box[0] : box[2]] = value
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    return images, [Target(boxes, torch.tensor([0, 1]), torch.tensor([False, False])), nothing]


@pytest.mark.parametrize("row", WALK, ids=" ".join)
def test_it_learns_and_detects(row: tuple[str, str, str, str]) -> None:
    head, predictor, backbone, neck = row
    torch.manual_seed(0)
    choice = f"head={head} predictor={predictor} backbone={backbone} neck={neck}".split()
    small = [
        "neck.channels=16",
        "backbone.weights=none",
        "backbone.frozen_stages=3",
        "predictor.postprocess.score_threshold=0.0",
    ]
    width = {
        "separable_small": ["head.num_convs=1"],
        "dyhead_small": ["head.num_blocks=1"],
        "dyhead_fine_grained_small": ["head.attention.num_blocks=1", "head.towers.depth=1"],
    }
    detector = build_detector(None, choice + small + width.get(head, []))
    images, targets = scene()
    detector.train()
    trained = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    values = []
    for _ in range(3):
        losses = detector.losses(images, targets)
        assert (losses.routing is not None) == ("grained" in head)
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        values.append(losses.total.item())
    assert values[-1] < values[0], values
    assert all(p.grad is not None for p in trained)

    detector.eval()
    found, routing = detector.detect_with_routing(images)
    assert len(found) == 2 and all(len(item) > 0 and item.scores.isfinite().all() for item in found)
    assert found[1].boxes[:, 2].max() <= 56 and found[1].boxes[:, 3].max() <= 48
    if routing is not None:
        assert routing.used_ratio().min() > 0 and routing.used_ratio().max() <= 1


ABLATIONS = [f"dyhead_small head.{part}=false" for part in ("spatial", "scale", "task")]
HALF = [
    *((head, predictor, torch.bfloat16) for head in ALL_HEADS for predictor in ONE_STAGE + TWO_STAGE),
    *((head, "fcos_small", torch.bfloat16) for head in ABLATIONS),
    *((head, "fcos_small", torch.float16) for head in ALL_HEADS + ABLATIONS),
]


@pytest.mark.parametrize(("head", "predictor", "dtype"), HALF, ids=str)
def test_it_trains_in_half_precision(head: str, predictor: str, dtype: torch.dtype) -> None:
    """As `trainer.precision=bf16-mixed` and `16-mixed` do."""
    torch.manual_seed(0)
    detector = tiny(head, predictor)
    with torch.autocast("cpu", dtype=dtype):
        losses = detector.losses(torch.rand(2, 3, 64, 64), targets(2))
    assert losses.total.dtype == torch.float32 and losses.total.isfinite()
    losses.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
