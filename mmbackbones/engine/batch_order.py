"""The order of training batches: entered anywhere, random by place and not by past.

MMEngine draws augmentations from generators that go on from sample to sample, in each
worker its own: where a run stands in these streams cannot be saved. Here every sample
and every step starts its generators from a seed that is a function of the run's seed,
the rank, and the place in the run. So a run that is resumed draws what it would have
drawn, with any number of workers, and nothing has to be saved for that.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from mmengine.dist import get_rank
from torch.utils.data import BatchSampler, DataLoader

__all__ = [
    'DrawnIndex',
    'ResumableBatches',
    'SeededBatch',
    'make_resumable',
    'seed_step',
]

# First number of a key, so that steps and samples never share a seed.
_STEP, _SAMPLE = 0, 1
# Samples before a batch that it knows of; a kilobyte or two on its way to a worker.
_HISTORY = 512


def _seed_generators(*key: int) -> int:
    """Start Python's, NumPy's and torch's CPU generators; a seed for the devices'."""
    words = np.random.SeedSequence(key).generate_state(4)
    python, numpy, high, low = (int(word) for word in words)
    random.seed(python)
    np.random.seed(numpy)  # noqa: NPY002  (the one that transforms draw from)
    seed = (high << 32 | low) >> 1
    # Not `torch.manual_seed`, which takes longer than all of this together.
    torch.default_generator.manual_seed(seed)
    return seed


def seed_step(seed: int, iteration: int) -> None:
    """Start the generators of CPU and devices for one training step of this rank."""
    torch.manual_seed(_seed_generators(_STEP, seed, get_rank(), iteration))


class DrawnIndex(int):
    """Index of a sample that knows what was drawn before it.

    mmengine's data sets hand it to their transforms as `sample_idx`; those that wrap
    others do not, as their indices mean something else.

    Attributes:
        before: indices of the batches before it in its epoch, about 512 samples of
            this rank, and last, perhaps empty, those before it in its own.
    """

    before: tuple[Sequence[int], ...] = ()


class SeededBatch:
    """Indices of a batch; going through them seeds the generators for each.

    A worker of the `DataLoader` fetches sample after sample while it iterates, so
    what a sample draws depends on its place alone. (Not a list: pickling one on the
    way to the worker would iterate, in the main process.)

    Args:
        indices: of the data set.
        key: of the batch in the run.
        before: indices of the batches before it.
    """

    def __init__(
        self,
        indices: Sequence[int],
        key: tuple[int, ...],
        before: tuple[Sequence[int], ...] = (),
    ) -> None:
        self.indices = indices
        self.key = key
        self.before = before

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.indices)

    def __iter__(self) -> Iterator[DrawnIndex]:
        """The indices, with the generators seeded for each."""
        for place, index in enumerate(self.indices):
            _seed_generators(_SAMPLE, *self.key, place)
            drawn = DrawnIndex(index)
            drawn.before = (*self.before, self.indices[:place])
            yield drawn


class ResumableBatches:
    """Batch sampler that hands out another one's batches, from any of them on.

    Those that were trained on are skipped as indices: nothing is read for them.

    Args:
        batches: the batch sampler; the same again for the same epoch, as all of
            mmengine's and mmdet's are.
        seed: of the run.
        endless: whether to go on with the next epoch at the end of one.

    Attributes:
        epoch: number of the epoch that the next iteration is of.
        start: number of batches that the next iteration, and only that, skips.
    """

    def __init__(
        self, batches: BatchSampler, *, seed: int, endless: bool = False
    ) -> None:
        self.batches = batches
        self.seed = seed
        self.endless = endless
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> object:
        """The sampler of single indices, as `BatchSampler` has it."""
        return self.batches.sampler

    @property
    def batch_size(self) -> int:
        """Samples in a batch of one rank."""
        return self.batches.batch_size

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[SeededBatch]:
        """Batches from `start` on."""
        # When the first one is asked for: torch makes iterators that it never uses.
        start, self.start = self.start, 0
        yield from islice(self._from_the_first(self.epoch), start, None)

    def refuse_nothing(self) -> None:
        """Of an epoch without a batch: training would end, or search, in silence.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            'the training set gives no batch: with drop_last each process needs at '
            f'least batch_size = {self.batch_size} samples; lower '
            'train_dataloader.batch_size, or set train_dataloader.drop_last=False'
        )

    def _from_the_first(self, epoch: int) -> Iterator[SeededBatch]:
        while True:
            number = -1
            size = getattr(self.batches, 'batch_size', 1)  # own ones may not say it
            before: deque = deque(maxlen=max(_HISTORY // size, 1))
            for number, indices in enumerate(self.batches):
                key = (self.seed, get_rank(), epoch, number)
                yield SeededBatch(indices, key, tuple(before))
                before.append(indices)
            if number < 0:
                self.refuse_nothing()
            if not self.endless:
                return
            epoch += 1
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)


def make_resumable(
    loader: DataLoader, *, seed: int, endless: bool = False
) -> ResumableBatches:
    """Put a `ResumableBatches` into a loader that has not been iterated yet.

    Args:
        loader: of a data set with indices.
        seed: of the run.
        endless: as of `ResumableBatches`.

    Raises:
        ValueError: an epoch would have no batch.
    """
    inner = loader.batch_sampler
    if isinstance(inner, ResumableBatches):
        inner = inner.batches
    batches = ResumableBatches(inner, seed=seed, endless=endless)
    if len(batches) == 0:
        batches.refuse_nothing()
    # torch refuses this as an attribute, since an iterator under way would not
    # notice; a new loader would hide `batch_size` and `sampler` from hooks.
    vars(loader)['batch_sampler'] = batches
    return batches
