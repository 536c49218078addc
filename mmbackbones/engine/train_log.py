"""A training log that stays short: on the screen and in memory."""

import re
import sys

from mmengine.hooks import Hook
from mmengine.registry import LOG_PROCESSORS
from mmengine.runner import LogProcessor, Runner

from mmbackbones.registry import HOOKS

try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = ['CompactLogProcessor', 'LogHistoryHook']


@LOG_PROCESSORS.register_module()
class CompactLogProcessor(LogProcessor):
    """Prints the losses of the last layer, and how fast training is.

    D-FINE has up to 68 loss terms, of which those of the other layers, of the
    encoder and of the denoising queries (`loss_vfl_aux_0`, ..., `loss_giou_dn_pre`)
    are left out of the line; the log files have all of them. Epoch, learning rate,
    ETA, time and gradient norm are mmengine's. In place of the time that was spent
    waiting for data stands its share of the time (`data_wait`), then the images of
    all processes in a second (`images/s`) and memory: the most that tensors took on
    the GPU or, without one, that this process took; in MB (2**20 bytes).

    The log files have `data_wait` as a fraction, `images_per_s` and `memory`.

    Args:
        window_size: values that are averaged.
        by_epoch: whether epochs are counted, or iterations.
    """

    def __init__(self, window_size: int = 50, by_epoch: bool = True) -> None:
        super().__init__(window_size=window_size, by_epoch=by_epoch)

    def get_log_after_iter(
        self, runner: Runner, batch_idx: int, mode: str
    ) -> tuple[dict, str]:
        """All values for the log files, and the line to print."""
        tag, line = super().get_log_after_iter(runner, batch_idx, mode)
        line = re.sub(r'  loss_\w+_(aux|dn|enc|pre)\w*: \S+', '', line)
        if mode == 'train' and 'data_time' in tag and tag['time'] > 0:
            line = re.sub(r'data_time: \S+', self._add_speed(runner, tag), line)
        return tag, line

    @staticmethod
    def _add_speed(runner: Runner, tag: dict) -> str:
        """Put the values in `tag`; their part of the line."""
        tag['data_wait'] = tag['data_time'] / tag['time']
        parts = [f'data_wait: {tag["data_wait"]:.0%}']
        loader = runner.train_dataloader
        batch_size = getattr(loader.batch_sampler, 'batch_size', None)
        if batch_size is not None:
            tag['images_per_s'] = batch_size * runner.world_size / tag['time']
            parts.append(f'images/s: {tag["images_per_s"]:.1f}')
        if 'memory' not in tag and resource is not None:
            # Linux counts in KB, macOS in bytes.
            unit = 2**20 if sys.platform == 'darwin' else 2**10
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            tag['memory'] = peak // unit
            parts.append(f'memory: {tag["memory"]}')
        return '  '.join(parts)


@HOOKS.register_module()
class LogHistoryHook(Hook):
    """Bounds the history of each scalar in the message hub.

    MMEngine keeps every value of every logged scalar, and copies the whole array at
    each step: at the end of D-FINE-L's COCO schedule (75 scalars, 296,000 steps)
    that is 80 ms of CPU a step, and 350 MB in every checkpoint. What it prints needs
    the last window only, and what was printed is in the log files.

    Fires when training starts and every `max_length` iterations after that, so that
    a history never exceeds twice that length. Keeps no state.

    Args:
        max_length: values to keep; at least the window of the `log_processor`.

    Raises:
        ValueError: `max_length` is not positive.
    """

    def __init__(self, max_length: int = 1000) -> None:
        if max_length < 1:
            raise ValueError(f'max_length is {max_length}; give 1 or more')
        self.max_length = max_length

    def before_train(self, runner: Runner) -> None:
        """Bound what a resumed run brings along."""
        self._bound(runner)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Bound the histories that have come up since."""
        if self.every_n_train_iters(runner, self.max_length):
            self._bound(runner)

    def _bound(self, runner: Runner) -> None:
        # Each history is cut at its next value.
        for history in runner.message_hub.log_scalars.values():
            history.max_length = self.max_length
