"""Two detectors and a router between them (DynamicDet, Lin et al., CVPR 2023, arXiv:2304.05552).

Easy images: the first backbone, its neck and head. Hard ones: both backbones, the second reading the first through
composite links, then the second neck and head; the first's do not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from dyndet.errors import UserError
from dyndet.models.backbones.stages import StagedBackbone, run_stages
from dyndet.models.detectors.base import Detector, Images, RawMaps
from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.models.dynamicdet.links import CompositeLinks, run_linked
from dyndet.models.dynamicdet.router import Router
from dyndet.ops.autocast import without_autocast
from dyndet.ops.distributed import alone
from dyndet.ops.grid import valid_masks
from dyndet.routing import Routes
from dyndet.structures import Detections, ImageBatch, Losses, Size, Target

Route = Literal["first", "second"]


class DynamicDetector(Detector):
    """Two detectors of one kind, the second of which starts from what the first has seen.

    Without a router every image is hard: so it is before its router is trained.

    Args:
        first: answers for easy images.
        second: answers for hard ones; its backbone has the same stages as the first's. It may share the neck, the head
            and the predictor with the first.
        links: from the first backbone to the second.
        router: the first backbone's maps -> difficulty.
        shared_stages: the second backbone goes on from so many leading stages of the first.
        cross: see `run_linked`.
        threshold: an image is hard when the logit of its difficulty exceeds it; inf makes all easy, -inf all hard.

    Attributes:
        threshold: as above; may be set between calls.
    """

    def __init__(
        self,
        *,
        first: PyramidDetector,
        second: PyramidDetector,
        links: CompositeLinks,
        router: Router | None = None,
        shared_stages: int = 0,
        cross: int | None = None,
        threshold: float = 0.0,
    ) -> None:
        super().__init__()
        if router is not None and router.masked and first.preprocess.centred:
            raise ValueError("masked pooling reads images at the top left: set preprocess.centred=false")
        self.first = first
        self.second = second
        self.links = links
        self.router = router
        self.shared_stages = shared_stages
        self.cross = cross
        self.threshold = threshold
        self.preprocess = first.preprocess
        self.budget = second.budget
        if shared_stages:
            _staged(second).drop_stages(shared_stages)

    @property
    def strides(self) -> list[int]:
        return self.second.strides

    @property
    def size_divisor(self) -> int:
        return max(self.first.size_divisor, self.second.size_divisor)

    @property
    def has_masks(self) -> bool:
        return self.second.has_masks

    def losses(self, images: Images, targets: Sequence[Target | dict[str, Tensor]]) -> Losses:
        """Both detectors' losses, equally weighted (`first/...` and `second/...`), and the second's routing."""
        first, second = self.both_losses(images, targets)
        terms = {f"first/{name}": value for name, value in first.terms.items()}
        terms |= {f"second/{name}": value for name, value in second.terms.items()}
        return Losses(terms, second.routing)

    def both_losses(self, images: Images, targets: Sequence[Target | dict[str, Tensor]]) -> tuple[Losses, Losses]:
        """The losses of either detector."""
        seen = self.look(images)
        first = self.first.losses(seen.batch, targets, self._easy_maps(seen))
        return first, self.second.losses(seen.batch, targets, self._hard_maps(seen))

    @torch.no_grad()
    def image_losses(self, images: Images, targets: Sequence[Target | dict[str, Tensor]]) -> tuple[Seen, Tensor]:
        """What the router learns from: what the first backbone saw, and (2, B) losses of every image by itself, of the
        first and of the second detector.
        """
        seen = self.look(images)
        with alone():  # an image's losses are its own, and processes may have different numbers of batches
            first = self.first.image_losses(seen.batch, targets, self._easy_maps(seen))
            second = self.second.image_losses(seen.batch, targets, self._hard_maps(seen))
        return seen, torch.stack([first, second])

    def look(self, images: Images) -> Seen:
        """Runs the first backbone."""
        batch = self.first.batch(images)
        pixels = self.preprocess(batch)
        backbone = _staged(self.first)

        def run(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            outputs = run_stages(backbone.stages(), x)
            return outputs, backbone.sources(outputs)

        return Seen(batch, pixels, *self.first.run_part("backbone", run, pixels))

    def pooled(self, seen: Seen) -> Tensor:
        """What the router reads, (B, sum of channels).

        Raises:
            ValueError: without a router.
        """
        if self.router is None:
            raise ValueError("this dynamic detector has no router yet: train one")
        if not self.router.masked:
            return self.router.pool(seen.sources)
        shapes = [(x.shape[-2], x.shape[-1]) for x in seen.sources]
        valid = valid_masks(seen.batch.sizes, shapes, _staged(self.first).stage_strides)
        return self.router.pool(
            seen.sources, None if valid is None else [mask.to(seen.pixels.device) for mask in valid]
        )

    def difficulty(self, pooled: Tensor) -> Tensor:
        """What `pooled` gives -> (B,) logits in full precision: in half precision images would tie.

        Raises:
            ValueError: without a router.
        """
        if self.router is None:
            raise ValueError("this dynamic detector has no router yet: train one")
        with without_autocast(pooled.device.type):
            return self.router(pooled)

    @torch.no_grad()
    def detect_with_routing(self, images: Images) -> tuple[list[Detections], Routes]:
        return self.detect_by(images)

    @torch.no_grad()
    def detect_by(self, images: Images, route: Route | None = None) -> tuple[list[Detections], Routes]:
        """`detect_with_routing`; `route` sends all images one way, and the router is not asked."""
        seen = self.look(images)
        if route is None and self.router is not None:
            difficulty = self.difficulty(self.pooled(seen)).cpu()
            routes = Routes(difficulty > self.threshold, difficulty)
        else:
            routes = Routes(torch.full((len(seen.batch),), route != "first"))
        found: list[Detections | None] = [None] * len(seen.batch)
        for hard, indices, _ in routes.parts():
            some = seen.only(indices)
            if hard:
                answers, routing = self.second.detect_with_routing(some.batch, self._hard_maps(some))
                routes.second = routing and routing.named("second.")
            else:
                answers, routing = self.first.detect_with_routing(some.batch, self._easy_maps(some))
                routes.first = routing and routing.named("first.")
            for index, answer in zip(indices, answers, strict=True):
                found[index] = answer
        return cast(list[Detections], found), routes

    def raw_outputs(self, images: Images, route: Route = "second") -> RawMaps:
        """The maps of one of the two detectors, as `Detector.raw_outputs`."""
        seen = self.look(images)
        if route == "first":
            return self.first.raw_outputs(seen.batch, self._easy_maps(seen))
        return self.second.raw_outputs(seen.batch, self._hard_maps(seen))

    def forward(self, images: Images, route: Route = "second") -> RawMaps:
        """As of `Detector`: what runs on images that take this route, the router among it."""
        seen = self.look(images)
        if self.router is not None:
            self.difficulty(self.pooled(seen))
        if route == "first":
            return self.first(seen.batch, self._easy_maps(seen))
        return self.second(seen.batch, self._hard_maps(seen))

    def parts(self, route: Route = "second") -> dict[str, nn.Module]:
        """As of `Detector`: "backbone", "router", for hard images "links" and "backbone2", and what that detector has
        after its backbone.
        """
        chosen = self.first if route == "first" else self.second
        parts = {"backbone": self.first.get_submodule("backbone")}
        if self.router is not None:
            parts["router"] = self.router
        if route == "second":
            parts |= {"links": self.links, "backbone2": self.second.get_submodule("backbone")}
        return parts | {name: part for name, part in chosen.parts().items() if name != "backbone"}

    def _easy_maps(self, seen: Seen) -> list[Tensor]:
        return _staged(self.first).maps(seen.sources, seen.size)

    def _hard_maps(self, seen: Seen) -> list[Tensor]:
        second = _staged(self.second)

        def run(x: Sequence[Any]) -> list[Tensor]:
            pixels, outputs, sources = x
            added = self.links(sources)
            outputs = run_linked(second, pixels, outputs, added, shared=self.shared_stages, cross=self.cross)
            return second.maps(second.sources(outputs), seen.size)

        return self.second.run_part("backbone", run, [seen.pixels, seen.outputs, seen.sources])


class Seen(NamedTuple):
    """What the first backbone has seen of a batch.

    Attributes:
        batch: the images.
        pixels: (B, 3, H, W) network input.
        outputs: of the backbone's stages.
        sources: the same as links, router and neck read them.
    """

    batch: ImageBatch
    pixels: Tensor
    outputs: Sequence[Tensor]
    sources: Sequence[Tensor]

    @property
    def size(self) -> Size:
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def only(self, indices: Sequence[int]) -> Seen:
        """Some of the images, without a copy when it is all of them."""
        if len(indices) == len(self.batch):
            return self
        index = torch.tensor(indices)
        there = index.to(self.pixels.device)
        return Seen(
            self.batch[index], self.pixels[there], [x[there] for x in self.outputs], [x[there] for x in self.sources]
        )


def _staged(detector: PyramidDetector) -> StagedBackbone:
    return cast(StagedBackbone, detector.backbone)


def assemble_dynamic(
    *,
    first: PyramidDetector,
    second: PyramidDetector,
    link: Callable[..., nn.Module],
    first_link: int,
    shared_stages: int = 0,
    cross: int | None = None,
    share_neck_head: bool = False,
    router: Callable[..., Router] | None = None,
    read_from: int = 0,
    masked: bool | None = None,
) -> DynamicDetector:
    """Builds a `DynamicDetector` from two detectors and parts that wait for the widths of their backbones.

    Args:
        first: ready.
        second: ready, of the same kind.
        link: see `CompositeLinks`.
        first_link: see `CompositeLinks`.
        shared_stages: see `DynamicDetector`.
        cross: see `DynamicDetector`.
        share_neck_head: the second detector uses the neck of the first and everything behind it.
        router: called with `stage_channels`, `first` and `masked`; None leaves it out.
        read_from: the first stage of the first backbone that the router reads.
        masked: see `Router`; None masks where it can, which is where images lie at the top left.

    Raises:
        UserError: if the backbones cannot be linked so.
    """
    backbone = _staged(second)
    stages = len(backbone.stage_channels)
    lowest = max(shared_stages, 1 if backbone.link_channels[0] == 3 else 0)  # a stem that reads pixels takes no links
    if not lowest <= first_link < stages:
        raise UserError(
            f"detector.first_link={first_link}: links can begin at stages {lowest} to {stages - 1} of this backbone"
        )
    if share_neck_head:
        for name, part in first.named_children():
            if name not in ("preprocess", "backbone"):
                setattr(second, name, part)
    return DynamicDetector(
        first=first,
        second=second,
        links=CompositeLinks(_staged(first).stage_channels, backbone.link_channels, first=first_link, link=link),
        router=None
        if router is None
        else router(
            stage_channels=_staged(first).stage_channels,
            first=read_from,
            masked=not first.preprocess.centred if masked is None else masked,
        ),
        shared_stages=shared_stages,
        cross=cross,
    )
