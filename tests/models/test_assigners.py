"""Which box an anchor answers for: ATSS, IoU thresholds and FCOS against loops, and how much memory they take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from anchor_oracles import (
    BACKGROUND,
    HEIGHT,
    IGNORED,
    SHAPES,
    STRIDES,
    WIDTH,
    AmbiguousError,
    Scene,
    atss_match,
    fcos_match,
    flags,
    grid_anchors,
    iou_match,
    random_maps,
    scenes,
    target_of,
)
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dyndet.models.predictors import atss_assign, freeanchor, iou_assign
from dyndet.models.predictors.anchors import AnchorTargets
from dyndet.models.predictors.atss_assign import AdaptiveAssigner
from dyndet.models.predictors.fcos_assign import CenterSampling, PointTargets
from dyndet.models.predictors.freeanchor import FreeAnchor
from dyndet.models.predictors.iou_assign import IoUAssigner
from dyndet.ops.boxes import chunks_of
from dyndet.ops.grid import level_points
from dyndet.structures import Target

CLASSES = 3
SIDES = [(4.0, 4.0), (6.0, 6.0), (8.0, 2.0), (2.0, 8.0)]  # in strides; areas without rounding


def tensors(levels: list[list[list[float]]]) -> list[Tensor]:
    return [torch.tensor(level) for level in levels]


def check(assigned: AnchorTargets, match: list[int], target: Target, allowed: list[bool], classes: int) -> None:
    """Labels follow the matches everywhere that may be chosen, boxes wherever there is one."""
    labels, boxes = target.labels.tolist(), target.boxes.tolist()
    wanted = [{BACKGROUND: classes, IGNORED: -1}.get(g, labels[g] if g >= 0 else 0) for g in match]
    for index, (found, expected, may) in enumerate(zip(assigned.labels.tolist(), wanted, allowed, strict=True)):
        if may:
            assert found == expected, f"anchor {index}"
        else:
            assert not 0 <= found < classes, f"anchor {index} may not be chosen"
        if may and match[index] >= 0:
            assert assigned.boxes[index].tolist() == boxes[match[index]]


# ATSS


@settings(max_examples=60, deadline=None)
@given(
    scenes(lattice=False), st.sampled_from([9, 3]), st.sampled_from([0.0, 0.5]), st.sampled_from([1, 2]), st.booleans()
)
def test_atss_step_by_step(scene: Scene, topk: int, offset: float, per_position: int, masked: bool) -> None:
    levels = grid_anchors([(4.0, 4.0), (7.3, 3.1)][:per_position], offset)
    for image, target in enumerate(scene.targets):
        allowed = flags(scene.sizes[image] if masked else (HEIGHT, WIDTH), per_position)
        try:
            match = atss_match(levels, scene.boxes(image), allowed, topk)
        except AmbiguousError:
            reject()
        assigned = AdaptiveAssigner(topk=topk)(
            tensors(levels), target, CLASSES, torch.tensor(allowed) if masked else None
        )
        check(assigned, match, target, allowed, CLASSES)


def test_atss_finds_something_in_ordinary_images() -> None:
    """The property above would hold for an assigner that never finds anything."""
    levels = grid_anchors([(4.0, 4.0)], 0.5)
    target = target_of([[3.1, 4.2, 33.3, 38.4], [20.2, 10.6, 52.1, 40.8]], [1, 2])
    labels = AdaptiveAssigner()(tensors(levels), target, CLASSES).labels
    assert (labels == 1).sum() >= 2 and (labels == 2).sum() >= 2 and (labels == CLASSES).sum() > 30


def test_atss_takes_the_sample_deviation() -> None:
    """Two candidates of IoU 1 and 1/4: the threshold is 0.625 + 0.530, with n instead of n - 1 it would be 1."""
    anchors = [torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[-4.0, -4, 12, 12]])]
    target = target_of([[0, 0, 8, 8]])
    assert AdaptiveAssigner()(anchors, target, 1).labels.tolist() == [1, 1]
    assert AdaptiveAssigner()([*anchors, anchors[1]], target, 1).labels.tolist() == [0, 1, 1]  # 0.5 + 0.433


def test_atss_centres_lie_inside_by_a_hundredth() -> None:
    """Both anchors overlap the box alike; the centre of one lies 0.009 inside its edge, that of the other 0.011."""
    far = [[200.0 + 20 * n, 200, 210 + 20 * n, 210] for n in range(5)]  # candidates of IoU 0
    for inside, label in ((0.009, 1), (0.011, 0)):
        box = [8 - inside, 0, 24, 16]
        anchors = [torch.tensor([[0.0, 0, 16, 16], *far])]  # centre 8, 8
        assert AdaptiveAssigner(topk=6)(anchors, target_of([box]), 1).labels.tolist()[0] == label


def test_atss_candidates_are_the_nearest_of_every_level() -> None:
    """A better overlap does not help an anchor that is not among the nearest."""
    anchors = [
        torch.tensor([[2.0, 2, 6, 6], [0.0, 1, 9, 9], [-8.0, -8, 0, 0], [16.0, 16, 32, 32]]),  # far: the last two
        torch.tensor([[-30.0, -30, 40, 40], [-32.0, -32, 40, 40]]),
    ]
    target = target_of([[0, 0, 8, 8]])
    assert AdaptiveAssigner(topk=1)(anchors, target, 1).labels.tolist()[:2] == [1, 1]  # two candidates: none stands out
    assert AdaptiveAssigner(topk=2)(anchors, target, 1).labels.tolist()[:2] == [1, 0]


def test_atss_anchors_that_two_boxes_want_go_to_the_higher_overlap_and_ties_to_the_first() -> None:
    anchors = grid_anchors([(4.0, 4.0)], 0.0)
    everywhere = flags((HEIGHT, WIDTH), 1)
    one, other = [15.61, 0.86, 49.86, 34.11], [14.18, 0.18, 51.93, 38.68]
    alone = [atss_match(anchors, [box], everywhere, 9) for box in (one, other)]
    wanted = [index for index, pair in enumerate(zip(*alone, strict=True)) if pair == (0, 0)]
    for boxes in ([one, other], [other, one]):
        target = target_of(boxes, [0, 1])
        match = atss_match(anchors, boxes, everywhere, 9)
        assert {match[index] for index in wanted} == {0, 1}
        check(AdaptiveAssigner()(tensors(anchors), target, 2), match, target, everywhere, 2)
    twice = AdaptiveAssigner()(tensors(anchors), target_of([one, one], [1, 0]), 2)
    assert set(twice.labels.tolist()) == {1, 2}


@pytest.mark.parametrize("assigner", [AdaptiveAssigner(), IoUAssigner()])
def test_images_without_boxes_are_background(assigner: Callable[..., AnchorTargets]) -> None:
    levels = tensors(grid_anchors([(4.0, 4.0)], 0.0))
    assigned = assigner(levels, target_of([]), CLASSES, torch.ones(54, dtype=torch.bool))
    assert assigned.labels.tolist() == [CLASSES] * 54 and assigned.boxes.shape == (54, 4)


# IoU


@settings(max_examples=60, deadline=None)
@given(
    scenes(lattice=True),
    st.sampled_from([(0.5, 0.4), (0.7, 0.3), (0.5, 0.5)]),
    st.booleans(),
    st.sampled_from([0.0, 0.5]),
    st.booleans(),
)
def test_iou_assignment(
    scene: Scene, thresholds: tuple[float, float], low_quality: bool, offset: float, masked: bool
) -> None:
    levels = grid_anchors(SIDES, offset)
    anchors = [anchor for level in levels for anchor in level]
    positive, negative = thresholds
    assigner = IoUAssigner(positive=positive, negative=negative, low_quality=low_quality)
    for image, target in enumerate(scene.targets):
        allowed = flags(scene.sizes[image] if masked else (HEIGHT, WIDTH), len(SIDES))
        try:
            match = iou_match(
                anchors, scene.boxes(image), allowed, positive=positive, negative=negative, low_quality=low_quality
            )
        except AmbiguousError:
            reject()
        assigned = assigner(tensors(levels), target, CLASSES, torch.tensor(allowed) if masked else None)
        check(assigned, match, target, allowed, CLASSES)


def labels_of(anchors: list[list[float]], boxes: list[list[float]], **kwargs: float) -> list[int]:
    """The index of the box of every anchor, -1 ignored, 9 background."""
    assigner = IoUAssigner(**kwargs)  # type: ignore[arg-type]
    return assigner([torch.tensor(anchors)], target_of(boxes, list(range(len(boxes)))), 9).labels.tolist()


def test_iou_thresholds_belong_to_the_upper_side() -> None:
    box = [0.0, 0, 10, 10]
    rows = [[0.0, 0, 10, 10 * share] for share in (0.5, 0.49, 0.4, 0.39)]
    assert labels_of(rows, [box], low_quality=False) == [0, -1, -1, 9]


def test_low_quality_matches_take_all_ties_however_small() -> None:
    """A one-pixel box inside two equal anchors gets both, and neither of the larger ones."""
    rows = [[0.0, 0, 16, 16], [4.0, 4, 20, 20], [0.0, 0, 32, 32], [40.0, 40, 56, 56]]
    assert labels_of(rows, [[8, 8, 9, 9]]) == [0, 0, 9, 9]
    assert labels_of(rows, [[8, 8, 9, 9]], low_quality=False) == [9] * 4


def test_later_boxes_overwrite_low_quality_matches() -> None:
    rows = [[0.0, 0, 16, 16], [32.0, 0, 48, 16]]
    pixel, other = [8.0, 8, 9, 9], [3.0, 3, 4, 4]
    assert labels_of(rows, [pixel, other]) == [1, 9]
    # Even where the earlier box overlaps it more, and by the ordinary rule.
    assert labels_of(rows, [[0, 0, 16, 15], pixel]) == [1, 9]
    # The ordinary rule alone: of equal boxes the first, and low-quality matches the last.
    assert labels_of(rows, [[0, 0, 16, 15]] * 2, low_quality=False) == [0, 9]
    assert labels_of(rows, [[0, 0, 16, 15]] * 2) == [1, 9]


def test_low_quality_rescues_ignored_anchors() -> None:
    rows = [[0.0, 0, 10, 4.5], [0.0, 0, 10, 4.2]]
    assert labels_of(rows, [[0, 0, 10, 10]]) == [0, -1]


def test_boxes_that_no_anchor_touches_take_none() -> None:
    """Else all anchors would tie at 0 and become positives of a box far away or without area."""
    rows = [[0.0, 0, 10, 10], [20.0, 0, 30, 10]]
    assert labels_of(rows, [[100, 100, 110, 110]]) == [9, 9]
    assert labels_of(rows, [[5, 5, 5, 5]]) == [9, 9]


def test_impossible_thresholds_are_named() -> None:
    with pytest.raises(ValueError, match=r"negative <= positive must hold, got 0\.6 and 0\.5"):
        IoUAssigner(positive=0.5, negative=0.6)


# FCOS


def points(offset: float) -> list[Tensor]:
    return [
        level_points(shape, stride, offset, torch.device("cpu")) for shape, stride in zip(SHAPES, STRIDES, strict=True)
    ]


def check_points(assigned: PointTargets, match: list[int], target: Target, offset: float, classes: int) -> None:
    labels = [classes if g == BACKGROUND else int(target.labels[g]) for g in match]
    assert assigned.labels.tolist() == labels
    for (x, y), g, ltrb in zip(torch.cat(points(offset)).tolist(), match, assigned.ltrb.tolist(), strict=True):
        if g != BACKGROUND:
            box = target.boxes[g].tolist()
            assert ltrb == [x - box[0], y - box[1], box[2] - x, box[3] - y]


@settings(max_examples=80, deadline=None)
@given(scenes(lattice=True), st.sampled_from([1.5, 0.5, None]), st.booleans(), st.sampled_from([0.0, 0.5]))
def test_fcos_with_points_on_edges(scene: Scene, radius: float | None, strict: bool, offset: float) -> None:
    """On the lattice points lie on edges of boxes, of central regions and of ranges."""
    sampler = CenterSampling(radius=radius, base_range=16, strict=strict)
    for image, target in enumerate(scene.targets):
        match = fcos_match(scene.boxes(image), offset=offset, radius=radius, strict=strict, base=16)
        check_points(sampler(points(offset), STRIDES, target, CLASSES), match, target, offset, CLASSES)


@pytest.mark.parametrize(("strict", "levels"), [(False, [True, True]), (True, [False, False])])
def test_a_distance_on_the_border_of_a_range(strict: bool, levels: list[bool]) -> None:
    """Both levels of mmdetection, none of detectron2's."""
    where = [torch.tensor([[32.0, 32.0]])] * 2
    sampler = CenterSampling(radius=None, base_range=64, strict=strict)
    found = sampler(where, [8, 16], target_of([[0, 0, 96, 64]]), 1)  # farthest: 96 - 32 = 64
    assert (found.labels == 0).tolist() == levels


@pytest.mark.parametrize(("x", "y"), [(12, 0), (-12, 0), (0, 12), (0, -12)])
def test_the_central_region_and_the_box_have_open_edges(x: float, y: float) -> None:
    """A point at exactly 1.5 strides from the centre, or on the edge of a box, belongs to none."""
    sampler = CenterSampling(radius=1.5, base_range=512)
    where = [torch.tensor([[32.0 + x * share, 32 + y * share] for share in (1, 0.99)])]
    assert sampler(where, [8], target_of([[0, 0, 64, 64]]), 1).labels.tolist() == [1, 0]
    assert sampler(where, [16], target_of([[20, 20, 44, 44]]), 1).labels.tolist() == [1, 0]


def test_the_smallest_box_wins_and_of_equal_ones_the_first() -> None:
    where = [torch.tensor([[32.0, 32.0]])]
    boxes = [[0.0, 0, 64, 64], [8.0, 8, 56, 56], [16.0, 16, 48, 60], [8.0, 8, 56, 56]]
    sampler = CenterSampling(radius=None, base_range=512)
    assert sampler(where, [8], target_of(boxes, [0, 1, 2, 3]), 4).labels.tolist() == [2]
    assert sampler(where, [8], target_of(boxes[:2] + boxes[3:], [0, 1, 2]), 4).labels.tolist() == [1]


# Memory

MANY = [(3.0, 3.0), (2.0, 4.5), (4.5, 2.0)]
ASSIGNERS = [(atss_assign, AdaptiveAssigner(topk=9)), (iou_assign, IoUAssigner())]


def crowd(count: int) -> Target:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(count, 2, generator=generator) * 40
    boxes = torch.cat([low, low + 1 + torch.rand(count, 2, generator=generator) * 30], 1)
    return Target(boxes, torch.arange(count) % CLASSES, torch.zeros(count, dtype=torch.bool))


@pytest.mark.parametrize(("module", "assigner"), ASSIGNERS)
@pytest.mark.parametrize("limit", [1, 500, 1000])
def test_chunks_do_not_change_an_assignment(
    module: object, assigner: Callable[..., AnchorTargets], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels, target = tensors(grid_anchors(MANY, 0.5)), crowd(17)
    for valid in (None, torch.tensor(flags((30, 41), 3))):
        whole = assigner(levels, target, CLASSES, valid)
        with monkeypatch.context() as patch:
            patch.setattr(module, "chunks_of", partial(chunks_of, limit=limit))
            parts = assigner(levels, target, CLASSES, valid)
        assert torch.equal(whole.labels, parts.labels) and torch.equal(whole.boxes, parts.boxes)
        assert len(whole.labels.unique()) > 2


@pytest.mark.parametrize("limit", [1, 500, 1000])
def test_chunks_do_not_change_freeanchor(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = FreeAnchor(4, STRIDES, num_classes=CLASSES, bag_size=7)
    raw = random_maps(1, CLASSES, 9)
    whole = module.losses(raw, [crowd(17)])
    monkeypatch.setattr(freeanchor, "chunks_of", partial(chunks_of, limit=limit))
    parts = module.losses(raw, [crowd(17)])
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-6)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.entries = max(self.entries, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize(("module", "assigner"), ASSIGNERS)
def test_no_assigner_holds_all_boxes_by_all_anchors(
    module: object, assigner: Callable[..., AnchorTargets], monkeypatch: pytest.MonkeyPatch
) -> None:
    levels, target = tensors(grid_anchors(MANY, 0.5)), crowd(400)
    monkeypatch.setattr(module, "chunks_of", partial(chunks_of, limit=2000))
    with Largest() as largest:
        assigner(levels, target, CLASSES)
    assert largest.entries <= 400 * 18 * 4  # two corners in a chunk, or what every box's candidates take; not 400 x 162


def test_freeanchor_does_not_hold_all_boxes_by_all_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    module = FreeAnchor(4, STRIDES, num_classes=CLASSES, bag_size=4)
    raw, target = random_maps(1, CLASSES, 9), crowd(400)
    monkeypatch.setattr(freeanchor, "chunks_of", partial(chunks_of, limit=2000))
    with Largest() as largest:
        module.losses(raw, [target])
    assert largest.entries <= 400 * 4 * 4  # coordinates of the bags; not 400 x 486


SCRIPT = """
import resource, sys, torch
torch.set_num_threads(1)
from dyndet.models.predictors.atss_assign import AdaptiveAssigner
from dyndet.models.predictors.freeanchor import FreeAnchor
from dyndet.models.predictors.iou_assign import IoUAssigner
from dyndet.structures import Target

torch.manual_seed(0)
def run(boxes, positions):
    low = torch.rand(boxes, 2) * 1000
    target = Target(torch.cat([low, low + 20], 1), torch.zeros(boxes).long(), torch.zeros(boxes).bool())
    if sys.argv[1] == "freeanchor":
        raw = [{"cls": torch.zeros(1, 9, positions // 9, 1), "box": torch.zeros(1, 36, positions // 9, 1)}]
        return FreeAnchor(4, [8], num_classes=1).losses(raw, [target])
    corner = torch.rand(positions, 2) * 1000
    anchors = [part.contiguous() for part in torch.cat([corner, corner + 30], 1).split(positions * 3 // 4)]
    return (AdaptiveAssigner() if sys.argv[1] == "atss" else IoUAssigner())(anchors, target, 1)

run(3, 900)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(500, 200_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atss", "iou", "freeanchor"])
def test_memory_of_500_boxes_and_200_000_anchors(name: str) -> None:
    """All pairs at once would be 400 MB for the overlaps alone, and over 2 GB on the way to them."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, name], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 600_000  # KB
