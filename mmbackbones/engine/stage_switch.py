"""The final epochs of a run: weak augmentation, started from the best weights so far.

D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution
Refinement, arXiv 2410.13842.
Upstream: https://github.com/Peterande/D-FINE src/solver/det_solver.py (Apache-2.0).
Departs from the source:
- the EMA keeps its decay: upstream sets another one at the switch and lowers it at
  every retry, but its averaging never reads it, so that the published weights were
  trained without that change; `ema_momentum` makes such a change for real;
- the count of epochs is not rewound by a reload, and checkpoints are written in
  the final stage too, so that it can be resumed;
- no reload after the very last epoch, whose weights nothing would use.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from mmengine import dist
from mmengine.dataset import Compose
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmbackbones.engine.stated_lr import StatedLR
from mmbackbones.registry import HOOKS

__all__ = ['StageSwitchHook', 'change_pipeline', 'unwrap']

_BEST_FILE = 'stage1_best.pth'


@HOOKS.register_module()
class StageSwitchHook(Hook):
    """Ends strong augmentation for the last epochs and restarts from the best.

    Before epoch `max_epochs - num_final_epochs` (counted back from the runner's
    maximum, so that a changed maximum moves it):

    1. the training data set gets `pipeline`; worker processes are replaced, since
       persistent ones would go on with the old pipeline;
    2. every batch augment of the data preprocessor with an attribute `enabled`
       (multi-scale) is switched off;
    3. the best checkpoint of the first stage is loaded in full: weights, average
       and its number of updates, optimiser, loss scaler, schedulers.

    After that, as upstream does it: the first final epoch has to beat the best of
    the first stage, and each later one the best since the last reload. An epoch
    that does not is undone by another reload of the first stage's best. The first
    epoch after such a reload is always accepted. The overall best is kept by
    `CheckpointHook(save_best=...)`, untouched by reloads.

    Fires before a training epoch (switch) and after a validation (best, reload).
    The best of the first stage is written to `<work_dir>/stage1_best.pth` with its
    optimiser, which mmengine's own best checkpoint lacks. Score, file and stage
    travel in the message hub with every checkpoint: a run that is resumed before,
    at or after the switch goes on on the right side, without a second reload.
    Without an evaluation before the switch there is no best; the stage then starts
    from the current weights, with a warning.

    Priority LOW: after `EMAHook` (NORMAL), which puts the trained weights back
    after a validation, and before `CheckpointHook` (VERY_LOW), which saves the
    state of this hook.

    Args:
        num_final_epochs: length of the final stage; 0 switches the hook off.
        pipeline: configs of the transforms that the final stage trains with.
        reload_best: whether to load the best of the first stage; False leaves
            points 1 and 2 only.
        monitor: the metric that says which epoch is best; greater is better.
        ema_momentum: momentum (1 - decay) of the average in the final stage; None
            keeps the one it has.

    Raises:
        ValueError: `num_final_epochs` is negative; the train loop does not count
            epochs; the data set has no pipeline to replace.
    """

    priority = 'LOW'

    def __init__(
        self,
        num_final_epochs: int,
        pipeline: Sequence[dict],
        *,
        reload_best: bool = True,
        monitor: str = 'coco/bbox_mAP',
        ema_momentum: float | None = None,
    ) -> None:
        if num_final_epochs < 0:
            raise ValueError(
                f'num_final_epochs is {num_final_epochs}; give the number of epochs '
                'of the final stage, or 0 for none'
            )
        self.num_final_epochs = num_final_epochs
        self.pipeline = pipeline
        self.reload_best = reload_best
        self.monitor = monitor
        self.ema_momentum = ema_momentum
        self._training = False
        self._switched = False

    def before_train(self, runner: Runner) -> None:
        """Take up the state of a resumed run."""
        if self.num_final_epochs and not isinstance(
            runner.train_loop, EpochBasedTrainLoop
        ):
            raise ValueError(
                'StageSwitchHook counts epochs, but the train loop is '
                f'{type(runner.train_loop).__name__}; use EpochBasedTrainLoop, or '
                'num_final_epochs=0'
            )
        self._training = True
        if 'stage_switch' not in runner.message_hub.runtime_info:
            # best_*: of stage 1; attempt_score: what a final epoch has to beat.
            self._update(
                runner,
                final=False,
                best_score=None,
                best_file=None,
                attempt_score=None,
            )

    def after_train(self, runner: Runner) -> None:
        """Validations outside training are not counted."""
        self._training = False

    def before_train_epoch(self, runner: Runner) -> None:
        """Switch stages where it is time."""
        if runner.epoch < runner.max_epochs - self.num_final_epochs:
            if self._state(runner)['final']:  # resumed with a later end
                self._update(runner, final=False)
            return
        if self.num_final_epochs == 0:
            return
        if not self._switched:
            self._switch(runner)
            self._switched = True
        if not self._state(runner)['final']:
            self._update(
                runner, final=True, attempt_score=self._state(runner)['best_score']
            )
            if self.reload_best:
                self._reload(runner)

    def after_val_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Keep the best of stage 1; undo a final epoch that did not improve."""
        if not (self._training and self.num_final_epochs and self.reload_best):
            return
        if self.monitor not in (metrics or {}):
            runner.logger.warning(
                f'StageSwitchHook.monitor {self.monitor!r} is not among the metrics '
                f'{sorted(metrics or {})}: this epoch cannot become the best'
            )
            return
        score = float(metrics[self.monitor])
        state = self._state(runner)
        best = state['best_score']
        if state['final']:
            self._judge_final_epoch(runner, score, state['attempt_score'])
        elif not math.isnan(score) and (best is None or score > best):
            self._save_best(runner, score)

    def _state(self, runner: Runner) -> dict:
        return runner.message_hub.get_info('stage_switch')

    def _update(self, runner: Runner, **changes: float | str | bool | None) -> None:
        state = runner.message_hub.runtime_info.get('stage_switch', {})
        runner.message_hub.update_info('stage_switch', {**state, **changes})

    def _switch(self, runner: Runner) -> None:
        """Weak augmentation from here on, in this process and in new workers."""
        change_pipeline(runner.train_dataloader, self.pipeline)
        model = unwrap(runner.model)
        augments = getattr(model.data_preprocessor, 'batch_augments', None) or ()
        stopped = [augment for augment in augments if hasattr(augment, 'enabled')]
        for augment in stopped:
            augment.enabled = False
        if self.ema_momentum is not None:
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.ema_model.momentum = self.ema_momentum
        runner.logger.info(
            f'Final stage: epochs {runner.epoch + 1} to {runner.max_epochs} with '
            f'{len(self.pipeline)} transforms; stopped: '
            f'{[type(augment).__name__ for augment in stopped] or "no batch augment"}'
        )

    def _save_best(self, runner: Runner, score: float) -> None:
        path = str(Path(runner.work_dir) / _BEST_FILE)
        # Rank 0 alone knows whether its disk had the space (mmengine's Runner: None).
        written = [_save(runner, _BEST_FILE) is not False]
        dist.broadcast_object_list(written)
        if written[0]:  # else the former best stands, in the file and here
            self._update(runner, best_score=score, best_file=path)

    def _judge_final_epoch(
        self, runner: Runner, score: float, to_beat: float | None
    ) -> None:
        if to_beat is None or score > to_beat:
            self._update(runner, attempt_score=score)
        else:
            self._update(runner, attempt_score=None)
            if runner.epoch < runner.max_epochs:
                runner.logger.info(
                    f'{self.monitor} {score:.4f} is not above {to_beat:.4f}: back to '
                    'the best of the first stage'
                )
                self._reload(runner)
        # This epoch's checkpoint was written before its validation; a run that is
        # resumed from it must know how that ended.
        last = runner.message_hub.runtime_info.get('last_ckpt')
        if last and Path(last).name == f'epoch_{runner.epoch}.pth':
            _save(runner, Path(last).name)

    def _reload(self, runner: Runner) -> None:
        """Load the best of stage 1 in full; epoch and iteration go on counting."""
        checkpoint, reason = self._read_best(runner)
        if checkpoint is None:
            runner.logger.warning(
                f'The best checkpoint of the first stage cannot be reloaded: {reason}. '
                'The final stage goes on from the current weights'
            )
            return
        resume, runner._resume = runner._resume, True  # hooks restore, not just load
        runner.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        runner._resume = resume
        unwrap(runner.model).load_state_dict(checkpoint['state_dict'])
        stated = StatedLR(runner)
        runner.optim_wrapper.load_state_dict(checkpoint['optimizer'])
        schedulers = runner.param_schedulers or ()
        states = checkpoint.get('param_schedulers', ())
        for scheduler, state in zip(schedulers, states, strict=False):
            scheduler.load_state_dict(state)
        stated.restore(checkpoint)
        runner.logger.info(
            'Reloaded the best of the first stage: epoch '
            f'{checkpoint["meta"]["epoch"]}, {self.monitor} '
            f'{self._state(runner)["best_score"]:.4f}'
        )

    def _read_best(self, runner: Runner) -> tuple[dict | None, str]:
        """The checkpoint, or None and why; the same on every rank."""
        dist.barrier()  # rank 0 may still be writing it
        recorded = self._state(runner)['best_file']
        checkpoint, reason = None, f'no evaluation before it gave {self.monitor!r}'
        if recorded is not None:
            path = Path(recorded)
            if not path.is_file():  # the work dir has moved
                path = Path(runner.work_dir) / _BEST_FILE
            try:
                checkpoint = CheckpointLoader.load_checkpoint(
                    str(path), map_location='cpu'
                )
            except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
                reason = f'{path} cannot be read ({error})'
        readable = torch.tensor(int(checkpoint is not None))
        dist.all_reduce(readable, 'min')
        if not readable:
            return None, reason
        return checkpoint, ''


def _save(runner: Runner, name: str) -> bool | None:
    return runner.save_checkpoint(
        runner.work_dir,
        name,
        meta=dict(epoch=runner.epoch, iter=runner.iter),
        by_epoch=False,
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, of one that is wrapped for distributed training."""
    return model.module if is_model_wrapper(model) else model


def change_pipeline(loader: DataLoader, pipeline: Sequence[dict]) -> None:
    """Give a loader's data set another pipeline, in this process and in workers.

    Raises:
        ValueError: the data set has no pipeline to replace.
    """
    _replace_pipeline(loader.dataset, pipeline)
    if isinstance(loader, DataLoader):
        loader._iterator = None  # persistent workers hold the old pipeline


def _replace_pipeline(dataset: Dataset, pipeline: Sequence[dict]) -> None:
    """Give a data set, or those that it wraps, another pipeline."""
    if hasattr(dataset, 'datasets'):
        for wrapped in dataset.datasets:
            _replace_pipeline(wrapped, pipeline)
    elif hasattr(dataset, 'pipeline'):
        dataset.pipeline = Compose(pipeline)
    elif hasattr(dataset, 'dataset'):
        _replace_pipeline(dataset.dataset, pipeline)
    else:
        raise ValueError(
            f'{type(dataset).__name__} has no pipeline that StageSwitchHook could '
            'replace'
        )
