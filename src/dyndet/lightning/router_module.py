"""Step 2 of a dynamic detector: both detectors are fixed, the router learns which images need the second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dyndet.errors import UserError
from dyndet.lightning.detection import DetectionModule
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.models.dynamicdet.offset import Offset, router_loss
from dyndet.ops.distributed import gathered
from dyndet.speeds.splits import BothWays, go_both_ways
from dyndet.structures import Batch, Category


class Lesson(NamedTuple):
    """What the router learns from some images.

    Attributes:
        pooled: (B, channels) what it reads.
        losses: (2, B) of the first and of the second detector.
    """

    pooled: Tensor
    losses: Tensor


class RouterModule(DetectionModule):
    """Trains the router of a dynamic detector, on batches of images or on lessons that were kept from an earlier pass.

    Logs the loss, d = L1 - L2, the offset, the mean difficulty, and how many images are hard at a difficulty of 1/2.
    Validation also logs `val/spearman`, the rank correlation of difficulty and d, and `val/hard_10/AP` to
    `val/hard_90/AP`: AP when that share of the images, in percent, takes the hard route.

    Args:
        detector: a dynamic detector with a router; everything else in it is frozen.
        offset: when an image counts as hard.
        categories: see `DetectionModule`.
        optimizer: called with the detector; only the router is left to optimise.
        schedule: see `DetectionModule`.
        config: see `DetectionModule`.
    """

    detector: DynamicDetector

    def __init__(
        self,
        detector: DynamicDetector,
        *,
        offset: Offset,
        categories: Sequence[Category],
        optimizer: Callable[..., Optimizer] | None = None,
        schedule: Callable[..., LRScheduler] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(detector, DynamicDetector) or detector.router is None:
            raise UserError("only a dynamic detector has a router to train: choose a dy_ experiment")
        super().__init__(detector, categories=categories, optimizer=optimizer, schedule=schedule, config=config)
        self.offset = offset
        self._ways: list[BothWays] = []
        detector.requires_grad_(False)
        detector.router.requires_grad_(True)
        self.train()  # the trainer takes modes as they are

    def train(self, mode: bool = True) -> LightningModule:
        """The detectors stay in eval mode: their norms and samplers are fixed as well."""
        super().train(mode)
        self.detector.eval()
        self.detector.preprocess.train(mode)  # the canvas is that of training
        return self

    def training_step(self, batch: Batch | Lesson, batch_idx: int) -> STEP_OUTPUT:
        lesson = learn(self.detector, batch) if isinstance(batch, Batch) else Lesson(*batch)
        difficulty = self.detector.difficulty(lesson.pooled)
        difference = lesson.losses[0] - lesson.losses[1]
        offset = self.offset(torch.tensor(gathered(difference.tolist())))
        loss = router_loss(difficulty, lesson.losses, offset)
        values = {
            "loss": loss,
            "difference": difference.mean(),
            "offset": torch.tensor(offset),
            "difficulty": difficulty.sigmoid().mean(),
            "hard": (difficulty > 0).float().mean(),
        }
        self.log_dict({f"train/{name}": value.detach() for name, value in values.items()}, batch_size=len(difficulty))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        if batch.targets:
            self._ways.append(go_both_ways(self.detector, self.static, batch))
        return super().validation_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._ways = []

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        ways = BothWays.joined(gathered(self._ways))
        self._ways = []
        shares = range(10, 100, 10)
        splits = ways.curve(self.categories, [share / 100 for share in shares])
        self.log("val/spearman", ways.rank_correlation())
        self.log_dict({f"val/hard_{share}/AP": split.ap for share, split in zip(shares, splits, strict=True)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["dyndet"]["offset"] = self.offset.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the offset of the checkpoint.

        Raises:
            UserError: if it is not of step 2, or of another offset.
        """
        saved = checkpoint["dyndet"]
        if "offset" not in saved:
            raise UserError("ckpt_path is not a checkpoint of step 2; those of step 1 are given as init=...")
        before, now = ((config or {}).get("router_loss") for config in (saved["config"], self.config))
        if before != now:
            raise UserError(f"ckpt_path was trained with router_loss={before}, not {now}: go on with the same")
        self.offset.restore(saved["offset"])
        super().on_load_checkpoint(checkpoint)


@torch.no_grad()
def learn(detector: DynamicDetector, batch: Batch) -> Lesson:
    """Runs both detectors over a batch; in eval mode."""
    seen, losses = detector.image_losses(batch.images, batch.targets)
    return Lesson(detector.pooled(seen), losses)
