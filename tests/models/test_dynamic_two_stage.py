"""Dy-Faster R-CNN and Dy-Mask R-CNN: what is shared, and multiply-adds as published (DynamicDet, Lin et al., 2023)."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from dyndet.api import build_detector
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.models.dynamicdet.links import NormLink, ResidualLink
from dyndet.ops.flops import MacCounter

SIZE = (800, 1280)
R50, SWIN = "dy_faster_rcnn_r50", "dy_mask_rcnn_swint"


@cache
def cascade(experiment: str) -> DynamicDetector:
    with torch.device("meta"):
        detector = build_detector(experiment, ["+router=exact"])
    assert isinstance(detector, DynamicDetector)
    return detector


@cache
def counts(experiment: str, route: str) -> dict[str, int]:
    return MacCounter(cascade(experiment)).count(SIZE, route=route)


def attention_products(width: int, depths: tuple[int, ...]) -> int:
    """What the published counter leaves out of a Swin: q k and a v in windows of 7 x 7, the last ones padded."""
    total = 0
    for stage, depth in enumerate(depths):
        stride, channels = 4 * 2**stage, width * 2**stage
        rows, columns = (-(-side // stride) for side in SIZE)
        positions = (-(-rows // 7) * 7) * (-(-columns // 7) * 7)
        total += depth * 2 * positions * 49 * channels
    return total


@pytest.mark.parametrize(("experiment", "published"), [(R50, (245.4, 276.0)), (SWIN, (310.6, 348.0))])
def test_published_rows(experiment: str, published: tuple[float, float]) -> None:
    """50 and 90 % of the images hard."""
    left_out = attention_products(96, (2, 2, 6, 2)) if experiment == SWIN else 0
    easy = counts(experiment, "first")["total"] - left_out
    hard = counts(experiment, "second")["total"] - 2 * left_out
    for share, gigamacs in zip((0.5, 0.9), published, strict=True):
        assert (easy + share * (hard - easy)) / 1e9 == pytest.approx(gigamacs, rel=0.01)


def test_parts_of_the_second_backbone() -> None:
    """Layers 2 to 4 of R50 and six links, the published 67.371 and 8.913 GMAC."""
    hard = counts(R50, "second")
    assert hard["backbone2"] / 1e9 == pytest.approx(67.371, abs=5e-4)
    assert hard["links"] / 1e9 == pytest.approx(8.913, abs=5e-4)
    links = [link for source in cascade(R50).links.sources for link in source.links]  # type: ignore[union-attr]
    assert sorted((link[0].in_channels, link[0].out_channels) for link in links) == [
        (512, 256), (1024, 256), (1024, 512), (2048, 256), (2048, 512), (2048, 1024)
    ]  # fmt: skip


@pytest.mark.parametrize(("experiment", "read", "hidden"), [(R50, 3840, 960), (SWIN, 1440, 360)])
def test_the_router_reads_four_stages(experiment: str, read: int, hidden: int) -> None:
    router = cascade(experiment).router
    assert router is not None and (router.hidden.in_features, router.hidden.out_features) == (read, hidden)


def test_what_both_backbones_share_exists_once() -> None:
    for experiment, link, gone in ((R50, NormLink, ("conv1", "layer1")), (SWIN, ResidualLink, ("patch_embed",))):
        detector = cascade(experiment)
        assert all(isinstance(source, link) for source in detector.links.sources)
        names = [name for name, _ in detector.second.backbone.named_parameters()]  # type: ignore[attr-defined]
        assert names and not any(name.startswith(f"body.{part}.") for name in names for part in gone)


def test_one_neck_and_head_for_both() -> None:
    with torch.device("meta"):
        shared = build_detector(R50, ["detector.share_neck_head=true"])
    apart = cascade(R50)
    assert isinstance(shared, DynamicDetector)
    assert shared.first.neck is shared.second.neck and shared.first.rpn is shared.second.rpn  # type: ignore[attr-defined]
    neck_and_head = sum(
        p.numel()
        for part in (apart.first.neck, apart.first.rpn, apart.first.predictor)
        for p in part.parameters()  # type: ignore[attr-defined]
    )
    assert apart.router is not None
    router = sum(p.numel() for p in apart.router.parameters())
    total = sum(p.numel() for p in apart.parameters()) - router
    assert sum(p.numel() for p in shared.parameters()) == total - neck_and_head
