"""The second stage against loops and closed forms, and each convention that differs from torchvision's defaults."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.two_stage.cascade_rcnn import CascadeRCNN
from dyndet.models.two_stage.roi import BoxHead, FastRCNN, PyramidRoIAlign, RoISamples
from dyndet.structures import Target

STRIDES = [4, 8, 16, 32, 64]


def target(*boxes: tuple[float, ...], labels: tuple[int, ...] = ()) -> Target:
    return Target(torch.tensor(boxes).view(-1, 4), torch.tensor(labels, dtype=torch.int64), torch.zeros(len(boxes)))


class Planted(nn.Module):
    """A box head that answers as told."""

    def __init__(self, logits: Tensor, deltas: Tensor) -> None:
        super().__init__()
        self.logits, self.deltas = logits, deltas

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        assert len(regions) == len(self.logits)
        return self.logits, self.deltas


def planted(logits: Tensor, deltas: Tensor, **more: object) -> FastRCNN:
    def build(**_: object) -> Planted:
        return Planted(logits, deltas)

    return FastRCNN(2, STRIDES, num_classes=logits.shape[1] - 1, head=build, **more)  # type: ignore[arg-type]


MAPS = [torch.zeros(1, 2, 256 // stride, 256 // stride) for stride in STRIDES]


def test_levels() -> None:
    sides = torch.tensor([1.0, 111, 112, 223, 224, 447, 448, 5000])
    boxes = torch.stack([sides * 0 + 7, sides * 0 + 9, 7 + 2 * sides, 9 + sides / 2], 1)
    assert PyramidRoIAlign(STRIDES).levels(boxes).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert PyramidRoIAlign(STRIDES[1:]).levels(boxes).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("side", [70.0, 150.0, 300.0, 500.0])
def test_regions_are_sampled_at_pixel_centres(side: float) -> None:
    """On a ramp, bilinear sampling is exact: position i of a map lies at pixel (i + 0.5) * stride."""
    ramps = []
    for stride in STRIDES:
        places = (torch.arange(1024 // stride) + 0.5) * stride
        y, x = torch.meshgrid(places, places, indexing="ij")
        ramps.append(torch.stack([x, y])[None].repeat(2, 1, 1, 1))
    boxes = [torch.empty(0, 4), torch.tensor([[201.0, 307.0, 201.0 + side, 307.0 + side]])]
    pooled = PyramidRoIAlign(STRIDES)(ramps, boxes)
    centres = (torch.arange(7) + 0.5) * side / 7
    assert pooled.shape == (1, 2, 7, 7)
    assert torch.allclose(pooled[0, 0], (201 + centres).expand(7, 7), atol=1e-2)
    assert torch.allclose(pooled[0, 1], (307 + centres)[:, None].expand(7, 7), atol=1e-2)


def test_a_bin_takes_as_many_samples_as_it_has_positions() -> None:
    """84 pixels of stride 4 are 21 positions: each of the 7 x 7 bins is the mean of its 3 x 3."""
    maps = [torch.rand(1, 2, 256 // s, 256 // s, generator=torch.Generator().manual_seed(s)) for s in STRIDES]
    pooled = PyramidRoIAlign(STRIDES)(maps, [torch.tensor([[40.0, 80, 124, 164]])])
    assert torch.allclose(pooled[0], F.avg_pool2d(maps[0][0, :, 20:41, 10:31], 3), atol=1e-6)


def test_detections_decode_labels_scores_and_deltas() -> None:
    """Deltas of a class are divided by 10, 10, 5, 5; logit 0 is background."""
    logits = torch.tensor([[0.0, 0.0, 3.0, 0.0]])
    deltas = torch.zeros(1, 16)
    deltas[0, 8:12] = torch.tensor([1.0, -2.0, 5 * math.log(2), 5 * math.log(0.5)])
    found = planted(logits, deltas).detections(MAPS, [torch.tensor([[60.0, 60, 100, 140]])], [(256, 256)])[0]
    assert len(found) == 1 and found.labels.tolist() == [1]
    assert found.scores.item() == pytest.approx(math.exp(3) / (math.exp(3) + 3))
    # Centre 80, 100 moves by 0.1 * 40 and -0.2 * 80; 40 x 80 becomes 80 x 40.
    assert found.boxes[0].tolist() == pytest.approx([84 - 40, 84 - 20, 84 + 40, 84 + 20], abs=1e-3)


def test_scores_must_exceed_0_05() -> None:
    logits = torch.tensor([[0.899, 0.051, 0.05], [0.902, 0.049, 0.049]]).log()
    boxes = torch.tensor([[0.0, 0, 50, 50], [100.0, 100, 150, 150]])
    found = planted(logits, torch.zeros(2, 12)).detections(MAPS, [boxes], [(256, 256)])[0]
    assert found.labels.tolist() == [0] and found.scores.item() == pytest.approx(0.051)


@pytest.mark.parametrize(("shift", "kept"), [(32.0, 1), (34.0, 2)])
def test_boxes_of_one_class_are_suppressed_from_an_overlap_of_0_5(shift: float, kept: int) -> None:
    """Boxes of 100 pixels: (100 - shift) / (100 + shift)."""
    boxes = torch.tensor([[10.0, 10, 110, 110], [10 + shift, 10, 110 + shift, 110]])
    same = torch.tensor([[0.0, 6, 0], [0.0, 5, 0]])
    apart = torch.tensor([[0.0, 6, 0], [0.0, 0, 5]])
    count = [
        len(planted(logits, torch.zeros(2, 12)).detections(MAPS, [boxes], [(256, 256)])[0]) for logits in (same, apart)
    ]
    assert count == [kept, 2]


def test_at_most_100_detections_clipped_to_the_image() -> None:
    corner = torch.arange(150.0)[:, None] * torch.tensor([1.7, 1.7])
    boxes = torch.cat([corner, corner + 4], 1)
    found = planted(torch.tensor([[0.0, 9]]).repeat(150, 1), torch.zeros(150, 8), nms_iou=1.0).detections(
        MAPS, [boxes], [(100, 200)]
    )[0]
    assert len(found.boxes) <= 100 and found.boxes[:, 3].max() <= 100
    wide = planted(torch.tensor([[0.0, 9]]).repeat(150, 1), torch.zeros(150, 8), nms_iou=1.0)
    assert len(wide.detections(MAPS, [boxes], [(256, 256)])[0]) == 100


def test_sampling_takes_512_a_quarter_positive() -> None:
    near = torch.rand(1000, 4) + torch.tensor([50.0, 50, 150, 150])
    far = torch.rand(1000, 4) + torch.tensor([200.0, 200, 240, 240])
    samples = FastRCNN(2, STRIDES, num_classes=3, head=partial(BoxHead, hidden=8)).sample(
        [torch.cat([near, far])], [target((50.0, 50, 151, 151), labels=(2,))]
    )
    assert len(samples.labels[0]) == 512 and (samples.labels[0] == 3).sum() == 128


def loop_losses(logits: Tensor, deltas: Tensor, samples: list[tuple[list[float], Target]]) -> tuple[float, float]:
    """Cross entropy and L1 of all regions, in float64."""
    cls, box = 0.0, 0.0
    for row, (region, wanted) in enumerate(samples):
        label, goal, best = 0, None, 0.5
        for index, other in enumerate(wanted.boxes.tolist()):
            w, h = (
                min(region[2], other[2]) - max(region[0], other[0]),
                min(region[3], other[3]) - max(region[1], other[1]),
            )
            overlap = max(w, 0) * max(h, 0)
            area = (region[2] - region[0]) * (region[3] - region[1]) + (other[2] - other[0]) * (other[3] - other[1])
            if overlap / (area - overlap) >= best:
                label, goal, best = int(wanted.labels[index]) + 1, other, overlap / (area - overlap)
        values = logits[row].tolist()
        cls += math.log(sum(math.exp(value) for value in values)) - values[label]
        if goal is not None:
            width, height = region[2] - region[0], region[3] - region[1]
            ideal = [
                10 * ((goal[0] + goal[2]) - (region[0] + region[2])) / 2 / width,
                10 * ((goal[1] + goal[3]) - (region[1] + region[3])) / 2 / height,
                5 * math.log((goal[2] - goal[0]) / width),
                5 * math.log((goal[3] - goal[1]) / height),
            ]
            box += sum(abs(a - b) for a, b in zip(deltas[row, 4 * label : 4 * label + 4].tolist(), ideal, strict=True))
    return cls / len(samples), box / len(samples)


def test_losses_equal_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    targets = [target((20.0, 30, 80, 90), (100.0, 20, 180, 120), labels=(2, 0)), target()]
    # Overlaps with the first box of 1, 0.83, 0.58, 0.43, and elsewhere.
    boxes = [(20, 30, 80, 90), (22, 32, 80, 98), (34, 38, 90, 90), (40, 40, 90, 100), (110, 30, 190, 130)]
    proposals = [torch.tensor(boxes).float(), torch.tensor([[5.0, 5, 50, 50], [60.0, 60, 90, 99]])]
    regions = [*((list(map(float, box)), targets[0]) for box in boxes)]
    regions += [(box, targets[0]) for box in targets[0].boxes.tolist()]
    regions += [(box, targets[1]) for box in proposals[1].tolist()]
    logits = torch.randn(len(regions), 4, generator=draw)
    deltas = torch.randn(len(regions), 16, generator=draw)
    stage = planted(logits, deltas, samples=1000)
    samples = stage.sample(proposals, targets)
    assert [len(part) for part in samples.labels] == [7, 2]
    losses = stage.losses([maps.repeat(2, 1, 1, 1) for maps in MAPS], samples, targets, [(256, 256)] * 2)
    cls, box = loop_losses(logits, deltas, regions)
    assert losses["cls"].item() == pytest.approx(cls, rel=1e-5)
    assert losses["box"].item() == pytest.approx(box, rel=1e-5)


def test_deltas_exist_for_classes_only() -> None:
    """The background has none; without classes of their own all share one set."""
    regions = torch.rand(3, 2, 7, 7)
    own, shared = (BoxHead(2, size=7, num_classes=5, class_agnostic=flag, hidden=8) for flag in (False, True))
    assert own.box.out_features == 20 and shared.box.out_features == 4
    for head in (own, shared):
        logits, deltas = head(regions)
        assert logits.shape == (3, 6) and deltas.shape == (3, 24) and (deltas[:, :4] == 0).all()
    deltas = shared(regions)[1].view(3, 6, 4)
    assert torch.equal(deltas[:, 1], deltas[:, 5]) and (deltas[:, 1] != 0).all()


def cascade(*heads: Planted, **more: object) -> CascadeRCNN:
    waiting = iter(heads)
    return CascadeRCNN(2, STRIDES, num_classes=2, head=lambda **_: next(waiting), **more)  # type: ignore[arg-type]


def test_a_cascade_of_one_stage_is_fast_rcnn() -> None:
    torch.manual_seed(0)
    head = partial(BoxHead, hidden=16)
    single = FastRCNN(2, STRIDES, num_classes=2, head=head, class_agnostic=True)
    chain = CascadeRCNN(
        2, STRIDES, num_classes=2, head=head, ious=[0.5], stds=[(0.1, 0.1, 0.2, 0.2)], loss_weights=[1.0]
    )
    chain.load_state_dict({key.replace("stage.", "stages.0."): value for key, value in single.state_dict().items()})
    maps = [torch.randn(1, 2, 256 // stride, 256 // stride) for stride in STRIDES]
    proposals = [torch.tensor([[5.0, 5, 50, 50], [60.0, 60, 90, 99]])]
    wanted, sizes = [target((6.0, 5, 51, 50), labels=(1,))], [(256, 256)]
    samples = single.sample(proposals, wanted)
    for name, term in single.losses(maps, samples, wanted, sizes).items():
        assert term.item() == pytest.approx(chain.losses(maps, samples, wanted, sizes)[name].item(), rel=1e-6)
    a, b = (part.detections(maps, proposals, sizes)[0] for part in (single, chain))
    assert torch.equal(a.boxes, b.boxes) and torch.allclose(a.scores, b.scores)


def test_cascade_stages_match_at_0_5_0_6_0_7_with_their_weights() -> None:
    """A region of overlap 0.65 is positive for two stages; logits of l and zeros cost log(1 + e^l + e^0) - chosen."""
    wanted = [target((0.0, 0, 100, 100), labels=(0,))]
    region = torch.tensor([[0.0, 0, 100, 65]])
    logits = torch.tensor([[0.0, 2.0, 0.0]])
    ideal = 0.5 * (100 - 65) / 65, math.log(100 / 65)  # of y and h
    chain = cascade(*(Planted(logits, torch.zeros(1, 12)) for _ in range(3)))
    matched = torch.zeros(1, dtype=torch.int64)
    first = RoISamples([region], [matched], [matched + 1], [torch.tensor([[0.0, 10 * ideal[0], 0, 5 * ideal[1]]])])
    losses = chain.losses(MAPS, first, wanted, [(256, 256)])
    right, wrong = math.log(2 + math.exp(2)) - 2, math.log(2 + math.exp(2))
    assert losses["cls"].item() == pytest.approx(right + 0.5 * right + 0.25 * wrong, rel=1e-5)
    assert losses["box"].item() == pytest.approx(
        10 * ideal[0] + 5 * ideal[1] + 0.5 * (20 * ideal[0] + 10 * ideal[1]), rel=1e-5
    )


def test_cascade_averages_scores_and_refines_boxes() -> None:
    shift = torch.tensor([[1.0, 0, 0, 0]]).repeat(1, 3)
    logits = [torch.tensor([[0.0, value, 0.0]]) for value in (1.0, 2.0, 3.0)]
    chain = cascade(*(Planted(value, shift) for value in logits), score_threshold=0.3)
    found = chain.detections(MAPS, [torch.tensor([[50.0, 50, 150, 150]])], [(256, 256)])[0]
    # Widths of 100, moved by 0.1, 0.05 and 0.033 of them.
    assert found.boxes[0].tolist() == pytest.approx([68.3, 50, 168.3, 150], abs=1e-3)
    expected = sum(math.exp(v) / (math.exp(v) + 2) for v in (1.0, 2.0, 3.0)) / 3
    assert found.labels.tolist() == [0] and found.scores.item() == pytest.approx(expected, rel=1e-5)


def test_cascade_settings_must_agree() -> None:
    with pytest.raises(ValueError, match="one per stage, got 2, 3, 3"):
        CascadeRCNN(2, STRIDES, num_classes=2, ious=[0.5, 0.6])
