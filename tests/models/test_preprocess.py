"""Pixels to network input: colours, padding, and images in the middle of a canvas."""

from __future__ import annotations

import pytest
import torch

from dyndet.api import build_detector
from dyndet.models.preprocess import Preprocess
from dyndet.structures import ImageBatch


def test_padding_takes_the_mean_colour_or_a_grey() -> None:
    images = ImageBatch.of([torch.full((3, 32, 20), 200, dtype=torch.uint8)], 32)
    mean = Preprocess()(images)
    assert not mean[..., 20:].any() and mean[..., :20].all()
    grey = Preprocess(mean=(0.5, 0, 0), std=(0.5, 1, 1), fill=114 / 255)(images)
    torch.testing.assert_close(grey[0, :, 0, 25], torch.tensor([(114 / 255 - 0.5) / 0.5, 114 / 255, 114 / 255]))
    torch.testing.assert_close(grey[0, 1:, 0, 0], torch.full((2,), 200 / 255))


@pytest.mark.parametrize(
    ("size", "canvas"),
    [((480, 640), (512, 672)), ((427, 640), (448, 672)), ((360, 640), (384, 672)), ((640, 640), (672, 672))],
)
def test_the_published_canvases(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    placed = Preprocess(pad_multiple=32, centred=True).eval().place(ImageBatch.of(torch.zeros(1, 3, *size)))
    assert tuple(placed.pixels.shape[-2:]) == canvas


def test_images_lie_in_the_middle() -> None:
    preprocess = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), pad_multiple=32, fill=114 / 255, centred=True).eval()
    images = ImageBatch.of([torch.ones(3, 64, 33), torch.ones(3, 40, 64)], 32)
    placed = preprocess.place(images)
    assert placed.offsets is not None and placed.offsets.tolist() == [[16, 31], [28, 16]]  # 96 x 96
    network = preprocess(placed)
    for index, (rows, columns) in enumerate([(64, 33), (40, 64)]):
        inside = network[index, 0] == 1
        top, left = placed.offsets[index].tolist()
        assert int(inside.sum()) == rows * columns and bool(inside[top : top + rows, left : left + columns].all())
        assert torch.allclose(network[index, 0][~inside], torch.tensor(114 / 255))
    assert preprocess.place(placed) is placed
    assert Preprocess(centred=True).train().place(images) is images


def test_detections_come_back_to_the_image() -> None:
    """A centred canvas is one larger image: its detections, moved."""
    torch.manual_seed(0)
    keys = ["preprocess.centred=true", "preprocess.fill=0.25"]
    detector = build_detector("shapes_dy_yolo", keys)
    image = torch.rand(3, 96, 64)
    (found,) = detector.detect(image[None])
    canvas = torch.full((3, 128, 96), 0.25)
    canvas[:, 16:112, 16:80] = image
    detector.preprocess.centred = False
    (whole,) = detector.detect(canvas[None])
    moved = whole.boxes - 16
    limit = torch.tensor([64.0, 96.0]).repeat(2)
    clipped = torch.minimum(moved.clamp(min=0), limit)
    solid = (clipped[:, 2:] > clipped[:, :2]).all(1)
    assert len(found) == int(solid.sum()) > 0
    torch.testing.assert_close(found.boxes, clipped[solid], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.scores, whole.scores[solid])


def test_losses_know_where_the_image_lies() -> None:
    torch.manual_seed(0)
    detector = build_detector("shapes_dy_yolo", ["preprocess.centred=true", "preprocess.fill=0.25"])
    image, box = torch.rand(3, 96, 64), torch.tensor([[10.0, 20.0, 40.0, 60.0]])
    target = {"boxes": box, "labels": torch.tensor([1])}
    losses = detector.losses(image[None], [target])
    canvas = torch.full((3, 128, 96), 0.25)
    canvas[:, 16:112, 16:80] = image
    detector.preprocess.centred = False
    expected = detector.losses(canvas[None], [target | {"boxes": box + 16}])
    assert set(losses.terms) == set(expected.terms)
    for name, value in losses.terms.items():
        torch.testing.assert_close(value, expected.terms[name])
