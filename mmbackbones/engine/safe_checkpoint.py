"""When checkpoints are made, which are kept, and what happens on a full disk."""

from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmbackbones.engine.atomic_files import (
    POINTER,
    is_whole,
    iterations_of,
    newest_first,
    partial_path,
    write_text,
)
from mmbackbones.engine.disk_space import warn_of_full_disk
from mmbackbones.engine.train_loops import step_is_complete
from mmbackbones.registry import HOOKS

__all__ = ['SafeCheckpointHook']

_ROLLING = 'resume_{}.pth'
_ROLLING_KEPT = 2  # the newest, and one in case that it is damaged


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """Saves at epochs, every so many iterations between them, and the best.

    As mmengine's, with these differences:

    - `iter_interval`: a state to resume from, `resume_<iteration>.pth`, beside the
      checkpoints that stay; the last two of these are kept;
    - an old file is removed when its successor is written, not before;
    - a write that fails (`SafeRunner` says so) is made up for at the next occasion;
      if the disk is full, a damaged one of several states, or the oldest, is given
      up for it;
    - what is due while gradients are accumulated is saved after the step;
    - `last_checkpoint` is replaced at once;
    - hooks that have a method `before_saving(runner)` are called before a state is
      saved, by all ranks (`before_save_checkpoint` may be by the first alone, where a
      write is made up for);
    - before training, what the checkpoints will need is compared with the space
      there is.

    Fires after iterations, epochs and validations. Its state (which files are kept,
    which is best) stands in the message hub, as mmengine's does.

    Args:
        interval: epochs, or iterations, between checkpoints that stay.
        by_epoch: what `interval` counts.
        iter_interval: iterations between states to resume from; 0 for none.
        max_keep_ckpts: how many of the checkpoints of `interval` are kept; -1 for
            all of them.
        **kwargs: as `CheckpointHook`.

    Raises:
        ValueError: `iter_interval` is negative; a metric of `save_best` that the
            evaluation does not give.
        OSError: the end of training could not be saved.
    """

    def __init__(
        self,
        interval: int = 1,
        by_epoch: bool = True,
        *,
        iter_interval: int = 1000,
        max_keep_ckpts: int = 3,
        **kwargs: object,
    ) -> None:
        if iter_interval < 0:
            raise ValueError(
                f'iter_interval is {iter_interval}; give a number of iterations, or 0 '
                'for no states between checkpoints'
            )
        super().__init__(interval, by_epoch, max_keep_ckpts=max_keep_ckpts, **kwargs)
        self.iter_interval = iter_interval
        self._saved_iter: int | None = None
        self._failed = False
        self._checkpoint_due = self._state_due = False

    def before_train(self, runner: Runner) -> None:
        """Find the folder, clear what a kill left there, look at its space."""
        super().before_train(runner)
        if is_main_process() and '://' not in str(self.out_dir):
            for leftover in Path(self.out_dir).glob(partial_path('*.pth').name):
                leftover.unlink(missing_ok=True)
            num_states = max(self.max_keep_ckpts, 1)
            num_states += _ROLLING_KEPT if self.iter_interval else 0
            warn_of_full_disk(
                runner, self.out_dir, num_states, len(self.save_best or ())
            )

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Save where an interval ends, or when the step that it ends in is complete."""
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if self.iter_interval and self.every_n_train_iters(runner, self.iter_interval):
            self._state_due = True
        if not step_is_complete(runner):
            return
        checkpoint_due, state_due = self._checkpoint_due, self._state_due
        self._checkpoint_due = self._state_due = False
        if state_due:  # first, in case that the checkpoint is that state
            runner.call_hook('before_saving')
        if checkpoint_due:
            super()._save_checkpoint(runner)
        if state_due:
            self.save_state(runner, runner.iter + 1)

    def after_train(self, runner: Runner) -> None:
        """Make up for a last checkpoint that failed."""
        if self._failed:
            step = runner.epoch if self.by_epoch else runner.iter
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            self._save_checkpoint_with_step(runner, step, meta)
        if self._failed:
            raise OSError(
                f'the state at the end of training could not be written to '
                f'{self.out_dir}; the last whole one is {self.last_ckpt}'
            )
        super().after_train(runner)

    def save_state(self, runner: Runner, done: int, *, again: bool = False) -> bool:
        """Save a state to resume from, unless one of this iteration has been saved.

        Args:
            runner: of the run.
            done: iterations that are done; within `after_train_iter` that is one
                more than `runner.iter`.
            again: save in any case, since a validation has come after it.

        Returns:
            Whether it is on the disk.
        """
        runner.call_hook('before_saving')
        if self._saved_iter == done and not again:
            return True
        meta = dict(epoch=runner.epoch, iter=done)
        saved = self._write(runner, _ROLLING.format(done), meta)
        if saved and is_main_process():
            for path in self._by_age(done, _ROLLING.format('*'))[:-_ROLLING_KEPT]:
                path.unlink(missing_ok=True)
        return saved

    def _by_age(self, done: int, *patterns: str) -> list[Path]:
        """Checkpoints in the folder, the oldest first.

        Before these come such as are ahead of this run, `done` iterations long: left
        by another one, since when it was taken up again at an earlier state.
        """
        found = {p for pattern in patterns for p in Path(self.out_dir).glob(pattern)}
        oldest_first = list(newest_first(found))[::-1]
        return sorted(oldest_first, key=lambda path: iterations_of(path) <= done)

    def _write(self, runner: Runner, name: str, meta: dict) -> bool:
        """Save under a name and point to it."""
        hub = runner.message_hub
        before = hub.runtime_info.get('last_ckpt')
        path = self.file_backend.join_path(self.out_dir, name)
        hub.update_info('last_ckpt', path)

        def save() -> bool:
            saved = runner.save_checkpoint(
                self.out_dir,
                name,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=dict(meta),
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            return saved is not False  # mmengine's Runner says nothing

        self._failed = not (
            save() or (self._make_room(runner, meta['iter']) and save())
        )
        if self._failed:
            hub.update_info('last_ckpt', before)
            return False
        self.last_ckpt = path
        self._saved_iter = meta['iter']
        if is_main_process():
            try:
                write_text(Path(runner.work_dir, POINTER), path)
            except OSError as error:
                runner.logger.error(f'{POINTER} could not be written: {error}')
        return True

    def _make_room(self, runner: Runner, done: int) -> bool:
        """Give up a state where the disk is full and another is kept."""
        if not getattr(runner, 'disk_is_full', False):
            return False
        patterns = self.filename_tmpl.format('*'), _ROLLING.format('*')
        states = self._by_age(done, *patterns)
        if len(states) < 2:
            return False
        # All of them are read for it; seldom, and the whole one may be the oldest.
        least = next((path for path in states if not is_whole(path)), states[0])
        runner.logger.warning(f'The disk is full: gives up {least}')
        least.unlink(missing_ok=True)
        return True

    def _save_checkpoint(self, runner: Runner) -> None:
        if self.by_epoch:
            super()._save_checkpoint(runner)
        else:
            self._checkpoint_due = True

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        hub = runner.message_hub
        before = list(getattr(self, 'keep_ckpt_ids', ()))
        kept = [other for other in before if other != step] + [step]
        outdated = kept[: -self.max_keep_ckpts] if self.max_keep_ckpts > 0 else []
        kept = kept[len(outdated) :]
        if self.max_keep_ckpts > 0:
            hub.update_info('keep_ckpt_ids', kept)
        if not self._write(runner, self.filename_tmpl.format(step), meta):
            hub.update_info('keep_ckpt_ids', before)
            return
        self.keep_ckpt_ids = kept
        if is_main_process():
            for other in outdated:
                self._remove(self.filename_tmpl.format(other))

    def _remove(self, name: str) -> None:
        path = self.file_backend.join_path(self.out_dir, name)
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        # `runner.val()` on its own: no training, whose state could be the best.
        if not self.save_best or not hasattr(self, 'file_backend'):
            return
        if 'auto' in self.key_indicators:
            self._init_rule(self.rules, [next(iter(metrics))])
        pairs = zip(self.key_indicators, self.rules, strict=True)
        # All of them, whichever is better.
        improved = [self._save_if_best(runner, *pair, metrics) for pair in pairs]
        if any(improved) and not step_is_complete(runner):
            self._checkpoint_due = True
        elif any(improved) and self.last_ckpt is not None:
            # Again, so that a resumed run knows the best.
            step = runner.epoch if self.by_epoch else runner.iter
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            self._save_checkpoint_with_step(runner, step, meta)

    def _save_if_best(
        self, runner: Runner, metric: str, rule: str, metrics: dict
    ) -> bool:
        if metric not in metrics:
            raise ValueError(
                f'save_best is {metric!r}, which is not among the metrics '
                f'{sorted(metrics)}'
            )
        hub, score = runner.message_hub, metrics[metric]
        suffix = '' if len(self.key_indicators) == 1 else f'_{metric}'
        keys = f'best_score{suffix}', f'best_ckpt{suffix}'
        best, former = (hub.runtime_info.get(key) for key in keys)
        best = self.init_value_map[rule] if best is None else best
        if score is None or not self.is_better_than[metric](score, best):
            return False
        step = runner.epoch if self.by_epoch else runner.iter
        name = f'best_{metric}_{self.filename_tmpl.format(step)}'.replace('/', '_')
        path = self.file_backend.join_path(self.out_dir, name)
        hub.update_info(keys[0], score)
        hub.update_info(keys[1], path)
        saved = runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=False,
            save_param_scheduler=False,
            meta=dict(epoch=runner.epoch, iter=runner.iter),
            by_epoch=False,
            backend_args=self.backend_args,
        )
        if saved is False:
            hub.update_info(keys[0], best)
            hub.update_info(keys[1], former)
            return False
        unit = 'epoch' if self.by_epoch else 'iteration'
        runner.logger.info(
            f'Best so far, {metric} {score:.4f} at {unit} {step}: {name}'
        )
        if former and former != path and is_main_process():
            self._remove(Path(former).name)
        return True
