"""MMEngine's Runner, with checkpoints that are whole and loops that resume exactly."""

import errno
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.optim import OptimWrapper
from mmengine.registry import LOOPS, RUNNERS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.base_loop import BaseLoop

from mmbackbones.engine.atomic_files import (
    is_whole,
    partial_path,
    put_in_place,
    resumable,
)
from mmbackbones.engine.stated_lr import StatedLR
from mmbackbones.engine.train_loops import ResumableEpochLoop, ResumableIterLoop

__all__ = ['SafeRunner']

_SCALED = 'auto_scale_lr'  # in the message hub: the batch size that the rate is for

_RESUMABLE_LOOPS = {
    EpochBasedTrainLoop: ResumableEpochLoop,
    IterBasedTrainLoop: ResumableIterLoop,
}


@RUNNERS.register_module()
class SafeRunner(Runner):
    """The Runner of a run that cannot be lost; a config names it as `runner_type`.

    - A checkpoint, by whomever it is saved, takes its place when it is whole; a
      write that fails is said and leaves the former file.
    - `resume='auto'`, or True without `load_from`, takes the newest checkpoint of the
      work dir that is whole. Where there is none the run starts as if it were not
      given: from `load_from`, if that is stated.
    - A learning rate or schedule that was changed since a checkpoint holds, see
      `stated_lr`. A run that scales its rate by the batch size goes on doing so.
    - MMEngine's two train loops are replaced by those of `train_loops`, also where a
      config names theirs.

    Attributes:
        disk_is_full: whether the last checkpoint failed for want of space.
    """

    disk_is_full = False
    _resumed: dict | None = None  # the checkpoint, while it is taken up

    @classmethod
    def from_cfg(cls, cfg: dict) -> Runner:
        """Build from a config; the copy in the work dir keeps `runner_type`."""
        cfg.setdefault('runner_type', f'{cls.__module__}.{cls.__qualname__}')
        return super().from_cfg(cfg)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the loop of a config, one that resumes where there is one."""
        if isinstance(loop, dict):
            loop = loop.copy()
            if 'type' in loop:
                kind = loop['type']
                kind = LOOPS.get(kind) if isinstance(kind, str) else kind
            else:
                by_epoch = loop.pop('by_epoch')
                kind = EpochBasedTrainLoop if by_epoch else IterBasedTrainLoop
            loop['type'] = _RESUMABLE_LOOPS.get(kind, kind)
        return super().build_train_loop(loop)

    def save_checkpoint(
        self, out_dir: str, filename: str, *args: object, **kwargs: object
    ) -> bool | None:
        """Save a checkpoint, as `Runner.save_checkpoint` does, but all or nothing.

        Returns:
            On the main process whether it was saved, elsewhere None. A failure is
            logged as an error and is no exception, so that training can go on.
        """
        if '://' in str(out_dir):  # an object store puts a file in place at once
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return True
        target = Path(out_dir, filename)
        partial = partial_path(target)
        try:
            super().save_checkpoint(out_dir, partial.name, *args, **kwargs)
            if not is_main_process():
                return None
            put_in_place(target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            self.disk_is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            self.logger.error(
                f'Checkpoint {target} could NOT be written ({error}); the ones '
                'before it are untouched'
            )
            return False
        self.disk_is_full = False
        return True

    def scale_lr(
        self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None
    ) -> None:
        """Scale rates by the batch size, as `Runner` does, and note that."""
        super().scale_lr(optim_wrapper, auto_scale_lr)
        if auto_scale_lr and auto_scale_lr.get('enable', False):
            self.message_hub.update_info(_SCALED, auto_scale_lr['base_batch_size'])

    def resume(self, *args: object, **kwargs: object) -> None:
        """Take up a checkpoint, as `Runner` does, at the stated learning rate."""
        info = self.message_hub.runtime_info
        stated, scaled = StatedLR(self), info.get(_SCALED)
        super().resume(*args, **kwargs)
        if scaled:
            self.message_hub.update_info(_SCALED, scaled)
        elif _SCALED in info:
            stated.scale(self._scale_for(info[_SCALED]))
        checkpoint, self._resumed = self._resumed, None
        if checkpoint is not None:
            stated.restore(checkpoint)

    def _scale_for(self, base_batch_size: int) -> float:
        """Factor on the learning rate; that it is applied is said."""
        loader = self._train_dataloader
        size = loader['batch_size'] if isinstance(loader, dict) else loader.batch_size
        factor = size * self.world_size / base_batch_size
        self.logger.info(
            'The run was begun with --auto-scale-lr and goes on like that: the stated '
            f'learning rate is multiplied by {factor:g}, {size * self.world_size} '
            f'samples in a step over {base_batch_size}'
        )
        return factor

    def load_checkpoint(self, filename: str, *args: object, **kwargs: object) -> dict:
        """Load weights, as `Runner.load_checkpoint` does; to resume, also the rest.

        Raises:
            ValueError: a run is to be resumed from a file that holds weights only.
        """
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        if self._resume:
            self._check_is_state(filename, checkpoint)
            self._resumed = checkpoint
        return checkpoint

    def _check_is_state(self, filename: str, checkpoint: dict) -> None:
        parts = {**checkpoint, **checkpoint.get('meta', {})}
        lacks = [
            key
            for key in ('epoch', 'iter', 'message_hub', 'optimizer')
            if key not in parts
        ]
        if lacks == ['optimizer'] and not any(
            getattr(hook, 'save_optimizer', False) for hook in self.hooks
        ):
            self.logger.warning(f'{filename} has no optimizer, which starts anew')
        elif lacks:
            raise ValueError(
                f'checkpoint {filename!r} is not one to resume from, it lacks '
                f'{", ".join(lacks)}: it holds weights for use (as best_*.pth do). '
                'Resume from an epoch_*.pth or resume_*.pth of the run, or start a new '
                f'run from its weights with --cfg-options load_from={filename}'
            )

    def load_or_resume(self) -> None:
        """Load what the config says, or find the checkpoint to go on from."""
        finds = self._resume == 'auto' or (self._resume and self._load_from is None)
        if finds and not self._has_loaded:
            found = [self._newest_whole() if is_main_process() else None]
            broadcast_object_list(found)
            if isinstance(found[0], str):
                raise ValueError(found[0])
            if found[0] is None:
                self.logger.warning(
                    f'No checkpoint to resume from in {self.work_dir}: training '
                    'starts at the beginning'
                )
                self._resume = False
            else:
                self.logger.info(f'Resumes from {found[0]}')
                self.resume(str(found[0]))
        super().load_or_resume()

    def _newest_whole(self) -> Path | str | None:
        """Path of the checkpoint, None where there is none, or what is wrong."""
        damaged = []
        for path in resumable(self.work_dir):
            if is_whole(path):
                for other in damaged:
                    self.logger.warning(
                        f'Checkpoint {other} is truncated, damaged or gone: takes the '
                        f'one before it, {path}'
                    )
                return path
            damaged.append(path)
        if damaged:
            return (
                f'none of the checkpoints in {self.work_dir!r} can be read: '
                f'{", ".join(path.name for path in damaged)}. Remove them to start at '
                'the beginning, or name a file to resume from'
            )
        return None
