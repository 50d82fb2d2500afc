"""Loaders: every batch is a function of (seed, step), whatever the workers and wherever a run begins."""

import itertools

import pytest
import torch
from torch.utils.data import Dataset

from dataset.loaders import StepSampler, batches_by_size, shared, training_loader
from utils.errors import UserError


class Echo(Dataset):
    """Seven items that say by which index and seed they were asked for."""

    def __len__(self):
        return 7

    def __getitem__(self, key):
        return torch.tensor(key, dtype=torch.int64)


def batches(num_items=7, batch_size=3, first=0, last=20, seed=1):
    return list(StepSampler(num_items, batch_size, first, last, seed))


def indices(found):
    return [index for batch in found for index, _ in batch]


@pytest.mark.parametrize("num_items, batch_size", [(7, 3), (6, 3), (2, 5), (1, 4), (30, 9)])
@pytest.mark.parametrize("begin", [1, 4, 11, 20])
def test_beginning_later_gives_the_tail(num_items, batch_size, begin):
    assert batches(num_items, batch_size, begin) == batches(num_items, batch_size)[begin:]


@pytest.mark.parametrize("num_items, batch_size", [(7, 3), (6, 3), (2, 5), (1, 4)])
def test_every_item_comes_once_an_epoch(num_items, batch_size):
    found = indices(batches(num_items, batch_size, last=50))
    epochs = [found[i : i + num_items] for i in range(0, len(found) - num_items + 1, num_items)]
    assert len(epochs) > 5 and all(sorted(epoch) == list(range(num_items)) for epoch in epochs)


def test_orders_differ_between_epochs_and_seeds():
    found = indices(batches(30, 30, last=3))
    orders = {tuple(found[i : i + 30]) for i in (0, 30, 60)} | {tuple(indices(batches(30, 30, last=1, seed=2)))}
    assert len(orders) == 4


def test_every_item_has_a_seed_of_its_own():
    """An augmentation is drawn anew each time, also for the same image and under neighbouring run seeds."""
    seeds = [s for run in (0, 1, 2) for batch in batches(7, 3, last=100, seed=run) for _, s in batch]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_gives_the_sampler_s_batches(num_workers):
    found = [batch.tolist() for batch in training_loader(Echo(), 3, 5, 12, 1, num_workers)]
    assert found == [[list(pair) for pair in batch] for batch in batches(first=5, last=12)]


@pytest.mark.parametrize("number", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("length", [0, 1, 7, 10])
def test_shares_follow_each_other_and_differ_by_one_item(length, number):
    shares = [shared(range(length), (k, number)) for k in range(number)]
    assert [item for share in shares for item in share] == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1 and len(shares[0]) == max(map(len, shares))


@pytest.mark.parametrize("number", [2, 3])
def test_processes_share_the_batches_of_one(number):
    shares = [list(StepSampler(7, 5, 2, 9, 1, share=(k, number))) for k in range(number)]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares)] == batches(batch_size=5, first=2, last=9)


def test_a_batch_smaller_than_the_processes_is_refused():
    with pytest.raises(UserError, match="2 can't be shared by 3 processes"):
        training_loader(Echo(), 2, 0, 9, 1, 0, share=(0, 3))


def test_batches_by_size_hold_images_of_one_size():
    sizes = [(5, 4), (4, 5), (5, 4), (5, 4), (4, 5), (9, 9), (5, 4)]
    assert batches_by_size(sizes, 2) == [[0, 2], [3, 6], [1, 4], [5]]
    assert batches_by_size(sizes, 9) == [[0, 2, 3, 6], [1, 4], [5]]
    assert batches_by_size([(8, 8)] * 5, 2) == [[0, 1], [2, 3], [4]] and batches_by_size([], 2) == []
