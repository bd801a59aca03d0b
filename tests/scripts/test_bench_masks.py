"""Masks have the density that was asked for, blobs are compact, forced gates open there and nowhere else."""

from __future__ import annotations

import pytest
import torch
from bench.cases import shapes_of
from bench.masks import ForcedGates, Mask, block_macs, density_for, dilated, masks, share

from dyndet.models.heads.fine_grained import FineGrainedHead
from dyndet.ops.sparse import RowLayout
from routing_views import views

SHAPES = shapes_of("all")


@pytest.mark.parametrize("kind", ["blob", "iid"])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
def test_every_image_and_level_has_the_density(kind: Mask, density: float) -> None:
    for mask, (height, width) in zip(masks(kind, density, SHAPES, 2), SHAPES, strict=True):
        assert mask.shape == (2, 1, height, width)
        assert mask.sum((1, 2, 3)).tolist() == [max(1, round(density * height * width))] * 2


def test_blobs_dilate_as_specified() -> None:
    """14, 24, 41, 55 and 76 % were the basis of the goals."""
    for density, expected in ((0.05, 0.14), (0.1, 0.24), (0.2, 0.41), (0.3, 0.55), (0.5, 0.76)):
        assert share([dilated(mask) for mask in masks("blob", density, SHAPES, 1)]) == pytest.approx(
            expected, abs=0.025
        )


def test_single_positions_dilate_more_than_blobs() -> None:
    blob, iid = (share([dilated(mask) for mask in masks(kind, 0.1, SHAPES, 1)]) for kind in ("blob", "iid"))
    assert iid > 2 * blob


def test_masks_are_the_same_every_time() -> None:
    for first, second in zip(masks("blob", 0.2, SHAPES, 1), masks("blob", 0.2, SHAPES, 1), strict=True):
        assert torch.equal(first, second)


def test_the_density_that_takes_a_share_of_the_multiply_adds() -> None:
    density = density_for(0.23, "blob", SHAPES, 1)
    assert block_macs(masks("blob", density, SHAPES, 1)) == pytest.approx(0.23, abs=0.005)


def test_forced_gates_let_gradients_through() -> None:
    shapes = shapes_of("tiny")
    maps = masks("blob", 0.2, shapes, 2)
    features = [torch.randn(2, 16, *shape) for shape in shapes]
    layout = RowLayout.of(features)
    head = FineGrainedHead(16, depth=1, activation=ForcedGates(layout.flat(maps)[0]), norm_groups=2, scale_init=1.0)
    output = head(features)
    assert output.routing is not None
    for gate in views(output.routing):
        assert torch.equal(gate.gate > 0, maps[gate.level])
    sum(level.sum() for level in output.cls).backward()  # type: ignore[union-attr]
    gradient = head.cls[0].gates["depth"].conv.weight.grad  # type: ignore[union-attr, index]
    assert gradient.abs().sum() > 0
