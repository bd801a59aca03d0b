from __future__ import annotations

import copy
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as tv

from dyndet.data.collate import Collate
from dyndet.data.photometric import Photometric, scale_colours
from dyndet.data.shapes import ShapesDataset
from dyndet.data.transforms import (
    Compose,
    RandomHorizontalFlip,
    Resize,
    ResizeShortestEdge,
    flip,
    resize,
    shortest_edge_size,
)
from dyndet.errors import DataError, UserError
from dyndet.structures import Sample, Target


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shapes(size=(96, 128), index=0) -> Sample:
    return ShapesDataset(length=index + 1, size=size, load_masks=True)[index]


def tight_boxes(masks: torch.Tensor) -> torch.Tensor:
    points = [mask.nonzero().flip(1) for mask in masks]
    return torch.stack([torch.cat([p.amin(0), p.amax(0) + 1]) for p in points]).float()


def same(a: Sample, b: Sample) -> bool:
    assert a.target.masks is not None
    assert b.target.masks is not None
    return (
        torch.equal(a.image, b.image)
        and torch.equal(a.target.boxes, b.target.boxes)
        and torch.equal(a.target.masks, b.target.masks)
    )


@pytest.mark.parametrize(
    ("size", "short", "max_size", "expected"),
    [  # from detectron2's ResizeShortestEdge.get_output_shape, evaluated by hand
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 640), 800, 1333, (625, 1333)),
        ((500, 500), 800, 1333, (800, 800)),
        ((3, 2), 1, 100, (2, 1)),  # 1.5 rounds up
        ((1000, 3), 10, 100, (100, 1)),  # 0.3 would vanish
    ],
)
def test_shortest_edge_sizes(size, short, max_size, expected):
    assert shortest_edge_size(size, short, max_size) == expected


@given(st.integers(16, 3000), st.integers(16, 3000), st.integers(16, 1500), st.integers(16, 2000))
def test_shortest_edge_rule_matches_the_float_rule(height, width, short, max_size):
    scale = short / min(height, width)
    if scale * max(height, width) > max_size:
        scale = max_size / max(height, width)
    expected = torch.tensor([height * scale, width * scale], dtype=torch.float64)
    actual = torch.tensor(shortest_edge_size((height, width), short, max_size), dtype=torch.float64)
    assert ((actual - expected).abs() <= 0.5 + 1e-6).logical_or((actual == 1) & (expected < 0.5)).all()
    assert actual.max() <= max_size


sizes = st.tuples(st.integers(48, 200), st.integers(48, 200))


@given(sizes, st.integers(0, 5), st.booleans())
@settings(max_examples=30, deadline=None)
def test_shapes_stay_in_their_boxes(size, index, mirrored):
    sample = resize(shapes(index=index), size)
    sample = flip(sample) if mirrored else sample
    assert sample.target.masks is not None
    assert sample.image.shape[-2:] == sample.target.masks.shape[-2:] == size
    # A tip one pixel wide may be lost, but nothing may lie outside by more than the rounding of an edge.
    beyond = (tight_boxes(sample.target.masks) - sample.target.boxes) * torch.tensor([-1, -1, 1, 1])
    assert beyond.max() <= 0.5
    assert beyond.median() > -2


@given(sizes, st.integers(0, 80), st.integers(0, 60), st.integers(8, 40), st.integers(8, 30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_rectangles_and_boxes_move_together(size, x, y, width, height, mirrored):
    target = shapes().target
    target.boxes = torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32)
    target.masks = torch.zeros(1, 96, 128, dtype=torch.bool)
    target.masks[:, y : y + height, x : x + width] = True
    sample = resize(Sample(shapes().image, target), size)
    sample = flip(sample) if mirrored else sample
    assert sample.target.masks is not None
    assert (tight_boxes(sample.target.masks) - sample.target.boxes).abs().max() <= 0.5


def test_boxes_scale_by_the_exact_ratios():
    sample = shapes((100, 200))
    moved = Resize((30, 70))(sample, generator())
    expected = sample.target.boxes.double() * torch.tensor([70 / 200, 0.3, 70 / 200, 0.3], dtype=torch.float64)
    assert torch.equal(moved.target.boxes, expected.float())
    assert moved.target.original_size == (100, 200)
    assert moved.image.dtype == torch.uint8


def test_flip_twice_is_the_identity_and_once_is_not():
    sample = shapes()
    assert same(flip(flip(sample)), sample)
    assert not same(flip(sample), sample)


def test_flip_probability():
    sample, source = shapes((32, 32)), generator()
    flipped = sum(RandomHorizontalFlip(0.3)(sample, source) is not sample for _ in range(500))
    assert flipped / 500 == pytest.approx(0.3, abs=0.07)


def test_transforms_leave_their_input_alone_and_follow_the_generator():
    sample = shapes()
    before = copy.deepcopy(sample)
    pipeline = Compose([ResizeShortestEdge([64, 80, 112], 160), RandomHorizontalFlip(), Photometric()])
    results = [pipeline(sample, generator(seed)) for seed in (1, 1, 2)]
    assert same(sample, before)
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_multi_scale_draws_every_size():
    seen = {min(ResizeShortestEdge([40, 48, 56], 500)(shapes(), generator(i)).image.shape[-2:]) for i in range(40)}
    assert seen == {40, 48, 56}


def test_images_without_objects_pass():
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    empty.masks = torch.zeros(0, 32, 64, dtype=torch.bool)
    sample = flip(resize(Sample(torch.zeros(3, 32, 64, dtype=torch.uint8), empty), (64, 96)))
    assert sample.target.boxes.shape == (0, 4)
    assert sample.target.masks is not None
    assert sample.target.masks.shape == (0, 64, 96)


@pytest.mark.parametrize(
    "factors", [(1.0, 1.0, 1.0), (0.8, 1.0, 1.0), (1.0, 1.15, 1.0), (1.0, 1.0, 0.8), (0.9, 0.8, 1.2)]
)
def test_colours_match_torchvision(factors):
    # A narrow range of values: nothing clips, where ours (clipped once) is better on purpose.
    image = torch.randint(90, 160, (3, 40, 50), dtype=torch.uint8, generator=generator())
    brightness, contrast, saturation = factors
    expected = tv.adjust_brightness(image.double() / 255, brightness)
    expected = tv.adjust_contrast(expected, contrast)
    expected = tv.adjust_saturation(expected, saturation) * 255
    actual = scale_colours(image, *factors)
    assert actual.dtype == torch.uint8
    assert (actual - expected).abs().max() < 0.6


def test_colours_clip():
    image = torch.tensor([0, 10, 250, 255], dtype=torch.uint8).expand(3, 1, 4)
    assert scale_colours(image, 2.0, 1.0, 1.0)[0, 0].tolist() == [0, 20, 255, 255]


def test_photometric_amounts_bound_the_factors():
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    sample = Sample(image, shapes().target)
    values = [int(Photometric(0.3, 0, 0)(sample, generator(i)).image[0, 0, 0]) for i in range(60)]
    assert min(values) >= 70
    assert max(values) <= 130
    assert max(values) - min(values) > 40
    assert torch.equal(Photometric(0, 0, 0)(sample, generator()).image, image)


def test_photometric_is_cheap():
    sample = shapes((640, 640))
    seconds = []
    for i in range(10):
        start = time.perf_counter()
        Photometric()(sample, generator(i))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01  # 1.3 ms on a quiet core; torchvision takes 13


@pytest.mark.parametrize(
    "build",
    [
        lambda: Photometric(brightness=1.5),
        lambda: RandomHorizontalFlip(2),
        lambda: ResizeShortestEdge([], 100),
        lambda: Resize(0),
        lambda: Collate(0),
    ],
)
def test_wrong_arguments(build):
    with pytest.raises(UserError):
        build()


def test_collate_pads_right_and_bottom_only():
    samples = [shapes((40, 70)), shapes((64, 33))]
    moved = [resize(samples[0], (50, 90)), samples[1]]
    batch = Collate(32)(moved)
    pixels = batch.images.pixels
    assert pixels.shape == (2, 3, 64, 96)
    assert pixels.dtype == torch.uint8
    assert batch.images.sizes.tolist() == [[50, 90], [64, 33]]
    assert batch.images.original_sizes.tolist() == [[40, 70], [64, 33]]
    for slot, sample in zip(pixels, moved, strict=True):
        height, width = sample.image.shape[-2:]
        assert torch.equal(slot[:, :height, :width], sample.image)
        assert not slot[:, height:].any()
        assert not slot[:, :, width:].any()
    assert [target.boxes.tolist() for target in batch.targets] == [s.target.boxes.tolist() for s in moved]


def test_collate_names_an_image_without_original_size():
    sample = shapes()
    sample.target.original_size = (0, 0)
    sample.target.path = "a.jpg"
    with pytest.raises(DataError, match=r"a\.jpg: original_size"):
        Collate()([sample])
