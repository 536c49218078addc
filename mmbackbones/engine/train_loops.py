"""Train loops that go on from the very iteration that a checkpoint was made at.

MMEngine's loop over epochs goes back to the start of the epoch, that over iterations
loads all batches again that were trained on. A validation that a kill cut off is lost
with both.
"""

from collections.abc import Iterator, Mapping

from mmengine.dist import get_world_size
from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.base_loop import BaseLoop
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmbackbones.engine.batch_order import make_resumable, seed_step

__all__ = [
    'ResumableEpochLoop',
    'ResumableIterLoop',
    'forget_validation',
    'iterations_factor',
    'step_is_complete',
]


def _publish(runner: Runner, **info: int) -> None:
    """Note in the message hub, which travels in every checkpoint."""
    known = runner.message_hub.runtime_info.get('train_position', {})
    runner.message_hub.update_info('train_position', {**known, **info})


def _position(runner: Runner) -> dict[str, int]:
    return runner.message_hub.runtime_info.get('train_position', {})


def forget_validation(runner: Runner) -> None:
    """Note that the validation under way will not come to its end."""
    _publish(runner, validated=-1)


def step_is_complete(runner: Runner) -> bool:
    """Whether no gradient waits for further iterations (`accumulative_counts`).

    A checkpoint does not hold gradients, so only then a run resumes exactly.
    """
    wrapper = runner.optim_wrapper
    # Those in a dictionary are counted by the model, if at all.
    return isinstance(wrapper, OptimWrapperDict) or wrapper.should_update()


def _samples_per_step(loop: BaseLoop) -> int:
    return loop.batches.batch_size * get_world_size()


def _batches_done(loop: BaseLoop, done: int) -> int:
    """Batches to skip, of `done` ones that may have had another size."""
    before = _position(loop.runner).get('samples_per_step')
    now = _samples_per_step(loop)
    if before in (None, now):
        return done
    loop.runner.logger.info(
        f'Resumed with {now} samples a step after {before}: goes on at the same '
        'sample. The base learning rate is not adapted, except by --auto-scale-lr'
    )
    return done * before // now


def iterations_factor(runner: Runner, checkpoint: Mapping) -> float:
    """Iterations in the place of one before the checkpoint.

    Not 1 where epochs are counted and a step had another number of samples.
    """
    loop, hub = runner.train_loop, checkpoint.get('message_hub', {})
    if not isinstance(loop, ResumableEpochLoop):
        return 1.0
    now = _samples_per_step(loop)
    position = hub.get('runtime_info', {}).get('train_position', {})
    return position.get('samples_per_step', now) / now


class ResumableEpochLoop(EpochBasedTrainLoop):
    """Loop over epochs that can be entered within one.

    Each step starts the random generators anew, see `batch_order`. What of an epoch
    is done, and whether it was validated, stands in the message hub as
    `train_position`; a checkpoint that was made before a validation that was due is
    resumed with that. With another number of samples in a step (another batch size,
    more or fewer ranks) the epoch goes on at the same sample.

    An epoch ends with a step of the optimiser: where gradients are accumulated, its
    last step is of what is left (mmengine's steps may reach into the next epoch,
    across its checkpoint and validation).

    Args:
        runner: of the run.
        dataloader: a loader or its config.
        **kwargs: as `EpochBasedTrainLoop`.
    """

    def __init__(
        self, runner: Runner, dataloader: DataLoader | dict, **kwargs: object
    ) -> None:
        super().__init__(runner, dataloader, **kwargs)
        self.batches = make_resumable(self.dataloader, seed=runner.seed)

    def run(self) -> nn.Module:
        """Train."""
        self._take_up()  # first: hooks ask where the run is
        self.runner.call_hook('before_train')
        if self.batches.start == 0:
            self._validate_if_due()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._decide_current_val_interval()
            self._validate_if_due()
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_epoch(self) -> None:
        """Go through an epoch, or the rest of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        self.batches.epoch = self._epoch
        self._begin_steps()
        for idx, data_batch in enumerate(self.dataloader, self.batches.start):
            self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: dict) -> None:
        """Train on one batch, number `idx` of the epoch."""
        seed_step(self.runner.seed, self._iter)
        _publish(
            self.runner,
            epoch=self._epoch,
            batches=idx + 1,
            samples_per_step=_samples_per_step(self),
        )
        super().run_iter(idx, data_batch)

    def _take_up(self) -> None:
        """Where to begin, in a new run or in one that was resumed."""
        position = _position(self.runner)
        # A checkpoint made between epochs belongs to the next one.
        within = position.get('epoch') == self._epoch
        done = position['batches'] if within else 0
        self.batches.start = _batches_done(self, done)
        self._begin_steps()
        if position.get('samples_per_step') not in (None, _samples_per_step(self)):
            self._iter = self._epoch * len(self.dataloader) + self.batches.start
        # Runs of MMEngine's loop have no such note; theirs count as validated.
        _publish(self.runner, validated=position.get('validated', self._epoch))

    def _begin_steps(self) -> None:
        """Count the iterations of a step from the beginning of the epoch."""
        length = len(self.dataloader)
        # Not the model: mmengine would warn of its batch norms again in each epoch.
        self.runner.optim_wrapper.initialize_count_status(
            nn.Identity(), self.batches.start % length, length
        )

    def _validate_if_due(self) -> None:
        due = self._epoch >= max(self.val_begin, 1) and (
            self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
        )
        validated = _position(self.runner)['validated'] == self._epoch
        if self.runner.val_loop is not None and due and not validated:
            # Before it: what the hooks save at its end has been validated.
            _publish(self.runner, validated=self._epoch)
            self.runner.val_loop.run()


class _NotYet:
    """Stands for a loader where MMEngine would already start its workers."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator:
        return iter(())


class ResumableIterLoop(IterBasedTrainLoop):
    """Loop over iterations that goes on at the next batch, without loading the past.

    As `ResumableEpochLoop`. A sampler that ends is started again with the next
    number of an epoch, while the workers go on.

    Args:
        runner: of the run.
        dataloader: a loader or its config.
        **kwargs: as `IterBasedTrainLoop`.
    """

    def __init__(
        self, runner: Runner, dataloader: DataLoader | dict, **kwargs: object
    ) -> None:
        BaseLoop.__init__(self, runner, dataloader)
        loader = self.dataloader
        super().__init__(runner, _NotYet(loader.dataset), **kwargs)
        self.dataloader = loader
        self.batches = make_resumable(loader, seed=runner.seed, endless=True)
        self._batches = 0

    def run(self) -> nn.Module:
        """Train."""
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        position = _position(self.runner)
        done = position.get('batches', self._iter)
        self._batches = self.batches.start = _batches_done(self, done)
        _publish(self.runner, validated=position.get('validated', self._iter))
        self._validate_if_due()
        self.dataloader_iterator = iter(self.dataloader)
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._decide_current_val_interval()
            self._validate_if_due()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_iter(self, data_batch: dict) -> None:
        """Train on one batch."""
        seed_step(self.runner.seed, self._iter)
        self._batches += 1
        _publish(
            self.runner,
            batches=self._batches,
            samples_per_step=_samples_per_step(self),
        )
        super().run_iter(data_batch)

    def _validate_if_due(self) -> None:
        due = self._iter >= max(self.val_begin, 1) and (
            self._iter % self.val_interval == 0 or self._iter == self._max_iters
        )
        validated = _position(self.runner)['validated'] == self._iter
        if self.runner.val_loop is not None and due and not validated:
            _publish(self.runner, validated=self._iter)
            self.runner.val_loop.run()
