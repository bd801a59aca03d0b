"""What is drawn when: keys (epoch, index) instead of indices.

The order of an epoch is a function of (seed, epoch), and all randomness of a sample is a function of (seed, epoch,
index). So neither the number of workers nor an interruption changes what is seen.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Generator
from torch.utils.data import Dataset, Sampler

from dyndet.data.transforms import Transform
from dyndet.errors import UserError
from dyndet.structures import Sample

Key = tuple[int, int]
"""Epoch, index."""

T_co = TypeVar("T_co", covariant=True)


class Indexable(Protocol, Generic[T_co]):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> T_co: ...


Mix = Callable[[Indexable[Sample], int, Generator], Sample]
"""Several images make one: called with the dataset, the index of the first image, and a generator for the rest."""


def keyed_generator(*key: int) -> Generator:
    """A generator that depends on all numbers of the key; neighbouring keys give unrelated streams."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


class KeyedSampler(Sampler[Key]):
    """The keys of one rank for one epoch.

    Args:
        length: number of samples in the dataset.
        shuffle: a new permutation per epoch; otherwise dataset order, and the epoch in the keys stays 0, so that every
            evaluation sees the same.
        even: gives all ranks equally many keys by repeating the first ones (training); otherwise every sample is
            yielded exactly once over all ranks (evaluation).
        seed: seed of the permutations.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        length: int,
        *,
        shuffle: bool,
        even: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.length = length
        self.shuffle = shuffle
        self.even = even
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before every epoch."""
        self.epoch = epoch if self.shuffle else 0

    def __len__(self) -> int:
        if self.even:
            return -(-self.length // self.world_size)
        return len(range(self.rank, self.length, self.world_size))

    def __iter__(self) -> Iterator[Key]:
        # Built here and now: a loader may be asked for its iterator before, and for its first key after, set_epoch.
        epoch = self.epoch
        order = range(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=keyed_generator(self.seed, epoch)).tolist()
        positions = range(self.rank, self.rank + len(self) * self.world_size, self.world_size)
        return iter([(epoch, order[position % self.length]) for position in positions])


class KeyedBatchSampler(Sampler[list[Key]]):
    """Batches of keys that can start in the middle of an epoch.

    Args:
        sampler: the keys.
        batch_size: keys per batch.
        drop_last: leaves out a last batch that is not full.
        groups: a group per dataset index (landscape or portrait); batches hold one group as long as they can be filled
            from it, and the rest of all groups is batched together at the end of the epoch, so no key is lost.
        start: (epoch, batches): in that epoch, so many batches were consumed before.

    Raises:
        UserError: if a trainer replaced the sampler by its own.
    """

    def __init__(
        self,
        sampler: KeyedSampler,
        batch_size: int,
        drop_last: bool,
        groups: Sequence[int] | None = None,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        if not isinstance(sampler, KeyedSampler):
            raise UserError("keyed samplers shard by rank themselves: set trainer.use_distributed_sampler=false")
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.groups = groups
        self.start = start
        sampler.set_epoch(start[0])

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever it starts: trainers count from its beginning."""
        keys = len(self.sampler)
        return keys // self.batch_size if self.drop_last else -(-keys // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, consumed = self.start
        return iter(self._batches()[consumed if self.sampler.epoch == epoch else 0 :])

    def _batches(self) -> list[list[Key]]:
        pending: dict[int, list[Key]] = {}
        batches = []
        for key in self.sampler:
            group = 0 if self.groups is None else self.groups[key[1]]
            batch = pending.setdefault(group, [])
            batch.append(key)
            if len(batch) == self.batch_size:
                batches.append(pending.pop(group))
        rest = [key for batch in pending.values() for key in batch]
        batches += [rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size)]
        return batches[: len(self)]


class KeyedDataset(Dataset[Sample]):
    """Transformed samples by key.

    Args:
        dataset: samples by index.
        transform: gets a generator that depends on (seed, epoch, index) only.
        seed: seed of the transforms.
        mix: makes a sample of several before it is transformed, with the same generator.
    """

    def __init__(
        self,
        dataset: Indexable[Sample],
        transform: Transform | None = None,
        seed: int = 0,
        mix: Mix | None = None,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.mix = mix

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key | int) -> Sample:
        return self.draw(self.dataset, key)

    def draw(self, images: Indexable[Sample], key: Key | int) -> Sample:
        """The sample of a key, made of other images than those of `dataset`."""
        # A plain index (the trainer replaces samplers when it overfits) is one of epoch 0.
        epoch, index = key if isinstance(key, tuple) else (0, key)
        generator = keyed_generator(self.seed, epoch, index)
        sample = images[index] if self.mix is None else self.mix(images, index, generator)
        return sample if self.transform is None else self.transform(sample, generator)
