"""What one- and two-stage detectors share: images to a pyramid, a head on it, and every part in its own precision."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyndet.errors import UserError
from dyndet.inputs import check_images, check_pixels, checked_targets
from dyndet.models.budget import Budget
from dyndet.models.detectors.base import Detector, FeatureMaps, Head, Images, RawMaps
from dyndet.models.preprocess import Preprocess
from dyndet.ops.autocast import without_autocast
from dyndet.ops.grid import valid_masks
from dyndet.routing import Routing
from dyndet.structures import Detections, HeadOutput, ImageBatch, Losses, Size, Target


class Outputs(NamedTuple):
    """What one pass over a batch gives.

    Attributes:
        batch: the images.
        targets: what losses are taken for, as `PyramidDetector` wants them; none without losses.
        valid: L x (B, 1, H, W) bool, False on padding; None when there is none.
        head: of the head.
        raw: the predictor's maps.
    """

    batch: ImageBatch
    targets: list[Target]
    valid: list[Tensor] | None
    head: HeadOutput
    raw: RawMaps

    def only(self, index: int) -> Outputs:
        """Of one image, as a batch; without its routing."""
        here = slice(index, index + 1)
        return Outputs(
            self.batch[here],
            self.targets[here],
            None if self.valid is None else [mask[here] for mask in self.valid],
            HeadOutput([x[here] for x in self.head.cls], [x[here] for x in self.head.reg]),
            [{name: value[here] for name, value in level.items()} for level in self.raw],
        )

    def existing(self, reader: object) -> list[Tensor] | None:
        """Where something can be detected: `valid`, without what the head left out (`HeadOutput.computed`).

        Raises:
            UserError: if it left something out, and the reader of these masks does not heed them.
        """
        computed = self.head.computed
        if computed is None:
            return self.valid
        if not getattr(reader, "ignore_padding", True):
            raise UserError(
                "this head computes only some positions, and with ignore_padding=false objects would be found at the "
                "others: set predictor.ignore_padding=true (predictor.rpn.ignore_padding of two stages)"
            )
        return computed if self.valid is None else [a & b for a, b in zip(computed, self.valid, strict=True)]


class PyramidDetector(Detector):
    """Backbone, neck and head; what reads the head's output is up to the subclass.

    Args:
        preprocess: pixels to network input.
        backbone: images -> feature maps; has `channels` and `strides`.
        neck: feature maps -> pyramid; has `channels` and `strides`.
        head: (pyramid, valid) -> `HeadOutput`.
        budget: prices the head's routing in `losses`; None leaves it free.
        precision: dtype name per part ("backbone", "neck", "head", "predictor") to run it in under autocast, for
            instance {"neck": "bfloat16", "head": "bfloat16"}; parts without one follow the surrounding precision.

    Raises:
        UserError: if `preprocess` pads to sizes that the backbone or the neck cannot take.
    """

    backbone: FeatureMaps
    neck: FeatureMaps
    head: Head

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        backbone: FeatureMaps,
        neck: FeatureMaps,
        head: Head,
        budget: Budget | None = None,
        precision: Mapping[str, str | None] | None = None,
    ) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.budget = budget
        self.precision = _dtypes(precision or {})
        if preprocess.pad_multiple % self.size_divisor:
            raise UserError(
                f"preprocess.pad_multiple={preprocess.pad_multiple}: this backbone and neck take only images whose "
                f"sides are multiples of {self.size_divisor}: set preprocess.pad_multiple={self.size_divisor}"
            )

    @property
    def strides(self) -> list[int]:
        return self.neck.strides

    @property
    def size_divisor(self) -> int:
        return max(getattr(part, "size_divisor", 1) for part in (self.backbone, self.neck))

    def losses(
        self,
        images: Images,
        targets: Sequence[Target | dict[str, Tensor]],
        maps: Sequence[Tensor] | None = None,
    ) -> Losses:
        """As of `Detector`.

        Args:
            images: see `Images`.
            targets: see `Detector.losses`.
            maps: of the backbone, where they are there already; `images` then are the `batch` that they are of.
        """
        outputs = self._forward(images, maps, targets, check=True)
        routing = outputs.head.routing
        terms = self._terms(outputs) | {f"head/{name}": value for name, value in outputs.head.losses.items()}
        if self.budget is not None and routing is not None:
            price = self.budget(routing, targets=outputs.targets, positives=self._positives(outputs))
            terms = terms | {"budget": price}
        return Losses(terms, routing)

    def image_losses(
        self,
        images: Images,
        targets: Sequence[Target | dict[str, Tensor]],
        maps: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """(B,) float32 detection losses that each image would have in a batch of its own: no budget, none of the head.

        Every mean is taken inside the image. Call it in eval mode, or moving averages take a step per image. Arguments
        as of `losses`.
        """
        outputs = self._forward(images, maps, targets)
        each = [self._terms(outputs.only(index)) for index in range(len(outputs.batch))]
        return torch.stack([torch.stack(list(terms.values())).sum() for terms in each])

    @torch.no_grad()
    def detect_with_routing(
        self, images: Images, maps: Sequence[Tensor] | None = None
    ) -> tuple[list[Detections], Routing | None]:
        outputs = self._forward(images, maps)
        return self._detections(outputs), outputs.head.routing

    def raw_outputs(self, images: Images, maps: Sequence[Tensor] | None = None) -> RawMaps:
        return self._forward(images, maps).raw

    def forward(self, images: Images, maps: Sequence[Tensor] | None = None) -> RawMaps:
        """As of `Detector`; `maps` as of `losses`."""
        return self.raw_outputs(images, maps)

    def pyramid(self, images: Images) -> tuple[list[Tensor], list[Tensor] | None]:
        """What the head gets: L x (B, C, H_l, W_l), and L x (B, 1, H_l, W_l) bool, False on padding, or None."""
        batch = self.batch(images)
        return self._features(self._maps(batch), batch)

    def run_head(
        self, features: list[Tensor], valid: list[Tensor] | None, targets: Sequence[Target] | None = None
    ) -> HeadOutput:
        """The head alone, in its own precision; in training with targets, if there are some and it sees them."""
        head: Callable[..., HeadOutput] = self.head
        if self.training and targets is not None and getattr(self.head, "sees_targets", False):
            head = partial(head, targets=targets)
        return self.run_part("head", head, features, valid)

    def batch(self, images: Images) -> ImageBatch:
        """Any images as one batch on the detector's device, placed as it wants them.

        Raises:
            UserError: if they are no images, see `dyndet.inputs.check_images`.
            ValueError: if the backbone or the neck cannot take their size.
        """
        if isinstance(images, ImageBatch):
            check_pixels(images)
        else:
            check_images(images)
        device = next(self.parameters()).device
        batch = self.preprocess.place(ImageBatch.of(images, self.preprocess.pad_multiple).to(device))
        height, width = batch.pixels.shape[-2:]
        if height % self.size_divisor or width % self.size_divisor:
            raise ValueError(
                f"images of {height} x {width} pixels (H x W) do not fit this network of stride {self.size_divisor}: "
                f"pad both sides to multiples of {self.size_divisor}, or give a list of images"
            )
        return batch

    def _forward(
        self,
        images: Images,
        maps: Sequence[Tensor] | None,
        targets: Sequence[Target | dict[str, Tensor]] | None = None,
        *,
        check: bool = False,
    ) -> Outputs:
        """The one pass from images, or from the backbone's maps of a batch, to the predictor's maps."""
        batch = self.batch(images) if maps is None else ImageBatch.of(images)
        if check and targets is not None:
            targets = checked_targets(targets, batch)
        features, valid = self._features(self._maps(batch) if maps is None else maps, batch)
        wanted = None if targets is None else self._wanted(batch, targets)
        head = self.run_head(features, valid, wanted)
        return Outputs(batch, wanted or [], valid, head, self._raw(head))

    @abstractmethod
    def _raw(self, head: HeadOutput) -> RawMaps:
        """The predictor's maps."""

    @abstractmethod
    def _terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Detection losses by name."""

    def _positives(self, outputs: Outputs) -> Callable[[], Tensor] | None:
        """The predictor's `positive_shares`, not yet taken; None where it does not tell."""
        return None

    @abstractmethod
    def _detections(self, outputs: Outputs) -> list[Detections]:
        """In pixels of the original images."""

    def _wanted(self, batch: ImageBatch, targets: Sequence[Target | dict[str, Tensor]]) -> list[Target]:
        """What losses are taken for: no crowd, in pixels of the batch, on its device."""
        wanted = [Target.of(target).without_crowd().to(batch.pixels.device) for target in targets]
        if batch.offsets is None:
            return wanted
        return [target.shifted(offset) for target, offset in zip(wanted, batch.offsets, strict=True)]

    def _maps(self, batch: ImageBatch) -> list[Tensor]:
        return self.run_part("backbone", self.backbone, self.preprocess(batch))

    def _features(self, maps: Sequence[Tensor], batch: ImageBatch) -> tuple[list[Tensor], list[Tensor] | None]:
        features = self.run_part("neck", self.neck, maps)
        if batch.offsets is not None:
            return features, None
        shapes: list[Size] = [(x.shape[-2], x.shape[-1]) for x in features]
        valid = valid_masks(batch.sizes, shapes, self.strides)
        return features, None if valid is None else [mask.to(features[0].device) for mask in valid]

    def run_part(self, part: str, module: Callable[..., Any], inputs: Any, *more: Any) -> Any:
        """A part in its own precision. One without takes inputs like its weights, unless autocast surrounds it."""
        device = next(self.parameters()).device.type
        dtype = self.precision.get(part)
        if device != "meta":  # whose tensors know no autocast
            if dtype in (torch.bfloat16, torch.float16):
                with torch.autocast(device, dtype=dtype):
                    return module(inputs, *more)
            if dtype is None and torch.is_autocast_enabled(device):
                return module(inputs, *more)
        with without_autocast(device):
            return module(_cast(inputs, next(self.parameters()).dtype), *more)


def fitted(part: Callable[..., Any], name: str, neck: FeatureMaps, **more: Any) -> Any:
    """A part that waits for the pyramid's width, built.

    Raises:
        UserError: if the levels differ in width and the part wants one width for all.
    """
    channels = neck.channels
    try:
        return part(channels=channels, **more)
    except TypeError as error:
        if isinstance(channels, int):
            raise
        part(channels=channels[0], **more)  # another mistake comes up again
        raise UserError(
            f"this neck's levels are {', '.join(map(str, channels))} channels wide, but this {name} needs one width: "
            "set neck=fpn or neck=bifpn, or head=none and one of YOLO's predictors"
        ) from error


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype)
    if isinstance(value, HeadOutput):
        return replace(value, cls=_cast(value.cls, dtype), reg=_cast(value.reg, dtype))
    return [_cast(item, dtype) for item in value]


def _dtypes(precision: Mapping[str, str | None]) -> dict[str, torch.dtype]:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    chosen = {part: name for part, name in precision.items() if name is not None}
    for part, name in chosen.items():
        if part not in ("backbone", "neck", "head", "predictor") or name not in known:
            raise ValueError(
                f"precision {part}={name}: parts are backbone, neck, head, predictor; values {', '.join(known)}"
            )
    return {part: known[name] for part, name in chosen.items()}
