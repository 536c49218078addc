"""Order and randomness of batches are functions of their place."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import DataLoader, Dataset

from mmbackbones.engine.batch_order import make_resumable, seed_step

SIZE = 10


def draws() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


class Draws(Dataset):
    """A sample is its index and what the generators gave for it."""

    def __init__(self) -> None:
        self.read: list[int] = []  # in this process

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple:
        self.read.append(index)
        return index, *draws()


class MixedAspects(Draws):
    """Half of the images are wide."""

    def get_data_info(self, index: int) -> dict:
        return dict(width=1 + index % 2 * 8, height=4)


def loader(sampler: type = DefaultSampler, num_workers: int = 0) -> DataLoader:
    dataset = Draws()
    return DataLoader(
        dataset,
        batch_size=4,
        sampler=sampler(dataset, shuffle=True, seed=3),
        num_workers=num_workers,
        collate_fn=list,
        persistent_workers=num_workers > 0,
    )


def epoch(source: DataLoader, number: int = 0, start: int = 0) -> list:
    batches = source.batch_sampler
    source.sampler.set_epoch(number)
    batches.epoch, batches.start = number, start
    return list(source)


@pytest.fixture
def whole() -> list:
    source = loader()
    make_resumable(source, seed=7)
    return epoch(source)


@pytest.mark.parametrize('start', [0, 1, 2, 3])
def test_it_starts_anywhere_and_reads_nothing_before(whole: list, start: int) -> None:
    source = loader()
    make_resumable(source, seed=7)
    random.seed(99)
    assert epoch(source, start=start) == whole[start:]
    assert source.dataset.read == [sample[0] for b in whole[start:] for sample in b]
    assert len(source) == 3 and source.batch_size == 4
    assert epoch(source) == whole  # the start counts once


@pytest.mark.parametrize('num_workers', [1, 2])
def test_workers_draw_alike(whole: list, num_workers: int) -> None:
    source = loader(num_workers=num_workers)
    make_resumable(source, seed=7)
    assert epoch(source, start=1) == whole[1:]
    assert epoch(source) == whole


def test_every_place_draws_its_own(whole: list) -> None:
    source = loader()
    make_resumable(source, seed=7)
    samples = [sample for b in whole + epoch(source, number=1) for sample in b]
    assert len({sample[1] for sample in samples}) == 2 * SIZE
    make_resumable(source, seed=8)
    other = [sample for b in epoch(source) for sample in b]
    assert not {sample[1] for sample in samples} & {sample[1] for sample in other}


@pytest.mark.parametrize('start', [0, 2])
def test_a_sample_knows_those_before_it(start: int) -> None:
    source = loader()
    make_resumable(source, seed=7)
    order = list(source.sampler)
    source.batch_sampler.start = start
    *_, last = source.batch_sampler
    assert [list(index.before) for index in last] == [
        [order[:4], order[4:8], []],
        [order[:4], order[4:8], order[8:9]],
    ]
    assert list(last) == order[8:] and len(last.before) == 2


def test_it_knows_so_many_and_none_of_another_epoch() -> None:
    source = DataLoader(range(2000), batch_size=4, shuffle=False)
    make_resumable(source, seed=7, endless=True)
    batches = islice(source.batch_sampler, 502)
    lengths = [len(batch.before) for batch in batches]
    assert lengths[:2] == [0, 1] and lengths[499] == 128 and lengths[500:] == [0, 1]


@pytest.mark.parametrize('sampler', [DefaultSampler, InfiniteSampler])
def test_endless(sampler: type) -> None:
    """20 batches: of one endless row, or of epochs of 3 that are shuffled anew."""
    sources = [loader(sampler), loader(sampler)]
    runs = []
    for source, start in zip(sources, (0, 13), strict=True):
        make_resumable(source, seed=7, endless=True)
        source.batch_sampler.start = start
        runs.append([b for b, _ in zip(source, range(20 - start), strict=False)])
    assert runs[1] == runs[0][13:]
    assert len({tuple(s[0] for s in b) for b in runs[0]}) > 15


def test_a_set_without_a_batch_is_an_error() -> None:
    source = DataLoader(Draws(), batch_size=SIZE + 1, drop_last=True)
    with pytest.raises(ValueError, match=f'batch_size = {SIZE + 1}'):
        make_resumable(source, seed=7)


@pytest.mark.parametrize('endless', [False, True])
def test_a_sampler_without_a_batch_is_an_error(endless: bool) -> None:
    """Which mmdet's by aspect ratio can be, though it has a length."""
    sampler = DefaultSampler(MixedAspects())
    batches = AspectRatioBatchSampler(sampler, batch_size=SIZE, drop_last=True)
    source = DataLoader(MixedAspects(), batch_sampler=batches)
    make_resumable(source, seed=7, endless=endless)
    with pytest.raises(ValueError, match=f'batch_size = {SIZE}'):
        next(iter(source))


def test_steps_draw_by_iteration() -> None:
    seen = []
    for iteration in (5, 6, 5):
        seed_step(0, iteration)
        seen.append(draws())
    assert seen[0] == seen[2] != seen[1]
