"""Loaders for training and evaluation that shard by rank and continue exactly where a checkpoint was written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from dyndet.data.collate import Collate
from dyndet.data.dataset import DetectionDataset
from dyndet.data.drawing import Drawing, Gather
from dyndet.data.layouts.folder import DataFolder
from dyndet.data.loader import Loader
from dyndet.data.quarantine import OnError, Quarantine
from dyndet.data.sampler import KeyedBatchSampler, KeyedDataset, KeyedSampler, Mix, keyed_generator
from dyndet.data.transforms import Compose, Transform
from dyndet.data.usable import refuse_useless, warn_of_flat
from dyndet.data.waiting import Waiting
from dyndet.data.workers import loader_workers
from dyndet.errors import DataError, MissingDataError, UserError
from dyndet.inputs import checked_targets
from dyndet.signals import end_workers_at_exit, leave_to_main_process
from dyndet.structures import Batch, Category, ImageBatch, Sample

Source = DetectionDataset | Callable[..., DetectionDataset]
Transforms = Transform | Sequence[Transform] | None


class DetectionDataModule(LightningDataModule):
    """A training and a validation set behind loaders of `Batch`.

    The trainer must be built with `use_distributed_sampler=False`: the samplers here shard by rank. A checkpoint
    written anywhere in an epoch holds the epoch and the batches consumed, and resuming goes on with the next batch;
    data order and augmentation depend on `seed`, the epoch and the index, not on `num_workers`.

    Args:
        train: the training set, or a callable that builds it when it is needed.
        val: the validation set, which is also the test and prediction set, or a callable.
        batch_size: training images per process.
        num_classes: number of classes the model is built for, checked against the data; None takes that of the data.
        folder: where both sets come from; `train` and `val` are called with it when they are built.
        train_mix: makes a training image of several (a mosaic, say), before the transforms.
        train_transform: one transform or several in order.
        val_transform: the same for evaluation.
        val_batch_size: evaluation images per process; `batch_size` when None.
        num_workers: loader processes, no more than there are cores; 0 loads in the main process, see `loader_workers`.
        pad_multiple: batches are padded to a multiple of this many pixels.
        group_by_aspect: training batches hold only landscape or only portrait images, as far as possible.
        drop_last: leaves out a last training batch that is not full.
        seed: seed of order and augmentation.
        pin_memory: page-locked batches; when CUDA is there if None.
        max_train: use only so many training images, spread evenly over the set.
        max_val: the same for validation.
        on_error: what to do with files that cannot be used: "raise" ends with an error, "skip" goes on with others in
            their place (in evaluation, without them) and lists them, see `Quarantine`.
        max_errors: so many are skipped; more are an error.
        timeout: seconds that a batch of the loader processes is waited for.
        hint: what to do when files cannot be found; added to that error.

    Attributes:
        quarantine: what could not be used so far.
    """

    def __init__(
        self,
        *,
        train: Source,
        val: Source,
        batch_size: int,
        num_classes: int | None = None,
        folder: DataFolder | None = None,
        train_mix: Mix | None = None,
        train_transform: Transforms = None,
        val_transform: Transforms = None,
        val_batch_size: int | None = None,
        num_workers: int | Literal["auto"] = 0,
        pad_multiple: int = 32,
        group_by_aspect: bool = False,
        drop_last: bool = True,
        seed: int = 0,
        pin_memory: bool | None = None,
        max_train: int | None = None,
        max_val: int | None = None,
        on_error: OnError = "raise",
        max_errors: int = 100,
        timeout: float = 300,
        hint: str = "",
    ) -> None:
        super().__init__()
        if timeout <= 0:
            raise UserError(f"data.timeout={timeout}: give the seconds that a batch is waited for, more than 0")
        for key, value in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value is not None and value < 1:
                raise UserError(f"data.{key} must be at least 1, got {value}")
        self._num_classes = num_classes
        self.folder = folder
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.train_mix = train_mix
        self.train_transform = _composed(train_transform)
        self.val_transform = _composed(val_transform)
        self.num_workers = loader_workers(num_workers)
        self.collate = Collate(pad_multiple)
        self.group_by_aspect = group_by_aspect
        self.drop_last = drop_last
        self.seed = seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.max_train = max_train
        self.max_val = max_val
        self.quarantine = Quarantine(on_error, max_errors)
        self.timeout = timeout
        self.hint = hint
        self._sources = {"train": train, "val": val}
        self._splits: dict[str, DetectionDataset] = {}
        self._sampler: KeyedSampler | None = None
        self._start: tuple[int, int] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Builds the splits that `stage` needs, once.

        Raises:
            DataError: if a split is empty or none of its boxes is usable.
            UserError: if the categories do not fit `num_classes` or differ between the splits.
        """
        if stage in ("fit", None):
            self._build("train", self.max_train)
        self._build("val", self.max_val)

    @property
    def train(self) -> DetectionDataset:
        return self._split("train")

    @property
    def val(self) -> DetectionDataset:
        return self._split("val")

    @property
    def categories(self) -> list[Category]:
        """Category k belongs to label k. Needs `setup`."""
        return self.val.categories

    @property
    def num_classes(self) -> int:
        """As many as there are categories. Needs `setup`, unless the number was given."""
        return len(self.categories) if self._num_classes is None else self._num_classes

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world_size = _rank_and_world_size()
        # Overfitting a few batches means the same ones in every epoch.
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        self._sampler = KeyedSampler(
            len(self.train), shuffle=not overfit, even=True, seed=self.seed, rank=rank, world_size=world_size
        )
        groups = [int(height > width) for height, width in self.train.sizes] if self.group_by_aspect else None
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        start, self._start = self._start or (epoch, 0), None
        batches = KeyedBatchSampler(self._sampler, self.batch_size, self.drop_last, groups, start)
        if not len(batches):
            raise UserError(
                f"the training split gives {len(self._sampler)} images per process, too few for one batch of "
                f"{self.batch_size}: lower data.batch_size or set data.module.drop_last=false"
            )
        dataset = KeyedDataset(self.train, self.train_transform, self.seed, self.train_mix)
        return self.loader(dataset, batch_sampler=batches, waiting=Waiting(self.num_workers))

    def val_dataloader(self) -> DataLoader[Any]:
        rank, world_size = _rank_and_world_size()
        sampler = KeyedSampler(len(self.val), shuffle=False, even=False, rank=rank, world_size=world_size)
        if not len(sampler):  # more processes than images: Lightning skips loaders without batches, the others wait
            return DataLoader([NOTHING], batch_size=None)  # type: ignore[arg-type]
        dataset = KeyedDataset(self.val, self.val_transform, self.seed)
        return self.loader(dataset, replace=False, sampler=sampler, batch_size=self.val_batch_size)

    def single_images(self, count: int) -> list[ImageBatch]:
        """Validation images as batches of one, so many of them, spread evenly over the set."""
        dataset = KeyedDataset(self.val, self.val_transform, self.seed)
        count = min(count, len(dataset))
        places = (i * len(dataset) // count for i in range(count))
        return [self.collate([sample]).images for sample in self._samples(dataset, places, replace=False)]

    def training_samples(self, count: int) -> list[Sample]:
        """What training is shown first, so many, as in epoch 0: mixed, transformed, not yet a batch."""
        dataset = KeyedDataset(self.train, self.train_transform, self.seed, self.train_mix)
        order = KeyedSampler(len(self.train), shuffle=True, even=True, seed=self.seed)
        return list(self._samples(dataset, islice(order, count), replace=True))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if isinstance(batch, Batch):
            if device.type != "cpu" and self.trainer is not None and self.trainer.training:
                checked_targets(batch.targets, batch.images)  # while nothing has to wait for their values
            return batch.to(device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, in plain numbers: the next batch is number `batches` of `epoch`."""
        if self.trainer is None or self._sampler is None:
            return {}
        epoch = self._sampler.epoch
        # `processed`, because `completed` lags by one inside on_train_batch_end.
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()["current"]["processed"]
        if self.trainer.current_epoch > epoch:  # the trainer has closed the epoch, perhaps early
            epoch, batches = self.trainer.current_epoch, 0
        elif batches >= self.trainer.num_training_batches:
            epoch, batches = epoch + 1, 0
        return {"epoch": epoch, "batches": batches, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next training loader start where the checkpoint was written."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._start = (state_dict["epoch"], state_dict["batches"])
        then, now = state_dict["order"], self._order()
        changed = [f"{name} was {then.get(name)} and is {now[name]}" for name in now if then.get(name) != now[name]]
        if changed:
            rank_zero_warn(f"resuming is not exact, because the data order has changed: {', '.join(changed)}")

    def _order(self) -> dict[str, int | bool]:
        """Everything that the order of training batches depends on."""
        return {
            "images": len(self.train),
            "batch_size": self.batch_size,
            "world_size": _rank_and_world_size()[1],
            "group_by_aspect": self.group_by_aspect,
            "seed": self.seed,
        }

    def _build(self, name: str, limit: int | None) -> None:
        if name in self._splits:
            return
        source = self._sources[name]
        try:
            split = source(*([] if self.folder is None else [self.folder])) if callable(source) else source
        except MissingDataError as error:
            raise MissingDataError(f"{error}. {self.hint}" if self.hint else str(error), error.faults) from error
        self.quarantine.add(getattr(split, "faults", ()))
        refuse_useless(split, name)
        if name == "train":
            warn_of_flat(split, name)
        if limit is not None and limit < len(split):
            split = Subset(split, [i * len(split) // limit for i in range(limit)])
        if not len(split):
            raise DataError(f"the {name} split has no images: check its files and data.max_{name}")
        count = len(split.categories)
        if self._num_classes not in (None, count):
            raise UserError(
                f"the data has {count} categories but num_classes is {self._num_classes}: set data.num_classes={count} "
                "or data.num_classes=null"
            )
        for other, built in self._splits.items():
            if built.categories != split.categories:
                raise UserError(_difference(other, built.categories, name, split.categories))
        self._splits[name] = split

    def _split(self, name: str) -> DetectionDataset:
        if name not in self._splits:
            raise RuntimeError(f"the {name} split is not built yet: call setup() first")
        return self._splits[name]

    def loader(self, dataset: KeyedDataset, *, replace: bool = True, **kwargs: Any) -> DataLoader[Any]:
        """Loads samples by key, by the policy for unusable files.

        Args:
            dataset: the samples.
            replace: whether another image takes the place of an unusable one.
            **kwargs: of a `Loader`.
        """
        end_workers_at_exit()
        return Loader(
            self._drawing(dataset, replace=replace, workers=self.num_workers),
            collate_fn=Gather(self.collate),
            quarantine=self.quarantine,
            patience=self.timeout,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_to_main_process,
            pin_memory=self.pin_memory,
            # Its own generator: a loader that draws worker seeds from the global one shifts every later dropout mask.
            generator=keyed_generator(self.seed),
            **kwargs,
        )

    def _drawing(self, dataset: KeyedDataset, *, replace: bool, workers: int = 0) -> Drawing:
        skip, most = self.quarantine.skips, self.quarantine.max_errors
        return Drawing(dataset, skip=skip, replace=replace, most=most, workers=workers)

    def _samples(self, dataset: KeyedDataset, keys: Iterable[Any], *, replace: bool) -> Iterator[Sample]:
        drawing = self._drawing(dataset, replace=replace)
        for drawn in map(drawing.__getitem__, keys):
            self.quarantine.add(drawn.faults)
            if drawn.error is not None:
                raise drawn.error
            if drawn.sample is not None:
                yield drawn.sample


NOTHING = Batch(ImageBatch.of(torch.zeros(0, 3, 1, 1)), [])
"""What a process without evaluation images takes its part in validation with."""


class Subset:
    """Some images of a dataset.

    Args:
        dataset: the whole.
        indices: which images, in this order.
    """

    def __init__(self, dataset: DetectionDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = list(indices)
        self.categories = dataset.categories
        self.sizes = [dataset.sizes[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.indices[index]]


def _composed(transforms: Transforms) -> Transform | None:
    return Compose(transforms) if isinstance(transforms, Sequence) else transforms


def _difference(one: str, ones: Sequence[Category], other: str, others: Sequence[Category]) -> str:
    """Says how the categories of two splits differ."""
    only = [
        f"{_listed(more)} only in {name}"
        for name, more in ((one, _without(ones, others)), (other, _without(others, ones)))
        if more
    ]
    said = " and ".join(only) or f"another order: {_listed(ones)} and {_listed(others)}"
    return (
        f"the {one} and {other} splits must list the same categories (id and name), but there is {said}: correct the "
        "files so that both list all"
    )


def _without(categories: Sequence[Category], others: Sequence[Category]) -> list[Category]:
    return [category for category in categories if category not in set(others)]


def _listed(categories: Sequence[Category]) -> str:
    shown = ", ".join(f"{category.id} {category.name}" for category in categories[:5])
    return f"[{shown}{', ...' if len(categories) > 5 else ''}]"


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
