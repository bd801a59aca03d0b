"""What heads, predictors and budgets tell each other: targets, losses of a head, positions that exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from small_detectors import tiny
from torch import Tensor, nn

from dyndet.errors import UserError
from dyndet.models.budget import Budget
from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.models.heads.chain import HeadChain
from dyndet.models.heads.none import NoHead
from dyndet.routing import GatedPath, LayerCost, Routing
from dyndet.structures import HeadOutput, ImageBatch, Target

BOXES = [[8.0, 8, 40, 44], [30.0, 20, 60, 60]]
CROWD = Target(torch.tensor(BOXES), torch.tensor([0, 1]), torch.tensor([False, True]))
IMAGES = ImageBatch.of([torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))])


class Taught(nn.Module):
    """Has a loss of its own, sees targets, and computes the leftmost share of every map."""

    sees_targets = True

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.gate = nn.Conv2d(channels, 1, 1)
        self.share = 1.0
        self.seen: list[Sequence[Target] | None] = []

    def forward(
        self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None, targets: Sequence[Target] | None = None
    ) -> HeadOutput:
        self.seen.append(targets)
        gates = [self.gate(x).sigmoid() for x in features]
        routing = Routing.of([GatedPath("both.0", "depth", (LayerCost(1.0),))], gates, valid)
        maps = list(features)
        return HeadOutput(maps, maps, routing, {"gates": gates[0].mean()}, self.computed(maps))

    def computed(self, maps: Sequence[Tensor]) -> list[Tensor]:
        widths = [int(self.share * x.shape[-1]) for x in maps]
        return [
            (torch.arange(x.shape[-1]) < width).expand(len(x), 1, *x.shape[-2:])
            for x, width in zip(maps, widths, strict=True)
        ]


def taught(predictor: str = "fcos_small", *, chained: bool = False) -> tuple[PyramidDetector, Taught]:
    torch.manual_seed(0)
    detector = tiny("none", predictor)
    head = Taught()
    detector.head = HeadChain(16, attention=NoHead, towers=lambda channels: head) if chained else head
    return detector, head


@pytest.mark.parametrize("predictor", ["fcos_small", "faster_rcnn_small"])
@pytest.mark.parametrize("chained", [False, True])
def test_a_head_sees_targets_in_training_alone_and_adds_its_losses(predictor: str, chained: bool) -> None:
    detector, head = taught(predictor, chained=chained)
    losses = detector.train().losses(IMAGES, [CROWD])
    assert head.seen[0] is not None and head.seen[0][0].boxes.tolist() == BOXES[:1]  # without the crowd
    losses.terms["head/gates"].backward()
    assert head.gate.weight.grad is not None and head.gate.weight.grad.any()
    assert losses.total.item() == pytest.approx(sum(value.item() for value in losses.terms.values()))
    detector.eval()
    assert detector.image_losses(IMAGES, [CROWD]).shape == (1,)
    detector.losses(IMAGES, [CROWD])
    detector.detect(IMAGES)
    assert head.seen[1:] == [None] * 3


@pytest.mark.parametrize("predictor", ["fcos_small", "atss_small", "yolo_p5_small", "faster_rcnn_small"])
def test_nothing_is_detected_where_nothing_was_computed(predictor: str) -> None:
    detector, head = taught(predictor)
    for name, parameter in detector.named_parameters():
        if "predictor" in name and name.endswith("bias"):
            nn.init.constant_(parameter, 0.0)  # so that there is something to find everywhere
    detector.eval()
    padded = ImageBatch.of([IMAGES.pixels[0], IMAGES.pixels[0][:, :40, :70]])
    everywhere = detector.detect(padded)
    assert all(len(found) for found in everywhere)
    seen: list[list[Tensor]] = []
    reader = detector.rpn if predictor == "faster_rcnn_small" else detector.predictor
    name = "proposals" if predictor == "faster_rcnn_small" else "detections"
    read = getattr(reader, name)
    setattr(reader, name, lambda raw, images, valid: seen.append(valid) or read(raw, images, valid))
    head.share = 0.5
    detector.detect(padded)
    features, valid = detector.pyramid(padded)
    assert valid is not None
    for masks, computed, area in zip(seen[0], head.computed(features), valid, strict=True):
        assert torch.equal(masks, computed & area) and masks.any() and not torch.equal(masks, area)
    head.share = 0.0
    assert [len(found) for found in detector.detect(padded)] == [0, 0]


def test_predictors_that_heed_no_masks_are_refused() -> None:
    detector, _ = taught()
    detector.predictor.ignore_padding = False  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"ignore_padding=true"):
        detector.eval().detect(IMAGES)


class Asking(Budget):
    """Keeps what it is told."""

    def forward(
        self,
        routing: Routing,
        *,
        targets: Sequence[Target] | None = None,
        positives: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        self.told = targets, positives
        return super().forward(routing, targets=targets, positives=positives)


@pytest.mark.parametrize("predictor", ["fcos_small", "retinanet_small", "yolo_p5_small", "faster_rcnn_small"])
def test_a_budget_may_ask_for_targets_and_positives(predictor: str) -> None:
    detector, _ = taught(predictor)
    detector.budget = budget = Asking(0.5)
    assigned: list[object] = []
    tells = predictor != "faster_rcnn_small"
    if tells:
        shares = detector.predictor.positive_shares  # type: ignore[union-attr]
        detector.predictor.positive_shares = lambda *given: assigned.append(given) or shares(*given)  # type: ignore[union-attr]
    losses = detector.train().losses(IMAGES, [CROWD])
    assert losses.routing is not None
    price = 0.5 * (losses.routing.soft() / losses.routing.full()).mean()
    assert losses.terms["budget"].item() == pytest.approx(price.item())
    targets, positives = budget.told
    assert targets is not None and targets[0].boxes.tolist() == BOXES[:1]
    assert (positives is not None) == tells and not assigned  # nothing is assigned before somebody asks
    if positives is not None:
        found = positives()
        assert assigned and found.shape == (len(detector.strides),) and 0 < float(found.max()) < 0.5
