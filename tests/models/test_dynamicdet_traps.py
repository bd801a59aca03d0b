"""Traps of the published code of DynamicDet (Lin et al., CVPR 2023), and the tests that keep this one out of them.

 1 easiness taken for difficulty models/test_dynamicdet_traps.py::test_an_image_is_easy_from_the_threshold_down
   its share, its gradient       metrics/test_curve.py::test_thresholds
                                 models/test_offset.py::test_the_gradient_depends_on_the_difference_and_the_offset_alone
   in released files             convert/test_dynamicdet.py::test_networks_compute_the_same
   its name in what is written   lightning/test_router_traps.py::test_difficulty_is_what_the_router_is_asked_for
 2 X reads across                models/test_dynamicdet_traps.py::test_only_x_reads_across
                                 models/test_cascade.py::test_the_second_backbone_reads_the_first
                                 convert/test_dynamicdet.py::test_networks_compute_the_same
 3 batches of one image: routing models/test_cascade.py::test_a_mixed_batch_is_its_images_one_by_one
   batches of one image: losses  models/test_cascade.py::test_losses_of_single_images
                                 models/test_yolo_predictor_per_image.py::test_means_are_inside_the_image
 4 anchors of one head for both  models/test_dynamicdet_traps.py::test_each_head_has_its_own_anchors
                                 convert/test_dynamicdet.py::test_both_heads_get_the_anchors_that_they_were_trained_with
 5 step 2 loses anchors          lightning/test_router_traps.py::test_step_2_takes_weights_alone
 6 images in order               lightning/test_router_traps.py::test_one_process_shuffles
 7 a fixed device                models/test_dynamicdet_traps.py::test_no_device_is_written_down
   tensors on two devices        models/test_dynamicdet_traps.py::test_images_follow_the_detector
                                 models/test_dynamicdet_traps.py::test_losses_stay_on_the_device_of_the_maps
 8 x by the height               models/test_yolo_predictor.py::test_width_and_height_are_alike
                                 models/test_yolo_predictor_assign.py::test_candidates
                                 models/test_yolo_predictor_assign.py::test_choice
                                 data/test_yolo.py::test_boxes_labels_and_ids
 9 infinite costs                models/test_yolo_predictor_assign.py::test_certain_predictions_have_finite_costs
10 step 2 resumes step 1         lightning/test_router_traps.py::test_step_2_takes_weights_alone
11 one epoch divides by zero     lightning/test_router_traps.py::test_step_2_takes_weights_alone
                                 lightning/test_router_traps.py::test_schedules_of_one_step
12 costs scaled up               models/test_dynamicdet_traps.py::test_costs_are_counted_at_full_size
   costs of odd sizes            models/test_dynamicdet_traps.py::test_images_of_any_size_are_counted
   costs before folding          lightning/test_router_traps.py::test_the_folded_network_is_what_is_counted
13 sorting all differences anew  models/test_dynamicdet_traps.py::test_a_running_median_does_not_sort_anew
14 scores round to 1             models/test_dynamicdet_traps.py::test_scores_that_round_to_1_are_told_apart
                                 models/test_cascade.py::test_both_ends_are_exact_whatever_the_router_says
15 padding moves scores          lightning/test_router_traps.py::test_calibrated_scores_are_those_of_single_images
                                 models/test_dynamicdet_traps.py::test_padding_that_is_part_of_the_image_is_pooled
                                 models/test_cascade.py::test_masked_pooling_does_not_see_padding
16 one route for all processes   models/test_dynamicdet_traps.py::test_processes_route_on_their_own
                                 models/test_dynamicdet_traps.py::test_processes_do_not_share_losses_of_images
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from anchor_oracles import target_of
from torch import Tensor, nn
from yolo_oracles import ANCHORS, STRIDES, random_preds

from dyndet.api import build_detector
from dyndet.cli.compose import compose_experiment
from dyndet.metrics.static import StaticCosts
from dyndet.models.detectors.dynamic import DynamicDetector, Route
from dyndet.models.dynamicdet.offset import RunningMedian
from dyndet.models.predictors.yolo_predictor import YoloPredictor
from dyndet.ops.flops import MacCounter
from dyndet.speeds.set import Calibration, Point, set_speed
from dyndet.structures import Target

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src" / "dyndet"
ROUTER = "+router=exact"


def test_the_table_is_true() -> None:
    rows = re.findall(r"^ ?(\d*) .* ([\w/]+\.py)::(\w+)$", __doc__ or "", re.MULTILINE)
    assert len(rows) == (__doc__ or "").count("::")
    assert [int(number) for number, _, _ in rows if number] == list(range(1, 17))
    for _, file, name in rows:
        tests = [node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)]
        assert name in tests, f"{file} has no {name}"


def cascade(experiment: str, *overrides: str, scale: float = 1.0, bias: float = 0.0) -> DynamicDetector:
    """A cascade whose logits differ by `scale` times what they do at the start, around `bias`."""
    torch.manual_seed(0)
    detector = build_detector(experiment, [ROUTER, *overrides])
    assert isinstance(detector, DynamicDetector) and detector.router is not None
    detector.router.out.weight.data.mul_(scale)
    nn.init.constant_(detector.router.out.bias, bias)
    return detector


def some_images(count: int, size: int = 64) -> Tensor:
    """From dark to bright."""
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return images * torch.linspace(0.3, 1, count).view(-1, 1, 1, 1)


def difficulty_of(detector: DynamicDetector, images: Tensor) -> Tensor:
    difficulty = detector.detect_by(images)[1].difficulty
    assert difficulty is not None
    return difficulty


# 1


@pytest.mark.parametrize(("threshold", "hard"), [(0.3, False), (0.1, True)])
def test_an_image_is_easy_from_the_threshold_down(threshold: float, hard: bool) -> None:
    """Published: the first detector where easiness, 0.8 here, >= 1 - threshold."""
    detector = cascade("shapes_dy_tiny", scale=0, bias=math.log(0.8 / 0.2))
    images = some_images(2)
    set_speed(detector, f"threshold:{threshold}", None)
    assert detector.detect_by(images)[1].hard.tolist() == [hard] * 2
    detector.threshold = float(difficulty_of(detector, images)[0])
    assert not detector.detect_by(images)[1].hard.any()


# 2


def test_only_x_reads_across() -> None:
    found = {size: compose_experiment(f"dy_yolov7{size}").detector.cross for size in ("", "x", "w6")}
    assert found == {"": None, "x": 2, "w6": None}
    with torch.device("meta"):
        straight = build_detector("dy_yolov7x", ["detector.cross=null"])
    assert isinstance(straight, DynamicDetector) and straight.cross is None


# 4

FOUND = "[[[9,9],[15,13],[13,19]],[[21,23],[35,25],[25,37]],[[45,43],[71,55],[55,81]]]"
TARGETS = [target_of([[4.0, 6, 26, 30], [34, 30, 60, 58]], [0, 1]), target_of([[10.0, 8, 50, 40]], [2])]


def test_each_head_has_its_own_anchors() -> None:
    """Anchors of other data reach both; what one is given, it alone trains and decodes with."""
    detector = cascade("shapes_dy_yolo", f"predictor.anchors={FOUND}")
    images = some_images(2)
    heads: dict[Route, Any] = {"first": detector.first.predictor, "second": detector.second.predictor}
    for head in heads.values():
        assert head.anchors.tolist() == torch.tensor(ast.literal_eval(FOUND)).float().tolist()

    def used(name: Route) -> tuple[float, Tensor]:
        """Box loss, and widths and heights of boxes."""
        loss = detector.losses(images, TARGETS).terms[f"{name}/box"]
        return float(loss), heads[name].decode(detector.raw_outputs(images, name))[..., 2:4]

    ways: list[tuple[Route, Route]] = [("first", "second"), ("second", "first")]
    with torch.no_grad():
        for name, other in ways:
            (loss, sides), (same_loss, same_sides) = used(name), used(other)
            heads[name].anchors.mul_(1.25)
            assert used(name)[0] != pytest.approx(loss, rel=1e-3)
            torch.testing.assert_close(used(name)[1], 1.25 * sides)
            assert used(other)[0] == same_loss and torch.equal(used(other)[1], same_sides)


# 7


def test_no_device_is_written_down() -> None:
    """No "cuda:0", and no `.cuda()`."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            numbered = isinstance(node, ast.Constant) and re.search(r"\b(cuda|mps):\d", str(node.value))
            moved = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
            assert not numbered and not moved, f"{path} line {node.lineno}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("experiment", ["shapes_dy_yolo", "shapes_dy_tiny"])
def test_images_follow_the_detector(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second device that every machine has: a meta tensor and one on the CPU cannot meet in an operation."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta knows none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    detector = cascade(experiment, "preprocess.centred=false").to("meta")
    assert detector.router is not None
    detector.router.masked = experiment == "shapes_dy_tiny"
    images = [torch.rand(3, 64, 40), torch.rand(3, 48, 64)]
    seen = detector.look(images)
    assert detector.difficulty(detector.pooled(seen)).device.type == "meta"
    some = seen.only([1])
    assert some.pixels.shape[0] == 1 and some.pixels.device.type == "meta" and some.batch.sizes.tolist() == [[48, 64]]
    parts: list[tuple[Route, nn.Module]] = [("first", detector.first), ("second", detector.second)]
    for route, part in parts:
        raw = detector.raw_outputs(images, route)
        assert all(value.device.type == "meta" for level in raw for value in level.values())
        if isinstance(part.predictor, YoloPredictor):
            assert part.predictor.decode(raw).device.type == "meta"


@pytest.mark.parametrize("assignment", ["ota", "candidates"])
def test_losses_stay_on_the_device_of_the_maps(assignment: Any) -> None:
    """Here the default device is another one: a tensor made without saying where would lie there."""
    module = YoloPredictor(4, STRIDES, num_classes=3, anchors=ANCHORS, assignment=assignment)
    raw = random_preds(2, 3)
    valid = [torch.ones(2, 1, *level["pred"].shape[2:4], dtype=torch.bool) for level in raw]
    for masks in (None, valid):
        expected = module.losses(raw, TARGETS, masks)
        with torch.device("meta"):
            found = module.losses(raw, TARGETS, masks)
        assert {name: value.item() for name, value in found.items()} == {n: v.item() for n, v in expected.items()}
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert all(level["pred"].grad is not None and level["pred"].grad.any() for level in raw)


# 12


def test_costs_are_counted_at_full_size() -> None:
    """All but the router, whose maps are pooled, grows with the area: a small count, scaled up, would be wrong."""
    with torch.device("meta"):
        detector = build_detector("shapes_dy_yolo", [ROUTER])
    assert isinstance(detector, DynamicDetector) and detector.router is not None
    counter = MacCounter(detector)
    small, large = (counter.count((side, 2 * side), route="second") for side in (32, 128))
    router = detector.router.hidden.weight.numel() + detector.router.out.weight.numel()
    assert small.pop("router") == large.pop("router") == router
    del small["total"], large["total"]
    assert {"backbone", "links", "backbone2", "neck", "predictor"} <= set(small)
    assert large == {part: 16 * macs for part, macs in small.items()}


@pytest.mark.parametrize("experiment", ["shapes_dy_yolo", "shapes_dy_tiny"])
def test_images_of_any_size_are_counted(experiment: str) -> None:
    """Photos are no multiples of a stride; nothing outside of the canvas that is computed counts."""
    with torch.device("meta"):
        detector = build_detector(experiment)
    counter, costs = MacCounter(detector), StaticCosts(detector)
    for route in ("first", "second"):
        below, above = (counter.count(size, route=route)["total"] for size in ((32, 64), (64, 128)))
        assert below < sum(costs((48, 85), routed=False, route=route).values()) <= above


# 13


class Counted(float):
    """Counts comparisons."""

    comparisons = 0

    def __lt__(self, other: float) -> bool:
        Counted.comparisons += 1
        return float.__lt__(self, other)


class Differences:
    """What a tensor of differences gives."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def tolist(self) -> list[float]:
        return [Counted(value) for value in self.values]


def test_a_running_median_does_not_sort_anew() -> None:
    """Among n differences a new one finds its place in log n comparisons; sorting them takes n at least."""
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)).tolist()
    running = RunningMedian()
    Counted.comparisons = 0
    parts = [Differences(values[start : start + 8]) for start in range(0, len(values), 8)]
    medians = [running(part) for part in parts]  # type: ignore[arg-type]
    ordered = sorted(values)
    assert medians[-1] == (ordered[999] + ordered[1000]) / 2
    assert len(values) <= Counted.comparisons <= len(values) * (math.log2(len(values)) + 1)


# 14


def test_scores_that_round_to_1_are_told_apart() -> None:
    """In half precision, where detectors run, all of these images have an easiness of 1."""
    detector = cascade("shapes_dy_tiny", scale=0.5, bias=12.0)
    images = some_images(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        difficulty = difficulty_of(detector, images)
        assert difficulty.dtype == torch.float32 and float(difficulty.max() - difficulty.min()) < 0.05
        easiness = torch.sigmoid(-difficulty)
        assert easiness.half().tolist() == [1.0] * 4 and len(set(difficulty.tolist())) == 4
        calibration = Calibration([Point(0, 1), Point(0, 2)], difficulty.sort().values.tolist())
        for fraction in (0, 0.25, 0.5, 0.75, 1):
            set_speed(detector, f"hard_fraction:{fraction}", calibration)
            assert int(detector.detect_by(images)[1].hard.sum()) == 4 * fraction
        for speed, hard in (("threshold:0", True), ("threshold:1", False), ("hard", True), ("easy", False)):
            set_speed(detector, speed, None)
            assert detector.detect_by(images)[1].hard.tolist() == [hard] * 4


# 15


def test_padding_that_is_part_of_the_image_is_pooled() -> None:
    """As in the released networks: the canvas belongs to the score, and is not to be masked by mistake."""
    detector = cascade("shapes_dy_yolo")
    router = detector.router
    assert detector.preprocess.centred and router is not None and not router.masked
    router.masked = True
    with pytest.raises(ValueError, match=r"preprocess\.centred=false"):
        DynamicDetector(first=detector.first, second=detector.second, links=detector.links, router=router)


# 16

SHARDS = [[0, 1, 2], [3, 4]]
"""Images of two processes; when the last one's turn comes, the other process has none left."""


def in_two_processes(run: Callable[[int], Any], folder: Path) -> list[Any]:
    """Results of both, at which they arrive without waiting for each other."""
    with mp.Manager() as manager:
        results = manager.dict()
        arguments = (run, str(folder / "store"), results)
        mp.start_processes(_process, arguments, nprocs=2, start_method="fork")  # type: ignore[attr-defined]
        return [results[rank] for rank in range(2)]


def _process(rank: int, run: Callable[[int], Any], store: str, results: Any) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    results[rank] = run(rank)
    dist.destroy_process_group()


def test_processes_route_on_their_own(tmp_path: Path) -> None:
    """One process has three easy images, the other two hard ones."""
    detector = cascade("shapes_dy_tiny", "predictor.postprocess.score_threshold=0.001", scale=50)
    images = some_images(5)
    difficulty, order = difficulty_of(detector, images).sort()
    images = images[order]
    detector.threshold = float(difficulty[2:4].mean())

    def run(rank: int) -> list[tuple[bool, float, list[list[float]]]]:
        rows = []
        for index in SHARDS[rank]:
            (found,), routes = detector.detect_by(images[index : index + 1])
            assert routes.difficulty is not None and len(found)
            rows.append((bool(routes.hard), float(routes.difficulty), found.boxes.tolist()))
        return rows

    alone = [run(rank) for rank in range(2)]
    assert [[hard for hard, _, _ in rows] for rows in alone] == [[False] * 3, [True] * 2]
    assert in_two_processes(run, tmp_path) == alone


@pytest.mark.parametrize("experiment", ["shapes_dy_tiny", "shapes_dy_yolo"])
def test_processes_do_not_share_losses_of_images(experiment: str, tmp_path: Path) -> None:
    """What an image loses decides whether it is hard, and is nobody else's business."""
    detector = cascade(experiment)
    images = some_images(5)
    targets: list[Target] = [
        target_of([[4.0, 6, 26, 30], [34, 30, 60, 58]][:count], list(range(count))) for count in (1, 2, 0, 2, 1)
    ]

    def run(rank: int) -> list[list[float]]:
        alone = [(images[index : index + 1], targets[index : index + 1]) for index in SHARDS[rank]]
        return [detector.image_losses(*one)[1].flatten().tolist() for one in alone]

    assert in_two_processes(run, tmp_path) == [run(rank) for rank in range(2)]
