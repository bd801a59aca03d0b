"""The region proposal network against loops, and each convention that differs from torchvision's defaults."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from dyndet.models.two_stage.rpn import RPN
from dyndet.structures import Target


def target(*boxes: tuple[float, float, float, float]) -> Target:
    return Target(torch.tensor(boxes).view(-1, 4), torch.zeros(len(boxes), dtype=torch.int64), torch.zeros(len(boxes)))


def maps(rpn: RPN, *shapes: tuple[int, int], images: int = 1, seed: int = 0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "objectness": torch.randn(images, 3, *shape, generator=draw).requires_grad_(),
            "deltas": torch.randn(images, 12, *shape, generator=draw).mul(0.1).requires_grad_(),
        }
        for shape in shapes
    ]


def test_anchors_are_exact() -> None:
    """32 to 512 on strides 4 to 64, also where a level does not divide the image: 13 x 64 exceeds 800."""
    rpn = RPN(8, [4, 64])
    fine, coarse = rpn._anchors(maps(rpn, (200, 336), (13, 21)))
    for index, ratio in enumerate((0.5, 1.0, 2.0)):
        width, height = 32 / math.sqrt(ratio), 32 * math.sqrt(ratio)
        assert fine[index].tolist() == pytest.approx([-width / 2, -height / 2, width / 2, height / 2])
        assert (coarse[-3 + index] / 16 + coarse.new_tensor([-80, -48, -80, -48])).tolist() == pytest.approx(
            fine[index].tolist()
        )


def loop_losses(
    rpn: RPN, raw: list[dict[str, Tensor]], targets: list[Target], counts: Tensor, *, samples: int
) -> tuple[float, float]:
    """Both losses when every anchor that may train does, in float64."""
    cls, box = 0.0, 0.0
    for image, wanted in enumerate(targets):
        rows = []
        for level, stride in zip(raw, rpn.strides, strict=True):
            height, width = level["objectness"].shape[-2:]
            for y in range(height):
                for x in range(width):
                    if y * stride >= counts[image, 0] or x * stride >= counts[image, 1]:
                        continue
                    for a, ratio in enumerate((0.5, 1.0, 2.0)):
                        w, h = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
                        anchor = [x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2]
                        logit = level["objectness"][image, a, y, x].item()
                        delta = level["deltas"][image, 4 * a : 4 * a + 4, y, x].tolist()
                        overlaps = [pair_iou(anchor, other) for other in wanted.boxes.tolist()]
                        rows.append((anchor, logit, delta, overlaps))
        best = [max(row[3][g] for row in rows) for g in range(len(wanted.boxes))]
        for anchor, logit, delta, overlaps in rows:
            top = max(overlaps, default=0.0)
            positive = top >= 0.7 or any(math.isclose(o, b, rel_tol=1e-6) for o, b in zip(overlaps, best, strict=True))
            if not positive and top >= 0.3:
                continue
            cls += math.log1p(math.exp(-logit)) if positive else math.log1p(math.exp(logit))
            if positive:
                goal = wanted.boxes[overlaps.index(top)].tolist()
                ideal = [
                    ((goal[0] + goal[2]) - (anchor[0] + anchor[2])) / 2 / (anchor[2] - anchor[0]),
                    ((goal[1] + goal[3]) - (anchor[1] + anchor[3])) / 2 / (anchor[3] - anchor[1]),
                    math.log((goal[2] - goal[0]) / (anchor[2] - anchor[0])),
                    math.log((goal[3] - goal[1]) / (anchor[3] - anchor[1])),
                ]
                box += sum(abs(d - i) for d, i in zip(delta, ideal, strict=True))
    return cls / samples / len(targets), box / samples / len(targets)


def pair_iou(a: list[float], b: list[float]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(w, 0) * max(h, 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def test_losses_equal_loops() -> None:
    rpn = RPN(8, [4, 8], samples=100_000)
    raw = maps(rpn, (12, 16), (6, 8), images=2)
    targets = [target((3.0, 5, 31, 38), (20.0, 2, 60, 34), (10.75, 6.75, 37.25, 33.25)), target()]
    sizes = torch.tensor([[48, 64], [30, 44]])
    valid = [
        ((torch.arange(h) * s < sizes[:, :1])[:, :, None] & (torch.arange(w) * s < sizes[:, 1:])[:, None])[:, None]
        for h, w, s in ((12, 16, 4), (6, 8, 8))
    ]
    losses = rpn.losses(raw, targets, valid)
    cls, box = loop_losses(rpn, raw, targets, sizes, samples=100_000)
    assert losses["rpn_cls"].item() == pytest.approx(cls, rel=1e-5)
    assert losses["rpn_box"].item() == pytest.approx(box, rel=1e-5)


def test_sampling_takes_256_half_positive() -> None:
    rpn = RPN(8, [8])
    raw = maps(rpn, (32, 32), images=2)
    anchors = rpn._anchors(raw)[0].view(32, 32, 3, 4)
    many = target(*anchors[4:28:2, 4:28:2].reshape(-1, 4).tolist())
    torch.stack(list(rpn.losses(raw, [many, many]).values())).sum().backward()
    for image in range(2):
        objectness, deltas = raw[0]["objectness"].grad, raw[0]["deltas"].grad
        assert objectness is not None and deltas is not None
        assert (objectness[image] != 0).sum() == 256
        assert (deltas[image] != 0).sum() == 4 * 128


def test_empty_images_train_background_only() -> None:
    rpn = RPN(8, [8])
    raw = maps(rpn, (8, 8))
    losses = rpn.losses(raw, [target()])
    assert losses["rpn_box"].item() == 0 and losses["rpn_cls"].isfinite()
    torch.stack(list(losses.values())).sum().backward()
    objectness = raw[0]["objectness"].grad
    assert objectness is not None and (objectness >= 0).all() and (objectness > 0).any()


@pytest.mark.parametrize("ignore", [True, False])
def test_padding_neither_trains_nor_proposes(ignore: bool) -> None:
    rpn = RPN(8, [8], samples=100_000, ignore_padding=ignore)
    clean, noisy = maps(rpn, (8, 8)), maps(rpn, (8, 8))
    valid = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    valid[..., :5, :6] = True
    for values in noisy[0].values():
        values.data += 3 * ~valid
    wanted = [target((5.0, 5, 40, 38))]
    a, b = rpn.losses(clean, wanted, [valid]), rpn.losses(noisy, wanted, [valid])
    assert torch.equal(a["rpn_cls"], b["rpn_cls"]) == ignore
    first, second = rpn.proposals(clean, [(40, 48)], [valid])[0], rpn.proposals(noisy, [(40, 48)], [valid])[0]
    assert torch.equal(first, second) == ignore
    assert first[:, 2].max() <= 48 and first[:, 3].max() <= 40 and first.min() >= 0


def test_padding_takes_no_place_among_the_candidates() -> None:
    """All 5 x 6 x 3 anchors of the image, and none of the 102 others."""
    rpn = RPN(8, [8], topk_test=90, nms_iou=1.0).eval()
    valid = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    valid[..., :5, :6] = True
    assert len(rpn.proposals(maps(rpn, (8, 8)), [(40, 48)], [valid])[0]) == 90


@pytest.mark.parametrize(("training", "count"), [(True, 2000), (False, 1000)])
def test_candidates_per_level(training: bool, count: int) -> None:
    """Two levels, the first with 3072 anchors, the second with 192; nothing is suppressed."""
    rpn = RPN(8, [8, 16], nms_iou=1.0, max_proposals=10_000).train(training)
    assert len(rpn.proposals(maps(rpn, (32, 32), (8, 8)), [(256, 256)])[0]) == count + 192


def test_a_thousand_proposals_survive() -> None:
    rpn = RPN(8, [4, 8], nms_iou=1.0).train()
    assert len(rpn.proposals(maps(rpn, (32, 32), (32, 32)), [(256, 256)])[0]) == 1000


@pytest.mark.parametrize(("shift", "kept"), [(12.0, 2), (10.0, 1)])
def test_suppression_from_an_overlap_of_0_7(shift: float, kept: int) -> None:
    """Two square anchors of 64 pixels, moved apart: the IoU is (64 - shift) / (64 + shift)."""
    rpn = RPN(8, [8], max_proposals=2).eval()
    raw = maps(rpn, (16, 16))
    raw[0]["objectness"].data.fill_(-20)
    raw[0]["deltas"].data.zero_()
    for x, score in ((6, 9.0), (7, 8.0)):
        raw[0]["objectness"].data[0, 1, 8, x] = score
    raw[0]["deltas"].data[0, 4, 8, 7] = (shift - 8) / 64
    found = rpn.proposals(raw, [(128, 128)])[0]
    assert found[0].tolist() == [16, 32, 80, 96]
    second = torch.tensor([[16 + shift, 32, 80 + shift, 96]])
    assert (box_iou(second, found).max() > 0.99).item() == (kept == 2)
