"""What `detect` and `losses` refuse, with the number of the image and what to do about it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import tv_tensors

import dyndet
from dyndet.data.collate import Collate
from dyndet.errors import UserError
from dyndet.inputs import check_images, checked_targets
from dyndet.models.detectors.dense import DenseDetector
from dyndet.structures import ImageBatch, Sample, Target

DARK = torch.zeros(3, 64, 64, dtype=torch.uint8)


def image(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def detector() -> DenseDetector:
    """Small, and its scores are random enough to pass any threshold."""
    torch.manual_seed(0)
    built = dyndet.build_detector("shapes_dyn", ["head.depth=1", "predictor.postprocess.score_threshold=0.0"])
    assert isinstance(built, DenseDetector)
    nn.init.normal_(built.predictor.cls.weight, std=0.5)  # type: ignore[attr-defined]
    return built


def test_every_way_to_give_the_same_pixels_finds_the_same(detector: DenseDetector) -> None:
    pixels = image()
    batch = ImageBatch(pixels[None], torch.tensor([[64, 64]]), torch.tensor([[64, 64]]))
    ways: list[Any] = [[pixels], pixels[None], [pixels.float() / 255], batch, (tv_tensors.Image(pixels),)]
    first, *others = (detector.detect(way)[0] for way in ways)
    assert len(first) and all(torch.equal(first.boxes, other.boxes) for other in others)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([DARK, image().float()], r"images\[1\] is torch\.float32 on cpu|images\[0\] is torch\.uint8 on cpu, but"),
        ([image().float()], r"images\[0\] reaches from 0 to 255, but floats are 0\.\.1: divide by 255"),
        (torch.stack([DARK, image()]).float(), r"images\[1\] reaches from 0 to 255"),
        ([torch.randn(3, 64, 64) * 4], r"images\[0\] reaches from .* the detector normalises it itself"),
        ([DARK / 255, torch.full((3, 64, 64), math.nan)], r"images\[1\] holds NaN"),
        ([image().int()], r"images\[0\]: pixels are torch\.int32: give uint8 of 0\.\.255"),
        (image()[None].long(), r"images: pixels are torch\.int64"),
        ([DARK.bool()], r"pixels are torch\.bool"),
        (DARK, r"images must be \(B, 3, H, W\), got \(3, 64, 64\): put a single image into a list"),
        ([DARK, DARK.permute(1, 2, 0)], r"\(3, H, W\), but images\[1\] is \(64, 64, 3\): channels come first"),
        ([DARK[:1]], r"images\[0\] is \(1, 64, 64\): repeat grey"),
        (torch.zeros(2, 4, 8, 8), r"got \(2, 4, 8, 8\): leave the fourth channel out"),
        ([DARK[:, :0]], r"images\[0\] is \(3, 0, 64\)"),
        (DARK[None][:0], r"got \(0, 3, 64, 64\)"),
        ([], "images is empty"),
        ([DARK.numpy()], r"images\[0\] is a ndarray: give tensors"),
        ("photo.jpg", "images are a str"),
        (DARK.numpy(), "images are a ndarray"),
        ([DARK, DARK.to("meta")], r"images\[0\] is torch\.uint8 on cpu, but images\[1\] is torch\.uint8 on meta"),
        (ImageBatch(image()[None].float(), torch.tensor([[64, 64]]), torch.tensor([[64, 64]])), r"pixels\[0\] reaches"),
    ],
)
def test_images_that_would_be_read_wrongly_are_refused(detector: DenseDetector, images: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        detector.detect(images)


BOX = {"boxes": torch.tensor([[20.0, 20, 60, 50]]), "labels": torch.tensor([0])}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"boxes": torch.tensor([[60.0, 60, 20, 20]])},
            r"targets\[1\]: box 0, \[60, 60, 20, 20\], ends before .* xywh",
        ),
        ({"boxes": torch.tensor([[20.0, 50, 60, 20]])}, "ends before it begins"),
        ({"boxes": torch.tensor([[20.0, 20, 20, 50]])}, "has no area"),
        ({"boxes": torch.tensor([[math.nan, 1, 20, 20]])}, r"\[nan, 1, 20, 20\], is not finite"),
        ({"boxes": torch.tensor([[1, 1, math.inf, 20]])}, "is not finite"),
        ({"boxes": torch.tensor([[-50.0, -50, -10, 20]])}, r"lies outside of its image of 64 x 64 pixels"),
        ({"boxes": torch.tensor([[64.0, 1, 90, 20]])}, "lies outside"),
        ({"boxes": torch.tensor([[0.2, 0.2, 0.9, 0.5]])}, None),  # beside a box in pixels
        ({"boxes": torch.zeros(0)}, r"boxes must be \(N, 4\), got \(0,\); without objects torch\.zeros\(0, 4\)"),
        ({"boxes": torch.zeros(4)}, r"boxes must be \(N, 4\), got \(4,\)"),
        ({"boxes": [[20.0, 20, 60, 50]]}, "boxes is a list: give a tensor"),
        ({"boxes": torch.ones(1, 4, dtype=torch.bool)}, r"boxes are torch\.bool"),
        ({"labels": torch.tensor([0, 1])}, r"targets\[1\]: labels must be \(1,\), one for each box, got \(2,\)"),
        ({"labels": torch.tensor([[0]])}, r"labels must be \(1,\), .* got \(1, 1\)"),
        ({"labels": torch.tensor([0.0])}, r"labels are torch\.float32: give whole numbers"),
        ({"labels": torch.tensor([4])}, r"labels must lie in 0\.\.3 .*first in targets\[1\]\): count classes from 0"),
        ({"labels": torch.tensor([-1])}, r"labels must lie in 0\.\.3"),
        ({"iscrowd": torch.tensor([0, 1])}, r"iscrowd must be \(1,\)"),
        ({"iscrowd": torch.tensor([0.5])}, r"iscrowd are torch\.float32: give 0 or 1"),
        ({"crowd": [False]}, "crowd is a list"),
        ({"masks": torch.zeros(2, 64, 64, dtype=torch.bool)}, r"masks must be \(1, H, W\), .* got \(2, 64, 64\)"),
    ],
)
def test_targets_that_would_train_wrongly_are_refused(
    detector: DenseDetector, target: dict[str, Any], message: str | None
) -> None:
    targets: list[Any] = [BOX, BOX | target]
    detector.train()
    if message is None:
        assert detector.losses([DARK, DARK], targets).total.isfinite()
        return
    with pytest.raises(UserError, match=message):
        detector.losses([DARK, DARK], targets)


def test_targets_must_be_complete(detector: DenseDetector) -> None:
    spans = [[1, 1, 5, 5]]
    xywh: Any = tv_tensors.BoundingBoxes(spans, format="XYWH", canvas_size=(64, 64))  # type: ignore[call-overload]
    wrong: list[tuple[Any, str]] = [
        ([BOX], "1 targets for 2 images"),
        (BOX, "a dict for 2 images"),
        ([BOX, {"labels": torch.tensor([0])}], r"targets\[1\]: boxes is missing"),
        ([None, BOX], r"targets\[0\] is a NoneType"),
        ([{**BOX, "boxes": xywh}, BOX], r"targets\[0\]: boxes are XYWH: convert"),
        ([{**BOX, "boxes": torch.tensor([[0.1, 0.1, 0.5, 0.5]])}] * 2, r"lie within 0\.\.1: .* multiply fractions"),
    ]
    for targets, message in wrong:
        with pytest.raises(UserError, match=message):
            detector.losses([DARK, DARK], targets)


def test_crowds_are_spelled_in_either_way(detector: DenseDetector) -> None:
    detector.eval()
    two = {"boxes": torch.tensor([[20.0, 20, 60, 50], [2.0, 2, 30, 30]]), "labels": torch.tensor([0, 1])}
    crowd = torch.tensor([0, 1])
    ways = [two, two | {"iscrowd": crowd}, two | {"crowd": crowd.bool()}, two | {"iscrowd": crowd.to(torch.uint8)}]
    every, *others = (detector.losses([image()], [way]).total.item() for way in ways)
    assert others == [detector.losses([image()], [BOX]).total.item()] * 3 and every != others[0]


def test_messages_name_the_file() -> None:
    target = Target(torch.tensor([[9.0, 9, 3, 3]]), torch.tensor([0]), torch.tensor([False]), path="a/b.jpg")
    with pytest.raises(UserError, match=r"targets\[0\] \(a/b\.jpg\): box 0, \[9, 9, 3, 3\]"):
        checked_targets([target], ImageBatch.of([DARK]))


SIDES = st.integers(-40, 140)


@given(st.lists(st.tuples(SIDES, SIDES, SIDES, SIDES), min_size=1, max_size=4))
def test_boxes_pass_exactly_when_a_part_of_them_is_seen(boxes: list[tuple[int, int, int, int]]) -> None:
    """The second image of a batch of 64 x 80 and 48 x 100 pixels, against arithmetic on whole numbers."""
    images = ImageBatch.of([torch.zeros(3, 64, 80), torch.zeros(3, 48, 100)])
    seen = all(
        x1 < x2 and y1 < y2 and min(x2, 100) > max(x1, 0) and min(y2, 48) > max(y1, 0) for x1, y1, x2, y2 in boxes
    )
    inside = {"boxes": torch.tensor([[0, 0, 9, 9]]), "labels": torch.tensor([0])}
    target = {"boxes": torch.tensor(boxes), "labels": torch.zeros(len(boxes), dtype=torch.int32)}
    if seen:
        (_, passed) = checked_targets([inside, target], images)
        assert torch.equal(passed.boxes, torch.tensor(boxes).float()) and passed.labels.dtype == torch.int64
    else:
        with pytest.raises(UserError, match=r"targets\[1\]"):
            checked_targets([inside, target], images)


def test_values_on_other_devices_are_not_read() -> None:
    """Of meta tensors there are none: reading them would raise, as it would wait on a GPU."""
    images = ImageBatch.of(torch.zeros(1, 3, 64, 64, device="meta"))
    target = Target(torch.zeros(1, 4), torch.zeros(1).long(), torch.zeros(1).bool()).to("meta")
    assert checked_targets([target], images) == [target]
    with pytest.raises(UserError, match="labels must be"):
        checked_targets([Target(target.boxes, torch.zeros(2).long(), target.crowd)], images)


def test_a_captured_graph_has_no_checks_of_values() -> None:
    class Doubled(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            check_images(pixels)
            return 2 * pixels

    exported = torch.export.export(Doubled(), (torch.rand(1, 3, 8, 8),)).module()
    assert float(exported(torch.full((1, 3, 8, 8), 100.0)).max()) == 200
    with pytest.raises(UserError, match="divide by 255"):
        Doubled()(torch.full((1, 3, 8, 8), 100.0))


def test_samples_of_own_datasets_are_checked_where_they_are_collated() -> None:
    target = Target(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).bool(), original_size=(64, 64))
    with pytest.raises(UserError, match=r"images\[1\] is \(64, 64, 3\)"):
        Collate()([Sample(DARK, target), Sample(DARK.permute(1, 2, 0), target)])
