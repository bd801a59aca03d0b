"""Cascades: images take one of two ways, each on its own, and only what is on the way runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from dyndet.api import build_detector
from dyndet.cli.compose import compose_experiment
from dyndet.errors import UserError
from dyndet.metrics.compute import ComputeMeter
from dyndet.metrics.static import StaticCosts, meter_batch
from dyndet.models.backbones.stages import run_stages
from dyndet.models.backbones.timm import TimmBackbone
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.models.dynamicdet.links import CompositeLinks, NormLink, RandomLink, ResidualLink, run_linked
from dyndet.models.dynamicdet.router import Router
from dyndet.routing import Routes
from dyndet.structures import Detections, ImageBatch

ROUTER = "+router=exact"


def build(experiment: str = "shapes_dy_tiny", *overrides: str) -> DynamicDetector:
    """A cascade with a router that tells images apart."""
    torch.manual_seed(0)
    detector = build_detector(experiment, [ROUTER, *overrides])
    assert isinstance(detector, DynamicDetector) and detector.router is not None
    for name, parameter in detector.named_parameters():  # louder than at the start, so that there is something to find
        if "predictor" in name and name.endswith("bias"):
            nn.init.constant_(parameter, 0.0)
    detector.router.out.weight.data.mul_(50)
    return detector


def some_images(sizes: list[tuple[int, int]]) -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, generator=generator) * (index + 1) / len(sizes) for index, size in enumerate(sizes)]
    return ImageBatch.of(images, 32)


def split_evenly(detector: DynamicDetector, images: ImageBatch) -> Tensor:
    """Puts the threshold at the median score; the difficulty of every image."""
    difficulty = detector.detect_by(images)[1].difficulty
    assert difficulty is not None
    ordered = difficulty.sort().values
    middle = len(ordered) // 2
    detector.threshold = float(ordered[middle - 1 : middle + 1].mean())
    return difficulty


@contextmanager
def calls_of(detector: DynamicDetector) -> Iterator[set[str]]:
    """Collects the names of all submodules that run."""
    seen: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: seen.add(name)) for name, module in detector.named_modules()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def assert_same(ours: Detections, theirs: Detections) -> None:
    assert len(ours) > 0
    torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-5)
    assert ours.labels.tolist() == theirs.labels.tolist()


EXPERIMENTS = {
    "fcos": ("shapes_dy_tiny",),
    "fine_grained": ("shapes_dy_tiny", "head=fine_grained_small"),
    "yolo": ("shapes_dy_yolo",),
    "two_stage": ("shapes_faster_rcnn", "detector=dynamic_two_stage"),
    "shared": ("shapes_dy_tiny", "detector.share_neck_head=true", "detector.shared_stages=1", "detector.first_link=2"),
    "norm": ("shapes_dy_tiny", "detector.link._target_=dyndet.models.dynamicdet.links.NormLink"),
}


@pytest.mark.parametrize("kind", EXPERIMENTS)
def test_a_mixed_batch_is_its_images_one_by_one(kind: str) -> None:
    detector = build(*EXPERIMENTS[kind])
    images = some_images([(96, 128)] * 4)
    split_evenly(detector, images)
    together, routes = detector.detect_with_routing(images)
    assert routes.hard.tolist().count(True) == 2
    for index, found in enumerate(together):
        (alone,), way = detector.detect_with_routing(images[torch.tensor([index])])
        assert way.hard.item() == routes.hard[index].item()
        assert_same(found, alone)


@pytest.mark.parametrize("kind", ["fcos", "fine_grained"])
def test_the_order_of_images_does_not_matter(kind: str) -> None:
    detector = build(*EXPERIMENTS[kind])
    images = some_images([(96, 128), (64, 96), (96, 64), (128, 128)])
    split_evenly(detector, images)
    order = torch.tensor([2, 0, 3, 1])
    found, routes = detector.detect_with_routing(images)
    shuffled, shuffled_routes = detector.detect_with_routing(images[order])
    assert shuffled_routes.hard.tolist() == routes.hard[order].tolist()
    for place, index in enumerate(order.tolist()):
        assert_same(shuffled[place], found[index])


@pytest.mark.parametrize("kind", ["fcos", "yolo", "two_stage"])
def test_only_the_chosen_route_runs(kind: str) -> None:
    detector = build(*EXPERIMENTS[kind])
    images = some_images([(96, 128)] * 3)
    for threshold, runs, rests in (
        (math.inf, ("first.neck", "first.predictor"), ("second", "links")),
        (-math.inf, ("second.neck", "second.predictor", "links"), ("first.neck", "first.head", "first.predictor")),
    ):
        detector.threshold = threshold
        with calls_of(detector) as called:
            _, routes = detector.detect_with_routing(images)
        assert routes.hard.tolist() == [threshold < 0] * 3
        assert any(name.startswith("first.backbone") for name in called) and "router" in called
        for part in runs:
            assert any(name.startswith(part) for name in called), part
        for part in rests:
            assert not any(name.startswith(part) for name in called), part


def test_both_ends_are_exact_whatever_the_router_says() -> None:
    detector = build()
    images = some_images([(64, 64)] * 2)
    assert detector.router is not None
    for bias in (-1e4, 1e4, math.inf, -math.inf):
        nn.init.constant_(detector.router.out.bias, bias)
        detector.threshold = math.inf
        assert not detector.detect_with_routing(images)[1].hard.any()
        if bias != math.inf:
            detector.threshold = -math.inf
            assert detector.detect_with_routing(images)[1].hard.all()


def test_without_a_router_every_image_is_hard() -> None:
    detector = build_detector("shapes_dy_tiny")
    assert isinstance(detector, DynamicDetector) and detector.router is None
    _, routes = detector.detect_with_routing(some_images([(64, 64)] * 2))
    assert routes.hard.all() and routes.difficulty is None


@pytest.mark.parametrize("kind", ["fcos", "fine_grained"])
def test_multiply_adds_add_up(kind: str) -> None:
    detector = build(*EXPERIMENTS[kind])
    images = some_images([(96, 128)] * 4)
    split_evenly(detector, images)
    sizes = images.sizes.tolist()

    def spent(batch: ImageBatch) -> tuple[list[float], Routes, ComputeMeter]:
        meter = ComputeMeter(strides=detector.strides)
        _, routes = detector.detect_with_routing(batch)
        return meter_batch(meter, StaticCosts(detector), routes, batch.sizes.tolist()), routes, meter

    macs, routes, meter = spent(images)
    report = meter.compute()
    assert report.hard == 0.5 and report.total.mean == pytest.approx(sum(macs) / 4)
    for index in range(4):
        assert spent(images[torch.tensor([index])])[0] == pytest.approx([macs[index]])
    if kind == "fcos":
        static = StaticCosts(detector)
        for way, name in ((True, "second"), (False, "first")):
            expected = sum(static(sizes[0], routed=False, route=name).values())
            assert {cost for cost, hard in zip(macs, routes.hard.tolist(), strict=True) if hard == way} == {expected}


def test_raw_outputs_of_either_detector() -> None:
    detector = build()
    images = some_images([(64, 96)] * 2)
    first, second = detector.raw_outputs(images, "first"), detector.raw_outputs(images, "second")
    assert [level["cls"].shape for level in first] == [level["cls"].shape for level in second]
    assert not torch.allclose(first[0]["cls"], second[0]["cls"])
    torch.testing.assert_close(first, detector.first.raw_outputs(images))  # the first detector by itself


def test_losses_are_both_detectors_losses() -> None:
    detector = build("shapes_dy_tiny").train()
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}] * 2
    losses = detector.losses(some_images([(64, 64)] * 2), targets)
    assert {name.split("/")[0] for name in losses.terms} == {"first", "second"}
    losses.total.backward()
    idle = [name for name, p in detector.named_parameters() if p.grad is None and not name.startswith("router")]
    assert idle == []


def test_losses_of_single_images() -> None:
    detector = build("shapes_dy_tiny")
    images = some_images([(64, 96), (96, 64), (64, 64)])
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0], [20.0, 4.0, 60.0, 60.0]])
    targets = [{"boxes": boxes[:count], "labels": torch.arange(count)} for count in (2, 1, 0)]
    _, losses = detector.image_losses(images, targets)
    assert losses.shape == (2, 3)
    for index, target in enumerate(targets):
        terms = detector.losses(images[torch.tensor([index])], [target]).terms
        for row, name in enumerate(("first", "second")):
            alone = sum(value for key, value in terms.items() if key.startswith(name))
            torch.testing.assert_close(losses[row, index], alone, rtol=1e-4, atol=1e-5)


def test_links_follow_the_equation() -> None:
    """x_l + sum over k >= l of up(W_kl F_k), against loops in float64."""
    torch.manual_seed(0)
    links = CompositeLinks([4, 6, 8], [3, 5, 7], first=0, link=RandomLink).double()
    sources = [torch.randn(1, c, s, s, dtype=torch.float64) for c, s in ((4, 8), (6, 4), (8, 2))]
    added = links(sources)
    offsets = [[0], [0, 3], [0, 3, 8]]
    for stage, width in enumerate((3, 5, 7)):
        assert len(added[stage]) == 3 - stage
        for index, k in enumerate(range(stage, 3)):
            conv = links.sources[k].conv
            rows = slice(offsets[k][stage], offsets[k][stage] + width)
            expected = torch.einsum("oc,bchw->bohw", conv.weight[rows, :, 0, 0], sources[k])  # type: ignore[index]
            torch.testing.assert_close(added[stage][index], expected + conv.bias[rows, None, None])  # type: ignore[index]


@pytest.mark.parametrize(("experiment", "zero"), [("bccd_dy_plain", True), ("dy_fcos_r50_dyhead", True),
    ("dy_yolov7", False), ("dy_yolov7x", False), ("dy_yolov7w6", False)])  # fmt: skip
def test_links_start_at_zero_where_backbones_come_trained(experiment: str, zero: bool) -> None:
    config = compose_experiment(experiment)
    links = instantiate(config.detector.link)(in_channels=4, out_channels=[2, 3])(torch.ones(1, 4, 1, 1))
    assert all((link == 0).all() == zero for link in links)


class Halving(nn.Module):
    """Three stages: the entrance averages 2x2, the body adds 1."""

    stage_channels = link_channels = (1, 1, 1)

    def stages(self) -> list[object]:
        from dyndet.models.backbones.stages import Stage

        return [
            Stage(lambda x, other=None: nn.functional.avg_pool2d(x if other is None else other, 2), lambda x: x + 1)
        ] * 3


def test_the_second_backbone_reads_the_first() -> None:
    images = torch.zeros(1, 1, 8, 8)
    first = run_stages(Halving().stages(), images)  # type: ignore[arg-type]
    assert [float(x.mean()) for x in first] == [1, 2, 3]
    added = [[torch.full((1, 1, 1, 1), 10.0)], [], [torch.full((1, 1, 1, 1), 100.0)]]
    second = run_linked(Halving(), images, first, added)  # type: ignore[arg-type]
    assert [float(x.mean()) for x in second] == [11, 12, 113]
    shared = run_linked(Halving(), images, first, [[], [], []], shared=1)  # type: ignore[arg-type]
    assert shared[0] is first[0] and [float(x.mean()) for x in shared] == [1, 2, 3]
    cross = run_linked(Halving(), images, [x + 0.5 for x in first], added, cross=2)  # type: ignore[arg-type]
    assert [float(x.mean()) for x in cross] == [11, 12, 2.5 + 1 + 100]


def test_links_that_start_at_zero_change_nothing() -> None:
    torch.manual_seed(0)
    sources = [torch.randn(2, c, 4, 4) for c in (4, 6)]
    for maps in CompositeLinks([4, 6], [4, 6], first=0, link=NormLink)(sources):
        assert all(not x.any() for x in maps)
    own, other = CompositeLinks([4, 6], [4, 6], first=0, link=ResidualLink)(sources)
    assert own[0] is sources[0] and other[0] is sources[1] and not own[1].any()
    with pytest.raises(ValueError, match="residual link"):
        CompositeLinks([4, 6], [4, 5], first=0, link=ResidualLink)


def test_router_by_hand() -> None:
    torch.manual_seed(0)
    router = Router([4, 8], first=0).double()
    sources = [torch.randn(2, 4, 6, 5, dtype=torch.float64), torch.randn(2, 8, 3, 3, dtype=torch.float64)]
    pooled = torch.cat([x.mean((2, 3)) for x in sources], 1)
    hidden = (pooled @ router.hidden.weight.T + router.hidden.bias).clamp(min=0)
    torch.testing.assert_close(
        -router(router.pool(sources)), (hidden @ router.out.weight.T + router.out.bias)[:, 0], rtol=1e-5, atol=1e-6
    )
    assert router.hidden.out_features == 3


@pytest.mark.parametrize("masked", [True, False])
def test_masked_pooling_does_not_see_padding(masked: bool) -> None:
    detector = build("shapes_dy_tiny", f"detector.masked={str(masked).lower()}")
    small = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2))
    alone = ImageBatch.of([small], 32)
    padded = ImageBatch.of([small, torch.zeros(3, 64, 160)], 32)
    scores = []
    for images in (alone, padded):
        seen = detector.look(images)
        scores.append(detector.pooled(seen)[0])
    # Maps near the padding differ a little: convolutions see it. Plain pooling differs by more than half.
    change = float((scores[0] - scores[1]).norm() / scores[0].norm())
    assert change < 0.25 if masked else change > 0.4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"strides": (4, 8, 16, 32)}),
        ("efficientnet_lite0", {}),
        ("mobilenetv3_small_050", {}),
        ("swin_tiny_patch4_window7_224", {"strides": (4, 8, 16, 32), "output_norm": True}),
        ("convnext_atto", {"strides": (4, 8, 16, 32)}),
    ],
)
def test_backbones_run_stage_by_stage(name: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone(name, **options).eval()  # type: ignore[arg-type]
    images = torch.rand(1, 3, 90, 77)
    with torch.no_grad():
        outputs = run_stages(backbone.stages(), images)
        height = 90 + -90 % backbone.divisor
        assert [x.shape[1] for x in outputs] == backbone.stage_channels
        assert [x.shape[-2] for x in outputs] == [-(-height // stride) for stride in backbone.stage_strides]
        for ours, theirs in zip(backbone.maps(backbone.sources(outputs), (90, 77)), backbone(images), strict=True):
            assert torch.equal(ours, theirs)


def test_links_that_cannot_be_say_so() -> None:
    with pytest.raises(UserError, match="first_link=0"):
        build_detector("shapes_dy_tiny", ["detector.first_link=0"])
    with pytest.raises(UserError, match="stage by stage"):
        build_detector("shapes_dy_tiny", ["backbone=tiny", "backbone.name=hrnet_w18_small"])
