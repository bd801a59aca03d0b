"""Masks against loops and closed forms; figures of the networks; that they train, or say what they lack."""

from __future__ import annotations

import math
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dyndet import build_detector
from dyndet.errors import UserError
from dyndet.models.backbones.timm import TimmBackbone
from dyndet.models.detectors.two_stage import TwoStageDetector, assemble_two_stage
from dyndet.models.heads.none import NoHead
from dyndet.models.necks.fpn import FPN
from dyndet.models.predictors.anchors import AnchorGrid
from dyndet.models.preprocess import Preprocess
from dyndet.models.two_stage.cascade_rcnn import CascadeRCNN
from dyndet.models.two_stage.mask import MaskHead, MaskRCNN, crop_masks, paste_masks
from dyndet.models.two_stage.roi import BoxHead, FastRCNN, RoISamples
from dyndet.models.two_stage.rpn import RPN
from dyndet.ops.flops import count_macs
from dyndet.structures import Detections, ImageBatch, Size, Target

STRIDES = [4, 8, 16, 32, 64]
MAPS = [torch.zeros(1, 2, 256 // stride, 256 // stride) for stride in STRIDES]

# ---- figures

MASK_HEAD = 4 * (256 * 256 * 9 + 256) + (256 * 256 * 4 + 256) + (256 * 80 + 80)
FASTER_R50 = 41_753_056
FASTER_R101 = "faster_rcnn_r50 backbone.name=resnet101.tv_in1k"
SWIN_S = "mask_rcnn_swint backbone.name=swin_small_patch4_window7_224.ms_in1k"


@cache
def published(experiment: str) -> TwoStageDetector:
    with torch.device("meta"):
        name, *overrides = experiment.split()
        detector = build_detector(name, overrides)
    assert isinstance(detector, TwoStageDetector)
    return detector


@pytest.mark.parametrize(
    ("experiment", "count"),
    [
        (FASTER_R101, FASTER_R50 + 42_500_160 - 23_508_032),
        ("mask_rcnn_r50", FASTER_R50 + MASK_HEAD),
        ("mask_rcnn_swint", 47_794_602),
        (SWIN_S, 69_112_506),
    ],
)
def test_parameters(experiment: str, count: int) -> None:
    assert sum(parameter.numel() for parameter in published(experiment).parameters()) == count


def attention_products(width: int, depths: tuple[int, ...], size: Size, window: int = 7) -> int:
    """Multiply-adds of queries times keys and weights times values in all windows of a Swin."""
    total = 0
    for stage, depth in enumerate(depths):
        rows, columns = (math.ceil(side / (4 * 2**stage) / window) for side in size)
        total += depth * rows * columns * 2 * window**4 * width * 2**stage
    return total


@pytest.mark.parametrize(
    ("experiment", "gigamacs", "not_counted"),
    [
        ("faster_rcnn_r50", 207.1, 0),
        (FASTER_R101, 283.1, 0),
        ("mask_rcnn_swint", 263.8, attention_products(96, (2, 2, 6, 2), (800, 1280))),
        (SWIN_S, 353.8, attention_products(96, (2, 2, 18, 2), (800, 1280))),
    ],
)
def test_macs_of_the_published_table(experiment: str, gigamacs: float, not_counted: int) -> None:
    """At 800x1280 with 1000 proposals and 100 masks. The published counter sees layers (norms, too), and so leaves out
    the products of attention: 1 % more here.
    """
    counts = count_macs(published(experiment), (800, 1280))
    assert (counts["total"] - not_counted) / 1e9 == pytest.approx(gigamacs, rel=4e-3)
    masks = 100 * (14**2 * (4 * 256 * 256 * 9 + 256 * 256 * 4) + 28**2 * 256 * 80)
    assert counts.get("mask", 0) == (masks if "mask" in experiment else 0)


# ---- crop


def test_a_cell_is_set_where_half_of_it_is_covered() -> None:
    mask = torch.zeros(2, 60, 80, dtype=torch.bool)
    mask[1, 20:40, 10:30] = True
    # Of four cells of 10 pixels, so many are covered: 0 10 10 0, 6 10 4 0, 4 10 6 0, 5 10 5 0.
    boxes = torch.tensor([[left, 20.0, left + 40, 40] for left in (0, 6, 4, 5)])
    cropped = crop_masks(mask, torch.cat([boxes, boxes[:1]]), torch.tensor([1, 1, 1, 1, 0]), 4)
    assert cropped.shape == (5, 4, 4) and cropped.dtype == torch.bool
    for index, expected in enumerate(([0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0])):
        assert cropped[index].int().tolist() == [expected] * 4
    middle = ((torch.arange(40) % 10 - 4.5).abs() < 2).repeat(40, 1)
    dots = middle & middle.T  # 4 x 4 pixels in the middle of every cell
    box = torch.tensor([[0.0, 0, 40, 40]]).repeat(2, 1)
    assert crop_masks(torch.stack([dots, ~dots]), box, torch.arange(2), 4).float().mean((1, 2)).tolist() == [0, 1]


@pytest.mark.parametrize("left, top", [(0, 0), (7, 3), (20, 12)])
def test_cells_as_large_as_pixels_are_these_pixels(left: int, top: int) -> None:
    masks = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0)) < 0.5
    box = torch.tensor([[left, top, left + 28.0, top + 28]])
    for index, mask in enumerate(masks):
        cropped = crop_masks(masks, box, torch.tensor([index]), 28)
        assert torch.equal(cropped[0], mask[top : top + 28, left : left + 28])
        assert torch.equal(paste_masks(cropped.float(), box, (40, 48))[0, top : top + 28, left : left + 28], cropped[0])


def test_nothing_to_crop() -> None:
    assert crop_masks(torch.zeros(0, 9, 9).bool(), torch.zeros(0, 4), torch.zeros(0).long(), 28).shape == (0, 28, 28)


# ---- paste


def loop_paste(mask: Tensor, box: list[float], size: Size) -> Tensor:
    """(H, W) float64: bilinear between the centres of the cells, 0 beyond the outermost ones."""
    cells = mask.shape[-1]
    values = torch.zeros(size, dtype=torch.float64)
    for y in range(size[0]):
        for x in range(size[1]):
            u = (x + 0.5 - box[0]) / (box[2] - box[0]) * cells - 0.5
            v = (y + 0.5 - box[1]) / (box[3] - box[1]) * cells - 0.5
            for i in (math.floor(v), math.floor(v) + 1):
                for j in (math.floor(u), math.floor(u) + 1):
                    if 0 <= i < cells and 0 <= j < cells:
                        values[y, x] += float(mask[i, j]) * (1 - abs(v - i)) * (1 - abs(u - j))
    return values


@pytest.mark.parametrize("box", [[3.3, 2.1, 19.8, 27.4], [0.0, 0, 24, 32], [10.2, 9.7, 12.1, 11.9], [23.0, 0, 24, 0.6]])
def test_paste_equals_loops(box: list[float]) -> None:
    mask = torch.rand(1, 7, 7, generator=torch.Generator().manual_seed(1))
    pasted = paste_masks(mask, torch.tensor([box]), (32, 24))
    values = loop_paste(mask[0], box, (32, 24))
    sure = (values - 0.5).abs() > 1e-5  # float32 decides the others
    assert sure.double().mean() > 0.99
    assert torch.equal(pasted[0][sure], (values >= 0.5)[sure])


@settings(max_examples=50, deadline=None)
@given(x=st.floats(0, 40), y=st.floats(0, 40), w=st.floats(0.3, 60), h=st.floats(0.3, 60))
def test_a_sure_mask_fills_its_box(x: float, y: float, w: float, h: float) -> None:
    """The pixels whose centre lies in the box, up to the image's border, but for half a cell at the box's."""
    box = torch.tensor([[x, y, x + w, y + h]])
    pasted = paste_masks(torch.ones(1, 28, 28), box, (50, 70))[0]
    across = (torch.arange(70) + 0.5 - x) / w * 28
    down = ((torch.arange(50) + 0.5 - y) / h * 28)[:, None]
    assert pasted[(across > 0.5) & (across < 27.5) & (down > 0.5) & (down < 27.5)].all()
    assert not pasted[(across < -1e-3) | (across > 28.001) | (down < -1e-3) | (down > 28.001)].any()


@pytest.mark.parametrize(("side", "overlap"), [(9.3, 0.999), (21.6, 0.99), (60.2, 0.96), (150.7, 0.96)])
def test_a_mask_survives_crop_and_paste(side: float, overlap: float) -> None:
    """A disc anywhere between the pixels. (torchvision's crop and paste keep 0.78 of the smallest.)"""
    y, x = torch.meshgrid(torch.arange(200) + 0.5, torch.arange(220) + 0.5, indexing="ij")
    left, top = 30.37, 20.81
    disc = ((x - left - side / 2) ** 2 + (y - top - side / 2) ** 2).sqrt() <= side / 2
    box = torch.tensor([[left, top, left + side, top + side]])
    pasted = paste_masks(crop_masks(disc[None], box, torch.tensor([0]), 28).float(), box, (200, 220))[0]
    assert (pasted & disc).sum() / (pasted | disc).sum() > overlap


# ---- losses and detections of planted masks


class PlantedBoxes(nn.Module):
    def __init__(self, labels: list[int]) -> None:
        super().__init__()
        self.logits = 9.0 * F.one_hot(torch.tensor(labels) + 1, 4).float()

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits[: len(regions)], torch.zeros(len(regions), 16)


class PlantedMasks(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, regions: Tensor) -> Tensor:
        assert regions.shape[2:] == (14, 14)
        return self.logits[: len(regions)]


def planted(labels: list[int], logits: Tensor) -> MaskRCNN:
    """Boxes stay where they are proposed, with these labels."""
    box = partial(FastRCNN, num_classes=3, head=lambda **_: PlantedBoxes(labels))
    return MaskRCNN(2, STRIDES, box=box, head=lambda **_: PlantedMasks(logits))


def test_the_loss_is_of_positive_regions_and_their_own_class() -> None:
    draw = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 64, 64, generator=draw) < 0.4
    target = Target(torch.tensor([[4.0, 4, 36, 36], [30, 10, 60, 50]]), torch.tensor([2, 0]), torch.zeros(2), masks)
    empty = Target(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0))
    boxes = [torch.tensor([[30.0, 10, 58, 38], [2, 2, 30, 30], [0, 40, 20, 60]]), torch.tensor([[1.0, 1, 9, 9]])]
    matched = [torch.tensor([1, 0, 0]), torch.tensor([0])]
    samples = RoISamples(
        boxes, matched, [torch.tensor([1, 3, 0]), torch.tensor([0])], [torch.zeros(3, 4), torch.zeros(1, 4)]
    )
    logits = torch.randn(4, 3, 28, 28, generator=draw)
    stage = planted([0, 0, 0, 0], logits)
    maps = [level.repeat(2, 1, 1, 1) for level in MAPS]
    losses = stage.losses(maps, samples, [target, empty], [(64, 64)] * 2)
    assert set(losses) == {"cls", "box", "mask"}
    expected = 0.0
    for region, (label, index, (left, top)) in enumerate([(0, 1, (30, 10)), (2, 0, (2, 2))]):
        wanted = masks[index, top : top + 28, left : left + 28].double()  # cells as large as pixels
        share = torch.sigmoid(logits[region, label].double())
        expected -= float((wanted * share.log() + (1 - wanted) * (1 - share).log()).sum()) / (2 * 28 * 28)
    assert losses["mask"].item() == pytest.approx(expected, rel=1e-5)
    losses["mask"].backward()
    gradient = stage.get_parameter("mask_head.logits").grad
    assert gradient is not None
    touched = gradient.abs().sum((2, 3)) > 0
    assert touched.tolist() == [[True, False, False], [False, False, True], [False] * 3, [False] * 3]


def test_detections_of_the_second_stage_hold_shares() -> None:
    logits = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[10.0, 10, 50, 60], [100, 90, 190, 170]])
    (found,) = planted([2, 1], logits).detections(MAPS, [boxes], [(256, 256)])
    assert found.masks is not None and sorted(found.labels.tolist()) == [1, 2]
    for mask, own, label in zip(found.masks, logits, found.labels, strict=True):
        assert torch.allclose(mask, own[label].sigmoid())


def test_masks_are_of_the_detected_class_in_original_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The left half of the first box for class 1, the lower half of the second for class 0; other classes say all."""
    logits = torch.full((3, 3, 28, 28), 9.0)
    logits[0, 1, :, 14:] = -9
    logits[1, 0, :14] = -9
    detector = small().eval()
    detector.predictor = planted([1, 0], logits)
    boxes = torch.tensor([[8.0, 4, 40, 36], [48, 20, 88, 60]])
    monkeypatch.setattr(detector.rpn, "proposals", lambda raw, sizes, valid: [boxes, torch.zeros(0, 4)])
    sizes, original = torch.tensor([[64, 96], [40, 50]]), torch.tensor([[128, 288], [40, 25]])
    first, second = detector.detect(ImageBatch(torch.rand(2, 3, 64, 96), sizes, original))
    assert first.masks is not None and second.masks is not None
    assert second.masks.shape == (0, 40, 25) and first.masks.dtype == torch.bool
    wanted = torch.zeros(2, 128, 288, dtype=torch.bool)
    wanted[0, 8:72, 24:72] = True  # the box is 24..120, 8..72
    wanted[1, 80:120, 144:264] = True
    for label, mask in zip([1, 0], wanted, strict=True):
        (index,) = (first.labels == label).nonzero()[:, 0].tolist()
        assert not (first.masks[index] & ~mask).any()
        assert (mask & ~first.masks[index]).sum() <= 8  # at the corners of the box a mask fades twice


# ---- the whole detector


def small(box: type[FastRCNN] | type[CascadeRCNN] = FastRCNN, **more: object) -> TwoStageDetector:
    torch.manual_seed(0)
    boxes = partial(box, num_classes=3, head=partial(BoxHead, hidden=32), samples=64, score_threshold=0.0)
    return assemble_two_stage(
        preprocess=Preprocess(),
        backbone=TimmBackbone("test_resnet", strides=(4, 8, 16, 32), norm="train"),
        neck=partial(FPN, channels=16, extra_levels=1, extra="pool", extra_source="P5"),
        head=NoHead,
        rpn=partial(RPN, anchors=AnchorGrid([4.0], [0.5, 1.0, 2.0]), topk_train=200, topk_test=200, max_proposals=100),
        predictor=partial(MaskRCNN, box=boxes, head=partial(MaskHead, hidden=16, num_convs=2)),
        **more,  # type: ignore[arg-type]
    )


def scene() -> tuple[Tensor, dict[str, Tensor]]:
    """A red disc and a blue triangle."""
    pixels = 0.3 * torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    masks = torch.stack([(x - 24) ** 2 + (y - 28) ** 2 < 16**2, (x > 56) & (y < 52) & (x - 56 < y - 20)])
    for mask, colour in zip(masks, ([0.7, 0.1, 0.1], [0.1, 0.1, 0.7]), strict=True):
        pixels += mask * torch.tensor(colour)[:, None, None]
    boxes = torch.tensor([[8.0, 12, 40, 44], [56, 20, 88, 52]])
    return pixels, {"boxes": boxes, "labels": torch.tensor([2, 0]), "masks": masks}


EMPTY = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


@pytest.mark.parametrize("box", [FastRCNN, CascadeRCNN])
def test_every_parameter_trains_and_images_may_be_empty(box: type[FastRCNN] | type[CascadeRCNN]) -> None:
    detector = small(box).train()
    assert detector.has_masks
    pixels, target = scene()
    losses = detector.losses([pixels, pixels[:, :40, :50]], [target, EMPTY])
    assert set(losses.terms) == {"rpn_cls", "rpn_box", "cls", "box", "mask"}
    losses.total.backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    detector.zero_grad()
    alone = detector.losses([pixels], [EMPTY])
    assert alone.terms["mask"] == 0 and alone.total.isfinite()
    alone.total.backward()  # processes of a group wait for the gradients of all parameters
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []


def test_crowds_do_not_train_masks() -> None:
    pixels, target = scene()
    crowded = Target(
        torch.cat([torch.tensor([[0.0, 0, 90, 60]]), target["boxes"]]),
        torch.tensor([1, 2, 0]),
        torch.tensor([True, False, False]),
        torch.cat([torch.ones(1, 64, 96).bool(), target["masks"]]),
    )
    detector = small().train()
    terms = []
    for value in (target, crowded):
        torch.manual_seed(0)  # of the sampling
        terms.append(detector.losses(pixels[None], [value]).terms)
    assert all(torch.equal(terms[0][name], terms[1][name]) for name in terms[0])


def test_targets_without_masks_are_named_with_the_key_that_loads_them() -> None:
    pixels, target = scene()
    bare = Target(target["boxes"], target["labels"], torch.zeros(2).bool(), image_id=42, path="cats/42.jpg")
    with pytest.raises(UserError, match=r"image 42 cats/42\.jpg has no masks.*data\.masks=true"):
        small().train().losses(pixels[None], [bare])


@pytest.mark.parametrize("part", ["backbone", "predictor"])
def test_parts_can_run_in_bfloat16(part: str) -> None:
    detector = small(precision={part: "bfloat16"})
    pixels, target = scene()
    losses = detector.train().losses(pixels[None], [target])
    assert all(term.dtype == torch.float32 for term in losses.terms.values())
    losses.total.backward()
    masks = detector.eval().detect(pixels[None])[0].masks
    assert masks is not None and masks.shape[1:] == (64, 96)


def test_a_whole_detector_can_be_bfloat16() -> None:
    detector = small().to(torch.bfloat16)
    pixels, target = scene()
    found = detector.eval().detect(pixels[None])[0]
    assert len(found) and found.masks is not None and found.masks.dtype == torch.bool
    detector.train().losses(pixels[None], [target]).total.backward()


def test_the_cost_of_masks_is_a_part_of_its_own() -> None:
    detector = small()
    counts = count_macs(detector, (64, 96))
    assert list(counts) == ["backbone", "neck", "head", "rpn", "roi", "mask", "total"]
    assert counts["mask"] == 100 * (14**2 * (2 * 16 * 16 * 9 + 16 * 16 * 4) + 28**2 * 16 * 3)


def test_a_cascade_of_two_detectors_has_masks_too() -> None:
    keys = ["detector=dynamic_two_stage", "neck.channels=16", "predictor.roi.head.hidden=16"]
    torch.manual_seed(0)
    detector = build_detector("shapes_mask_rcnn", [*keys, "predictor.roi.box.score_threshold=0.0"])
    assert detector.has_masks and not published("faster_rcnn_r50").has_masks
    pixels, target = scene()
    losses = detector.train().losses(pixels[None], [target])
    assert {"first/mask", "second/mask"} <= losses.terms.keys()
    losses.total.backward()
    (found,) = detector.eval().detect(pixels[None])
    assert found.masks is not None and found.masks.shape == (len(found), 64, 96) and len(found)


def overlap(found: Detections, target: dict[str, Tensor]) -> list[float]:
    """Of every object's mask with that of the best detection of its class."""
    assert found.masks is not None
    best = [found.masks[found.labels == label][0] for label in target["labels"]]
    return [float((a & b).sum() / (a | b).sum()) for a, b in zip(best, target["masks"], strict=True)]


def test_at_first_masks_are_undecided() -> None:
    torch.manual_seed(0)
    logits = MaskHead(16, num_classes=3, hidden=16)(torch.randn(5, 16, 14, 14))
    assert logits.shape == (5, 3, 28, 28) and logits.abs().max() < 0.05


def test_it_learns_one_image() -> None:
    detector = small()
    pixels, target = scene()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    detector.train()
    history = []
    for _ in range(50):
        losses = detector.losses(pixels[None], [target])
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append(losses.terms["mask"].item())
    assert sum(history[-5:]) < 0.5 * sum(history[:5])
    assert min(overlap(detector.eval().detect(pixels[None])[0], target)) > 0.7
