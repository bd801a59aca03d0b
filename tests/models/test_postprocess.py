"""Threshold, top-k, clipping and suppression against a greedy loop."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from anchor_oracles import iou
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndet.models.predictors.postprocess import Postprocess
from dyndet.structures import ImageBatch

CLASSES = 2

Level = tuple[Tensor, Tensor, Tensor]


def images(*sizes: tuple[int, int], original: Sequence[tuple[int, int]] | None = None) -> ImageBatch:
    return ImageBatch(torch.zeros(len(sizes), 3, 64, 64), torch.tensor(sizes), torch.tensor(original or sizes))


def level(rows: Sequence[Sequence[float]], probabilities: Sequence[float], scores: Sequence[float]) -> Level:
    """One class, one image."""
    return (
        torch.tensor(probabilities)[None, :, None],
        torch.tensor(scores)[None, :, None],
        torch.tensor([list(row) for row in rows], dtype=torch.float32)[None],
    )


def greedy(
    levels: Sequence[Level],
    image: int,
    size: tuple[int, int],
    *,
    threshold: float,
    topk: int,
    suppress: float,
    limit: int,
    rank: str,
    clip: str,
    per_level: str,
) -> list[tuple[list[float], float, int]]:
    """Box, score and label of what is left of an image."""
    candidates = []
    for probabilities, finals, boxes in levels:
        rows = [
            (probabilities[image, p, k].item(), finals[image, p, k].item(), boxes[image, p].double().tolist(), k)
            for p in range(boxes.shape[1])
            for k in range(CLASSES)
        ]
        rows = sorted((row for row in rows if row[0] > threshold), key=lambda row: row[rank == "score"], reverse=True)  # type: ignore[arg-type]
        candidates += rows[: topk if per_level == "scores" else min(topk, boxes.shape[1])]

    def cut(box: list[float]) -> list[float]:
        return [min(max(v, 0), most) for v, most in zip(box, [size[1], size[0]] * 2, strict=True)]

    def solid(box: list[float]) -> bool:
        return box[2] > box[0] and box[3] > box[1]

    found = [(box, score, k) for _, score, box, k in candidates]
    if clip == "before":
        found = [(cut(box), score, k) for box, score, k in found if solid(cut(box))]
    kept: list[tuple[list[float], float, int]] = []
    for box, score, k in sorted(found, key=lambda row: -row[1]):
        overlaps = [iou(box, other) for other, _, label in kept if label == k]
        if any(abs(overlap - suppress) < 1e-4 for overlap in overlaps):
            reject()
        if all(overlap <= suppress for overlap in overlaps):
            kept.append((box, score, k))
    return [(cut(box), score, k) for box, score, k in kept[:limit] if solid(cut(box))]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.05, 0.4]),
    st.sampled_from([3, 1000]),
    st.sampled_from([0.3, 0.6]),
    st.sampled_from([2, 100]),
    st.sampled_from(["probability", "score"]),
    st.sampled_from(["before", "after"]),
    st.sampled_from(["scores", "locations"]),
)
def test_against_a_greedy_loop(
    seed: int, threshold: float, topk: int, suppress: float, limit: int, rank: str, clip: str, candidates: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(64, 64), (40, 50)]
    levels = []
    for count in (9, 1, 4):
        corner = torch.rand(2, count, 2, generator=generator) * 60 - 20
        boxes = torch.cat([corner, corner + torch.rand(2, count, 2, generator=generator) * 60], -1)
        # All numbers differ, so that no order is left to chance.
        probabilities = (torch.randperm(2 * count * CLASSES, generator=generator).view(2, count, CLASSES) + 1) / 41
        finals = probabilities * torch.rand(2, count, CLASSES, generator=generator)
        levels.append((probabilities, finals, boxes))
    postprocess = Postprocess(
        score_threshold=threshold,
        topk=topk,
        iou_threshold=suppress,
        max_detections=limit,
        rank=rank,  # type: ignore[arg-type]
        clip=clip,  # type: ignore[arg-type]
        candidates=candidates,  # type: ignore[arg-type]
    )
    found = postprocess(levels, images(*sizes))
    for image, size in enumerate(sizes):
        expected = greedy(
            levels, image, size, threshold=threshold, topk=topk, suppress=suppress, limit=limit, rank=rank, clip=clip,
            per_level=candidates,
        )  # fmt: skip
        assert found[image].labels.tolist() == [k for _, _, k in expected]
        assert found[image].scores.tolist() == [score for _, score, _ in expected]
        if expected:
            boxes = torch.tensor([box for box, _, _ in expected])
            assert torch.allclose(found[image].boxes, boxes, atol=1e-4)


def test_boxes_beyond_the_edge_join_when_cut_first() -> None:
    """The two of them reach different distances to the left: outside they differ, inside they are one."""
    rows = level([[-40, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.8], [0.9, 0.8])
    before, after = (Postprocess(clip=clip)([rows], images((64, 64)))[0] for clip in ("before", "after"))
    assert before.boxes.tolist() == [[0, 0, 10, 10]] and before.scores.tolist() == [pytest.approx(0.9)]
    assert after.boxes.tolist() == [[0, 0, 10, 10]] * 2


def test_boxes_cut_afterwards_use_up_detections() -> None:
    """What lies outside the image counts towards the most per image before it is dropped, as published."""
    rows = level([[70, 0, 80, 10], [0, 0, 10, 10], [20, 0, 30, 10]], [0.9, 0.8, 0.7], [0.9, 0.8, 0.7])
    counts = [
        len(Postprocess(clip=clip, max_detections=2)([rows], images((64, 64)))[0]) for clip in ("before", "after")
    ]
    assert counts == [2, 1]


@pytest.mark.parametrize(("rank", "kept"), [("probability", 0.2), ("score", 0.45)])
def test_top_k_by_probability_or_by_score(rank: str, kept: float) -> None:
    rows = level([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], [0.9, 0.5, 0.04], [0.2, 0.45, 0.5])
    (found,) = Postprocess(topk=1, rank=rank)([rows], images((64, 64)))  # type: ignore[arg-type]
    assert found.scores.tolist() == [pytest.approx(kept)]


def test_every_level_has_its_own_top_k() -> None:
    rows = level([[0, 0, 10, 10], [20, 0, 30, 10]], [0.9, 0.8], [0.9, 0.8])
    other = level([[0, 20, 10, 30], [20, 20, 30, 30]], [0.2, 0.1], [0.2, 0.1])
    (found,) = Postprocess(topk=1)([rows, other], images((64, 64)))
    assert found.scores.tolist() == pytest.approx([0.9, 0.2])


@pytest.mark.parametrize(
    ("topk", "candidates", "kept"),
    [
        (1000, "scores", [0.95, 0.9, 0.85, 0.8]),
        (1000, "locations", [0.95, 0.9, 0.85]),  # of three locations with two classes, the best three pairs
        (2, "locations", [0.95, 0.9]),
    ],
)
def test_a_level_may_have_no_more_candidates_than_locations(topk: int, candidates: str, kept: list[float]) -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]])
    scores = torch.tensor([[[0.95, 0.9], [0.85, 0.8], [0.01, 0.02]]])
    postprocess = Postprocess(topk=topk, candidates=candidates)  # type: ignore[arg-type]
    (found,) = postprocess([(scores, scores, boxes)], images((64, 64)))
    assert found.scores.tolist() == pytest.approx(kept)


def test_thresholds_are_exceeded_not_reached() -> None:
    rows = level([[0, 0, 10, 10], [20, 0, 30, 10]], [0.5, 0.25], [0.5, 0.9])
    (found,) = Postprocess(score_threshold=0.25)([rows], images((64, 64)))
    assert found.scores.tolist() == [0.5]
    overlapping = level([[0, 0, 10, 10], [0, 0, 10, 5]], [0.9, 0.8], [0.9, 0.8])
    assert len(Postprocess(iou_threshold=0.5)([overlapping], images((64, 64)))[0]) == 2
    assert len(Postprocess(iou_threshold=0.49)([overlapping], images((64, 64)))[0]) == 1


def test_classes_do_not_suppress_each_other() -> None:
    boxes = torch.tensor([[[-30.0, -30, 2, 2], [-30, -30, 2, 2.5]]])  # shifting a class by the largest 2.5 would not do
    scores = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]])
    for clip in ("before", "after"):
        (found,) = Postprocess(clip=clip)([(scores, scores, boxes)], images((64, 64)))  # type: ignore[arg-type]
        assert found.labels.tolist() == [0, 1] and found.scores.tolist() == pytest.approx([0.9, 0.8])


def test_boxes_return_in_original_pixels() -> None:
    rows = level([[8, 8, 70, 40]], [0.9], [0.9])
    (found,) = Postprocess()([rows], images((32, 64), original=[(96, 32)]))
    assert found.boxes.tolist() == [[4, 24, 32, 96]]


def test_nothing_above_the_threshold() -> None:
    rows = level([[8, 8, 70, 40]], [0.01], [0.9])
    (found,) = Postprocess()([rows], images((64, 64)))
    assert found.boxes.shape == (0, 4) and found.scores.shape == (0,) and found.labels.shape == (0,)
    assert found.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("rank", "'probability' or 'score'"),
        ("clip", "'before' or 'after'"),
        ("candidates", "'scores' or 'locations'"),
    ],
)
def test_unknown_conventions_are_named(key: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be {allowed}, got 'never'"):
        Postprocess(**{key: "never"})  # type: ignore[arg-type]
