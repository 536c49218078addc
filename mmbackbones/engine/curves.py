"""A picture of loss and accuracy beside the log, renewed after each validation."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmbackbones.registry import HOOKS

__all__ = ['CurveHook', 'Curves', 'draw_curves', 'read_curves']


@dataclass
class Curves:
    """Points of a run, by rising abscissa.

    Attributes:
        loss: `(iteration, loss)`, 1-based, averaged over the log's window.
        metrics: for each metric `(step, value)`; a step is an epoch, or an
            iteration where validation is counted so.
    """

    loss: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


def read_curves(work_dir: str | Path, iters_per_step: int = 1) -> Curves:
    """Join what all runs in a work dir have logged.

    Reads `<work_dir>/<start time>/vis_data/scalars.json`, one file for each time
    that the run was started. Where a run begins again at an earlier iteration
    (resumed from a checkpoint, or from scratch), what the former one logged from
    there on is dropped. Lines that a kill cut short are skipped.

    Args:
        work_dir: of the runner.
        iters_per_step: iterations in a step of the metrics: the length of an epoch,
            or 1 where validation is counted in iterations.
    """
    curves = Curves()
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if 'loss' in entry:
                now = entry['iter']
                if curves.loss and now <= curves.loss[-1][0]:
                    _forget(curves, now, iters_per_step)
                curves.loss.append((now, entry['loss']))
            else:
                for name, value in entry.items():
                    if name != 'step' and isinstance(value, float):
                        points = curves.metrics.setdefault(name, [])
                        points.append((entry['step'], value))
    return curves


def _forget(curves: Curves, start: int, iters_per_step: int) -> None:
    """Drop the points from iteration `start` on."""
    curves.loss = [point for point in curves.loss if point[0] < start]
    for name, points in curves.metrics.items():
        curves.metrics[name] = [p for p in points if p[0] * iters_per_step < start]


def draw_curves(
    curves: Curves, path: str | Path, *, metrics: Sequence[str], iters_per_step: int = 1
) -> None:
    """Write the loss (left) and metrics (right) of a run as a picture.

    Args:
        curves: of `read_curves`.
        path: of the picture; its suffix is the format.
        metrics: names of those to draw; others, and negative values (COCO's "there
            is nothing to measure"), are left out.
        iters_per_step: as of `read_curves`.
    """
    figure = Figure(figsize=(10, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    unit = 'iteration' if iters_per_step == 1 else 'epoch'
    points = [(i / iters_per_step, v) for i, v in curves.loss if math.isfinite(v)]
    left.plot(*_columns(points), linewidth=1)
    left.set(title='training loss', xlabel=unit)
    for name in metrics:
        points = [p for p in curves.metrics.get(name, []) if p[1] >= 0]
        if points:
            best = max(value for _, value in points)
            label = f'{name}, best {best:.3f}'
            right.plot(*_columns(points), marker='.', linewidth=1, label=label)
    right.set(title='validation', xlabel=unit)
    if right.lines:
        right.set_ylim(bottom=0)
        right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def _columns(points: list[tuple[float, float]]) -> tuple[list, list]:
    return [x for x, _ in points], [y for _, y in points]


@HOOKS.register_module()
class CurveHook(Hook):
    """Draws `curves.png` into the folder of the log.

    Fires after each validation within training and at the end of training, in some
    tenths of a second. Reads what `LoggerHook` gave to `LocalVisBackend` (mmengine's
    default), also in earlier runs in the same work dir, so that the picture of a
    resumed run is whole. Keeps no state.

    Priority VERY_LOW: after `LoggerHook` (BELOW_NORMAL) has written.

    Args:
        metrics: names of the metrics to draw.
    """

    priority = 'VERY_LOW'

    def __init__(
        self,
        metrics: Sequence[str] = (
            'coco/bbox_mAP',
            'coco/bbox_mAP_50',
            'coco/bbox_mAP_75',
        ),
    ) -> None:
        self.metrics = tuple(metrics)
        self._training = False

    def before_train(self, runner: Runner) -> None:
        """From here on there is something to draw."""
        self._training = True

    def after_val_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Renew the picture."""
        if self._training:
            self._draw(runner)

    def after_train(self, runner: Runner) -> None:
        """Renew the picture and say where it is."""
        self._draw(runner)
        self._training = False
        runner.logger.info(f'Loss and metrics: {_target(runner)}')

    @master_only
    def _draw(self, runner: Runner) -> None:
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        iters_per_step = len(runner.train_dataloader) if by_epoch else 1
        try:
            draw_curves(
                read_curves(runner.work_dir, iters_per_step),
                _target(runner),
                metrics=self.metrics,
                iters_per_step=iters_per_step,
            )
        except OSError as error:
            runner.logger.warning(f'The curves could not be drawn: {error}')


def _target(runner: Runner) -> Path:
    return Path(runner.log_dir) / 'curves.png'
