"""Says when training waits for its data, and how many workers to try."""

import math
import os

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmbackbones.registry import HOOKS

__all__ = ['LoaderWatchHook', 'workers_to_try']


def workers_to_try(num_workers: int, step: float, wait: float) -> int:
    """Workers that would keep up, if each goes on to work as fast as now.

    While training waits, `num_workers` workers make a batch in every `step` seconds,
    and `step - wait` would be needed. Without workers a batch takes `wait`.

    Args:
        num_workers: of a loader that cannot keep up.
        step: seconds of a training step, waiting included.
        wait: seconds of it that were spent waiting for data.
    """
    cost = num_workers * step if num_workers else wait
    wanted = cost / max(step - wait, 1e-3 * step)
    return max(math.ceil(wanted - 1e-6), num_workers + 1)


@HOOKS.register_module()
class LoaderWatchHook(Hook):
    """Warns, once in a run, when waiting for data takes a large share of the time.

    Looks at `window` steps at a time. The first step of an epoch is left out: what it
    waits for is the start of the workers, and more of them do not help. Times are
    those of `IterTimerHook`. Keeps no state.

    Priority BELOW_NORMAL: after `IterTimerHook` (NORMAL).

    Args:
        max_share: of the time, above which it warns.
        window: steps.

    Raises:
        ValueError: `max_share` is not between 0 and 1, or `window` not positive.
    """

    priority = 'BELOW_NORMAL'

    def __init__(self, max_share: float = 0.2, window: int = 50) -> None:
        if not 0 < max_share < 1:
            raise ValueError(f'max_share is {max_share}; give a share between 0 and 1')
        if window < 1:
            raise ValueError(f'window is {window}; give 1 or more')
        self.max_share = max_share
        self.window = window
        self._warned = False
        self._forget()

    def _forget(self) -> None:
        self._steps, self._time, self._wait = 0, 0.0, 0.0

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Add up a step."""
        scalars = runner.message_hub.log_scalars
        if self._warned or batch_idx == 0 or 'train/data_time' not in scalars:
            return
        self._steps += 1
        self._time += scalars['train/time'].current()
        self._wait += scalars['train/data_time'].current()
        if self._steps < self.window:
            return
        if self._wait > self.max_share * self._time:
            self._warned = True
            runner.logger.warning(self._message(runner.train_dataloader.num_workers))
        self._forget()

    def _message(self, num_workers: int) -> str:
        step, wait = self._time / self._steps, self._wait / self._steps
        wanted = workers_to_try(num_workers, step, wait)
        cores, processes = _cores(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        limit = max(cores // processes, 1)
        if wanted <= limit:
            advice = f'Try train_dataloader.num_workers={wanted}.'
        elif num_workers < limit:
            advice = (
                f'Try train_dataloader.num_workers={limit}, all the cores that there '
                f'are for a process; {wanted} would be needed.'
            )
        else:
            advice = (
                f'{wanted} would be needed, more than there are cores: use smaller '
                'image files, faster storage, or a cheaper pipeline.'
            )
        return (
            f'The loader is the bottleneck: of {step:.3f} s a step, {wait:.3f} s '
            f'({wait / step:.0%}) are spent waiting for data from {num_workers} '
            f'workers. {advice} ({cores} cores, {processes} processes here)'
        )


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
