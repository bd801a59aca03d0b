"""The two-stage detector: figures, images of several sizes, routing, precision, and that it learns."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from dyndet import build_detector
from dyndet.errors import UserError
from dyndet.models.backbones.timm import TimmBackbone
from dyndet.models.budget import Budget
from dyndet.models.detectors.two_stage import TwoStageDetector, assemble_two_stage
from dyndet.models.heads.fine_grained import FineGrainedHead
from dyndet.models.heads.none import NoHead
from dyndet.models.necks.fpn import FPN
from dyndet.models.predictors.anchors import AnchorGrid
from dyndet.models.preprocess import Preprocess
from dyndet.models.two_stage.cascade_rcnn import CascadeRCNN
from dyndet.models.two_stage.roi import BoxHead, FastRCNN
from dyndet.models.two_stage.rpn import RPN
from dyndet.ops.flops import MacCounter, count_macs
from dyndet.structures import ImageBatch, Size, Target

DYHEAD = 11_503_656


@cache
def published(experiment: str) -> TwoStageDetector:
    with torch.device("meta"):
        name, *overrides = experiment.split()
        detector = build_detector(name, [*overrides, "backbone.stride_in_1x1=false"])
    assert isinstance(detector, TwoStageDetector)
    return detector


@pytest.mark.parametrize(
    ("experiment", "count"),
    [
        ("faster_rcnn_r50", 53_256_712 - DYHEAD),
        ("dyhead_faster_rcnn_r50", 53_256_712),
        ("faster_rcnn_r50 predictor=cascade_rcnn", 80_898_422 - DYHEAD),
    ],
)
def test_parameters(experiment: str, count: int) -> None:
    assert sum(parameter.numel() for parameter in published(experiment).parameters()) == count


@pytest.mark.parametrize(
    ("experiment", "size", "total"),
    [
        ("dyhead_faster_rcnn_r50", (800, 1333), 720.622),
        ("dyhead_faster_rcnn_r50", (800, 1344), 724.165),
        ("dyhead_faster_rcnn_r50", (896, 1408), 847.064),
        ("faster_rcnn_r50", (800, 1344), 724.165 - 508.233),
        ("faster_rcnn_r50 predictor=cascade_rcnn", (800, 1344), 751.803 - 508.233),
    ],
)
def test_macs(experiment: str, size: Size, total: float) -> None:
    counts = count_macs(published(experiment), size)
    assert counts["total"] / 1e9 == pytest.approx(total, abs=1e-3)
    assert list(counts) == ["backbone", "neck", "head", "rpn", "roi", "total"]
    if size == (800, 1344):
        second = 95.089 if "cascade" in experiment else 67.451
        assert (counts["rpn"] + counts["roi"]) / 1e9 == pytest.approx(second, abs=1e-3)
        assert counts["neck"] / 1e9 == pytest.approx(60.899, abs=1e-3)
        assert counts["head"] / 1e9 == pytest.approx(508.233 if "dyhead" in experiment else 0, abs=1e-3)


def small(
    predictor: type[FastRCNN] | type[CascadeRCNN] = FastRCNN, head: partial | type = NoHead, **more: object
) -> TwoStageDetector:
    torch.manual_seed(0)
    return assemble_two_stage(
        preprocess=Preprocess(),
        backbone=TimmBackbone("test_resnet", strides=(4, 8, 16, 32), norm="train"),
        neck=partial(FPN, channels=16, extra_levels=1, extra="pool", extra_source="P5"),
        head=head,
        rpn=partial(RPN, anchors=AnchorGrid([4.0], [0.5, 1.0, 2.0])),
        predictor=partial(predictor, num_classes=3, head=partial(BoxHead, hidden=32), samples=128, score_threshold=0.0),
        **more,  # type: ignore[arg-type]
    )


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


BOX = {"boxes": torch.tensor([[8.0, 12, 40, 44]]), "labels": torch.tensor([2])}
EMPTY = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def test_raw_outputs_are_the_maps_of_the_rpn() -> None:
    raw = small().eval().raw_outputs(image(64, 96)[None])
    assert [{k: tuple(v.shape) for k, v in level.items()} for level in raw] == [
        {"objectness": (1, 3, h, w), "deltas": (1, 12, h, w)} for h, w in ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2))
    ]


@pytest.mark.parametrize("predictor", [FastRCNN, CascadeRCNN])
def test_every_parameter_trains_and_images_may_be_empty(predictor: type[FastRCNN] | type[CascadeRCNN]) -> None:
    detector = small(predictor).train()
    losses = detector.losses([image(64, 96), image(40, 50)], [BOX, EMPTY])
    assert set(losses.terms) == {"rpn_cls", "rpn_box", "cls", "box"} and losses.routing is None
    losses.total.backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    alone = detector.losses([image(64, 96)], [EMPTY])
    assert alone.total.isfinite()
    assert alone.terms["box"] == 0 and alone.terms["rpn_box"] == 0
    alone.total.backward()


def test_crowds_and_boxes_without_area_do_not_count() -> None:
    """`losses` refuses boxes without area; those of images that are evaluated are as annotated."""
    detector = small().eval()
    boxes = torch.tensor([[8.0, 12, 40, 44], [0.0, 0, 90, 60], [5.0, 5, 5, 20]])
    mixed = Target(boxes, torch.tensor([2, 0, 1]), torch.tensor([False, True, False]))
    terms = []
    for target in (mixed, BOX):
        torch.manual_seed(0)  # of the sampling
        terms.append(detector.image_losses(image(64, 96)[None], [target]))
    assert torch.equal(*terms) and terms[0] > 0
    with pytest.raises(UserError, match=r"box 2, \[5, 5, 5, 20\], has no area"):
        detector.losses(image(64, 96)[None], [mixed])


def test_labels_out_of_range_are_named() -> None:
    with pytest.raises(UserError, match=r"labels must lie in 0\.\.2 .*first in targets\[0\]"):
        small().train().losses(image(64, 96)[None], [{**BOX, "labels": torch.tensor([3])}])


class Sure(nn.Module):
    """A box head that is sure of class 1 and leaves boxes where they are."""

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor([[0.0, 0, 20, 0]]).repeat(len(regions), 1), torch.zeros(len(regions), 16)


def test_detections_return_in_original_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = small().eval()
    detector.predictor.stage.box_head = Sure()  # type: ignore[attr-defined]
    planted = [torch.tensor([[8.0, 4, 40, 28]]), torch.tensor([[10.0, 10, 30, 38]])]
    monkeypatch.setattr(detector.rpn, "proposals", lambda raw, sizes, valid: planted)
    sizes = torch.tensor([[64, 96], [40, 50]])
    batch = ImageBatch(torch.rand(2, 3, 64, 96), sizes, torch.tensor([[128, 288], [40, 25]]))
    first, second = detector.detect(batch)
    assert first.scores[0] > 0.99 and first.labels[0] == 1
    assert torch.allclose(first.boxes[0], torch.tensor([24.0, 8, 120, 56]))
    assert torch.allclose(second.boxes[0], torch.tensor([5.0, 10, 15, 38]))


class Averages(nn.Module):
    """A pyramid in which every position sees its own pixels only."""

    strides = (4, 8, 16, 32, 64)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return [F.avg_pool2d(pixels, stride).repeat(1, 6, 1, 1)[:, :16] for stride in self.strides]


def test_a_batch_of_two_sizes_equals_single_images() -> None:
    detector = small().eval()
    detector.backbone, detector.neck = nn.Identity(), Averages()  # type: ignore[assignment]
    detector.rpn = RPN(16, Averages.strides, topk_test=200, max_proposals=100).eval()
    for name, parameter in detector.named_parameters():
        parameter.data.normal_(std=0.3)
        if name.endswith("head.conv.0.0.bias"):  # where there is nothing to see all scores are equal, and the lowest
            parameter.data.zero_()
        elif name.endswith("cls_logits.weight"):
            parameter.data.abs_()
    images = [Preprocess().mean.repeat(1, *size) for size in ((128, 192), (192, 128))]
    for seed, pixels in enumerate(images):  # the mean colour at the border, as beyond it
        pixels[:, :-32, :-32] = image(pixels.shape[1] - 32, pixels.shape[2] - 32, seed)
    together = detector.detect(images)
    for pixels, found in zip(images, together, strict=True):
        alone = detector.detect([pixels])[0]
        assert len(found) == len(alone) > 50
        assert torch.allclose(found.boxes, alone.boxes, atol=1e-3) and torch.equal(found.labels, alone.labels)
        assert torch.allclose(found.scores, alone.scores, atol=1e-5)


def test_a_routed_head_is_priced_and_passed_through() -> None:
    head = partial(FineGrainedHead, depth=1, norm_groups=4)
    detector = small(head=head, budget=Budget(0.1))
    losses = detector.train().losses(image(64, 96)[None], [BOX])
    assert losses.routing is not None
    expected = 0.1 * (losses.routing.soft() / losses.routing.full()).mean()
    assert losses.terms["budget"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert detector.eval().detect_with_routing(image(64, 96)[None])[1] is not None
    always = MacCounter(detector).count((64, 96), gated=False)
    assert list(always) == ["backbone", "neck", "rpn", "roi", "total"]


@pytest.mark.parametrize("part", ["backbone", "neck", "predictor"])
def test_any_part_can_run_in_bfloat16(part: str) -> None:
    mixed, exact = small(precision={part: "bfloat16"}), small()
    a, b = mixed.eval().raw_outputs(image(64, 96)[None]), exact.eval().raw_outputs(image(64, 96)[None])
    assert a[0]["deltas"].dtype == (torch.bfloat16 if part == "predictor" else torch.float32)
    assert torch.allclose(a[0]["deltas"].float(), b[0]["deltas"], atol=0.05)
    losses = mixed.train().losses(image(64, 96)[None], [BOX])
    assert all(term.dtype == torch.float32 for term in losses.terms.values())
    losses.total.backward()
    assert mixed.eval().detect(image(64, 96)[None])[0].boxes.dtype == torch.float32


def test_a_whole_detector_can_be_bfloat16() -> None:
    detector = small().to(torch.bfloat16)
    assert len(detector.eval().detect(image(64, 96)[None])[0])
    losses = detector.train().losses(image(64, 96)[None], [BOX])
    assert losses.total.dtype == torch.float32
    losses.total.backward()


@pytest.mark.parametrize("predictor", [FastRCNN, CascadeRCNN])
def test_it_learns_one_image(predictor: type[FastRCNN] | type[CascadeRCNN]) -> None:
    detector = small(predictor)
    pixels = 0.3 * image(64, 96)
    pixels[:, 12:44, 8:40] += torch.tensor([0.7, 0.1, 0.1])[:, None, None]
    pixels[:, 20:52, 56:88] += torch.tensor([0.1, 0.1, 0.7])[:, None, None]
    target = {"boxes": torch.tensor([[8.0, 12, 40, 44], [56.0, 20, 88, 52]]), "labels": torch.tensor([2, 0])}
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    detector.train()
    history = []
    for _ in range(60):
        losses = detector.losses(pixels[None], [target])
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append(losses.total.item())
    assert sum(history[-5:]) < 0.4 * sum(history[:5])
    found = detector.eval().detect(pixels[None])[0]
    for box, label in zip(target["boxes"], target["labels"], strict=True):
        best = found.boxes[found.labels == label][:1]
        assert box_iou(best, box[None]).item() > 0.5
