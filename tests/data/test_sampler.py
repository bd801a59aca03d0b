from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler

from dyndet.data.sampler import KeyedBatchSampler, KeyedDataset, KeyedSampler, keyed_generator
from dyndet.data.shapes import ShapesDataset
from dyndet.data.transforms import Compose, RandomHorizontalFlip, ResizeShortestEdge
from dyndet.errors import UserError


def training(length: int, seed: int = 0, rank: int = 0, world_size: int = 1, epoch: int = 0) -> KeyedSampler:
    sampler = KeyedSampler(length, shuffle=True, even=True, seed=seed, rank=rank, world_size=world_size)
    sampler.set_epoch(epoch)
    return sampler


def test_generators_of_neighbouring_keys_are_unrelated():
    draws = {
        tuple(torch.rand(4, generator=keyed_generator(*key)).tolist()) for key in ((0, 0, 1), (0, 1, 0), (1, 0, 0))
    }
    assert len(draws) == 3
    first = torch.stack([torch.rand(1, generator=keyed_generator(0, 0, i)) for i in range(500)])
    assert float(first.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(torch.corrcoef(torch.cat([first[:-1], first[1:]], 1).T)[0, 1]) == pytest.approx(0, abs=0.15)


def test_order_depends_on_seed_and_epoch():
    assert list(training(50)) == list(training(50))
    assert {epoch for epoch, _ in training(50, epoch=7)} == {7}
    orders = [[index for _, index in training(50, seed, epoch=epoch)] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@given(st.integers(1, 60), st.integers(1, 7), st.integers(0, 3))
def test_evaluation_shards_cover_everything_exactly_once(length, world_size, epoch):
    shards = []
    for rank in range(world_size):
        sampler = KeyedSampler(length, shuffle=False, even=False, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        shards.append(list(sampler))
        assert len(sampler) == len(shards[-1])
    assert sorted(key for shard in shards for key in shard) == [(0, i) for i in range(length)]


@given(st.integers(1, 60), st.integers(1, 7))
def test_training_shards_are_even_and_cover_everything(length, world_size):
    shards = [list(training(length, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(shard) for shard in shards} == {-(-length // world_size)}
    counts = torch.bincount(torch.tensor([index for shard in shards for _, index in shard]), minlength=length)
    assert counts.min() >= 1
    assert counts.sum() - length < world_size


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40), st.integers(1, 7), st.booleans(), st.integers(0, 2))
def test_grouping_loses_nothing(groups, batch_size, drop_last, epoch):
    sampler = KeyedBatchSampler(training(len(groups), epoch=epoch), batch_size, drop_last, groups, (epoch, 0))
    batches = list(sampler)
    keys = [key for batch in batches for key in batch]
    assert len(batches) == len(sampler)
    assert len(set(keys)) == len(keys)
    assert len(keys) == (len(groups) // batch_size * batch_size if drop_last else len(groups))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    full = sum(groups.count(group) // batch_size for group in (0, 1))
    pure = [len({groups[index] for _, index in batch}) == 1 for batch in batches]
    assert sum(pure) >= full
    assert batches == list(sampler)


def test_a_started_epoch_continues_and_the_next_is_whole():
    whole = [list(KeyedBatchSampler(training(23), 4, False, start=(epoch, 0))) for epoch in (0, 1, 2)]
    sampler = KeyedBatchSampler(training(23), 4, False, start=(1, 3))
    assert len(sampler) == 6
    assert list(sampler) == whole[1][3:]
    sampler.sampler.set_epoch(1)
    assert list(sampler) == whole[1][3:]
    sampler.sampler.set_epoch(2)
    assert list(sampler) == whole[2]


def test_the_epoch_of_an_iterator_is_fixed_when_it_is_made():
    sampler = KeyedBatchSampler(training(8), 2, True, start=(3, 0))
    iterator = iter(sampler)
    sampler.sampler.set_epoch(4)
    assert {epoch for batch in iterator for epoch, _ in batch} == {3}


def test_a_replaced_sampler_is_refused():
    foreign: Any = SequentialSampler(range(4))
    with pytest.raises(UserError, match="use_distributed_sampler=false"):
        KeyedBatchSampler(foreign, 2, True)


def test_samples_depend_on_their_key_only():
    shapes = ShapesDataset(length=4, size=64)
    transform = Compose([ResizeShortestEdge([40, 48, 56, 64, 72], 200), RandomHorizontalFlip()])
    data, again, other = (KeyedDataset(shapes, transform, seed) for seed in (0, 0, 1))
    _ = again[1, 1]
    keys = [(epoch, index) for epoch in range(6) for index in range(4)]
    assert all(torch.equal(data[key].image, again[key].image) for key in keys)
    assert any(not torch.equal(data[key].image, other[key].image) for key in keys)
    assert len({data[epoch, 2].image.numpy().tobytes() for epoch in range(6)}) > 2
    assert torch.equal(data[2].image, data[0, 2].image)
