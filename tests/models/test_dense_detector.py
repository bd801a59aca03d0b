"""The detector interface: inputs, padding, routing, precision."""

from __future__ import annotations

import pytest
import torch

from dyndet import build_detector
from dyndet.models.detectors.dense import DenseDetector
from dyndet.structures import ImageBatch, Target


@pytest.fixture(scope="module")
def detector() -> DenseDetector:
    torch.manual_seed(0)
    return build_detector("shapes_dyn", ["predictor.postprocess.score_threshold=0.0"])


def image(height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def test_raw_outputs_are_maps_per_level(detector: DenseDetector) -> None:
    raw = detector.raw_outputs(image()[None])
    assert [{k: tuple(v.shape) for k, v in level.items()} for level in raw] == [
        {"cls": (1, 4, h, w), "box": (1, 4, h, w), "centerness": (1, 1, h, w)} for h, w in ((8, 12), (4, 6), (2, 3))
    ]


def test_integer_and_float_pixels_agree(detector: DenseDetector) -> None:
    pixels = (image() * 255).to(torch.uint8)
    a, b = detector.detect(pixels[None])[0], detector.detect((pixels.float() / 255)[None])[0]
    assert torch.allclose(a.boxes, b.boxes, atol=1e-4) and torch.equal(a.labels, b.labels)


def test_images_of_different_sizes_are_padded_and_stay_inside(detector: DenseDetector) -> None:
    found = detector.detect([image(64, 96), image(40, 50)])
    assert len(found) == 2 and len(found[1]) > 0
    assert found[1].boxes[:, 2].max() <= 50 and found[1].boxes[:, 3].max() <= 40


def test_the_content_of_padding_does_not_matter(detector: DenseDetector) -> None:
    pixels = torch.zeros(1, 3, 64, 96)
    pixels[0, :, :40, :50] = image(40, 50)
    noisy = torch.rand(1, 3, 64, 96)
    noisy[0, :, :40, :50] = image(40, 50)
    sizes = torch.tensor([[40, 50]])
    a = detector.detect(ImageBatch(pixels, sizes, sizes))[0]
    b = detector.detect(ImageBatch(noisy, sizes, sizes))[0]
    assert torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores)


def test_boxes_return_in_original_pixels(detector: DenseDetector) -> None:
    small = ImageBatch.of(image()[None])
    large = ImageBatch(small.pixels, small.sizes, small.sizes * torch.tensor([[2, 3]]))
    a, b = detector.detect(small)[0], detector.detect(large)[0]
    assert torch.allclose(a.boxes * torch.tensor([3.0, 2, 3, 2]), b.boxes, atol=1e-3)


def test_losses_are_named_and_hold_the_routing(detector: DenseDetector) -> None:
    detector.train()
    target = {"boxes": torch.tensor([[10.0, 10, 50, 60]]), "labels": torch.tensor([1])}
    losses = detector.losses(image()[None], [target])
    assert set(losses.terms) == {"cls", "box", "centerness", "budget"}
    assert float(losses.total.detach()) == pytest.approx(sum(float(term.detach()) for term in losses.terms.values()))
    assert losses.routing is not None
    expected = detector.budget.weight * (losses.routing.soft() / losses.routing.full()).mean()  # type: ignore[union-attr]
    assert losses.terms["budget"].item() == pytest.approx(expected.item(), rel=1e-5)
    detector.eval()


def test_crowds_do_not_train(detector: DenseDetector) -> None:
    detector.train()
    boxes = torch.tensor([[10.0, 10, 50, 60], [0.0, 0, 90, 60]])
    labels = torch.tensor([1, 2])
    crowd = Target(boxes, labels, torch.tensor([False, True]))
    alone = Target(boxes[:1], labels[:1], torch.tensor([False]))
    with torch.no_grad():
        a, b = detector.losses(image()[None], [crowd]), detector.losses(image()[None], [alone])
    # Batch norm trains, but sees the same image.
    assert a.total.item() == pytest.approx(b.total.item())
    detector.eval()


@pytest.mark.parametrize("parts", [["backbone"], ["neck"], ["head"], ["predictor"], ["neck", "head"]])
@pytest.mark.parametrize("head", ["plain", "fixed_small", "fine_grained_small"])
def test_any_part_can_run_in_bfloat16(parts: list[str], head: str) -> None:
    torch.manual_seed(0)
    mixed = build_detector("shapes_dyn", [f"head={head}", *(f"precision.{part}=bfloat16" for part in parts)])
    exact = build_detector("shapes_dyn", [f"head={head}"])
    exact.load_state_dict(mixed.state_dict())
    a, b = mixed.eval().raw_outputs(image()[None]), exact.eval().raw_outputs(image()[None])
    assert a[0]["cls"].dtype == (torch.bfloat16 if "predictor" in parts else torch.float32)
    assert torch.allclose(a[0]["cls"].float(), b[0]["cls"], atol=0.05)
    assert not torch.equal(a[0]["cls"].float(), b[0]["cls"])
    mixed.train()
    losses = mixed.losses(image()[None], [{"boxes": torch.tensor([[10.0, 10, 50, 60]]), "labels": torch.tensor([1])}])
    assert all(term.dtype == torch.float32 for term in losses.terms.values())
    losses.total.backward()


def test_a_whole_detector_can_be_bfloat16() -> None:
    detector = build_detector("shapes_dyn").to(torch.bfloat16)
    assert detector.raw_outputs(image()[None])[0]["cls"].dtype == torch.bfloat16
    detector.train()
    target = {"boxes": torch.tensor([[10.0, 10, 50, 60]]), "labels": torch.tensor([1])}
    losses = detector.losses(image()[None], [target])
    assert losses.total.dtype == torch.float32
    losses.total.backward()


def test_wrong_images_are_named(detector: DenseDetector) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        detector.detect(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        detector.detect([torch.zeros(1, 8, 8)])
