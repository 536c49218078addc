"""Steps whose loss or gradient is not finite: not taken, counted, and explained."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.optim import Optimizer

from mmbackbones.engine.atomic_files import write_text
from mmbackbones.registry import HOOKS

__all__ = ['NanGuardHook']

_FILE = 'nonfinite_steps_rank{}.json'
_KEPT = 200  # entries in that file


@HOOKS.register_module()
class NanGuardHook(Hook):
    """Skips a step with a NaN or infinity, and stops a run that makes nothing else.

    A loss that is not finite is made to have gradients that are not, which a
    reduction carries to all ranks. Where the norm of the gradient is not finite, the
    gradients are dropped before the optimiser sees them: weights and moments stay,
    on every rank. Statistics of batch-norms go back to what they were before the
    step. The average (EMA), the schedule and the count of iterations go on.

    Each such step is logged and counted (`nonfinite_steps` in the message hub). Its
    images, loss terms, gradient norm and learning rate go to
    `<work_dir>/nonfinite_steps_rank<n>.json`, one file for each rank: the rank whose
    own loss is not finite has the cause. With a loss scaler a finite loss whose
    scaled gradient overflows is part of its search for a scale, and not recorded.

    Where gradients are accumulated, a step has several iterations. One whose loss is
    not finite spoils the step: statistics go back at once, the step is not taken, and
    it is that iteration which is recorded.

    After `patience` steps in a row the run stops. The scaler starts at 2**16 and
    halves, so that 20 steps are beyond any search.

    Reads from the device once an iteration: the norm that mmengine logs anyway (it is
    handed on as a number), or its own where nothing is clipped; before a step is
    complete, the loss.

    Priority HIGH: before the average is updated.

    Args:
        patience: steps in a row until the run is stopped.

    Raises:
        ValueError: `patience` is not positive; `patience` steps in a row were not
            finite.
    """

    priority = 'HIGH'

    def __init__(self, patience: int = 20) -> None:
        if patience < 1:
            raise ValueError(f'patience is {patience}; give 1 or more')
        self.patience = patience
        self._in_a_row = 0
        self._causes: list[dict] = []  # entries of the step under way
        self._forget_step()

    def before_train(self, runner: Runner) -> None:
        """Step between loss, clipping and optimiser."""
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapperDict):
            raise ValueError(
                f'NanGuardHook guards one optimiser, not {type(wrapper).__name__}; '
                'leave out default_hooks.nan_guard'
            )
        wrapper.update_params = self._watch_loss(wrapper, wrapper.update_params)
        if wrapper.clip_grad_kwargs:
            wrapper.clip_func = self._watch_norm(wrapper.clip_func)
        wrapper.optimizer.register_step_pre_hook(self._before_step)
        self._statistics = _statistics(runner.model)
        self._backup = [tensor.clone() for tensor in self._statistics]

    def before_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
    ) -> None:
        """Remember what the forward pass will change."""
        if self._statistics:
            torch._foreach_copy_(self._backup, self._statistics)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Account for a step that was not taken."""
        loss, norm, skipped = self._loss, self._norm, self._skipped
        self._forget_step()
        entry = partial(self._entry, runner, loss, data_batch, outputs)
        if not runner.optim_wrapper.should_update():
            if isinstance(loss, Tensor) and not loss.isfinite():
                self._restore_statistics()
                self._causes.append(entry())
            return
        causes, self._causes = self._causes, []
        if not skipped:
            self._in_a_row = 0
            return
        self._restore_statistics()
        self._in_a_row += 1
        if not causes or not math.isfinite(loss):
            causes.append(entry())
        for cause in causes:
            cause['grad_norm'] = str(norm)
        scale = causes[-1]['loss_scale']
        searching = scale is not None and scale >= 1
        if searching and all(math.isfinite(float(cause['loss'])) for cause in causes):
            runner.logger.info(
                f'Iteration {runner.iter + 1}: gradient overflow, step skipped, loss '
                f'scale now {scale:g}'
            )
        else:
            self._record(runner, causes)
        if self._in_a_row >= self.patience:
            raise ValueError(self._diagnosis(runner, causes[-1]))

    def after_train(self, runner: Runner) -> None:
        """Say how often it happened."""
        total = runner.message_hub.runtime_info.get('nonfinite_steps', 0)
        if total:
            runner.logger.warning(
                f'{total} steps had a non-finite loss or gradient and were skipped; '
                f'their images are in {_path(runner)}'
            )

    def _forget_step(self) -> None:
        self._loss: Tensor | float = math.nan
        self._norm: float | None = None
        self._stepped = False
        self._skipped = False

    def _restore_statistics(self) -> None:
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._backup)

    def _entry(
        self,
        runner: Runner,
        loss: Tensor | float,
        data_batch: object,
        outputs: Mapping | None,
    ) -> dict:
        """What is recorded of this iteration."""
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        return dict(
            iteration=runner.iter + 1,
            epoch=runner.epoch + 1,
            loss=str(float(loss)),
            not_finite=_not_finite(outputs or {}),
            lr=runner.optim_wrapper.get_lr(),
            loss_scale=None if scaler is None else scaler.get_scale(),
            images=_names(data_batch),
        )

    def _watch_loss(self, wrapper: OptimWrapper, update: Callable) -> Callable:
        def update_params(loss: Tensor, *args: object, **kwargs: object) -> None:
            self._loss = loss.detach()
            factor = torch.where(self._loss.isfinite(), 1.0, math.nan)
            update(loss * factor.to(loss.dtype), *args, **kwargs)
            # A scaler may have left out the step.
            self._skipped |= wrapper.should_update() and not self._stepped

        return update_params

    def _watch_norm(self, clip: Callable) -> Callable:
        def clip_func(*args: object, **kwargs: object) -> Tensor | None:
            norm = clip(*args, **kwargs)
            if norm is None:  # clipped by value
                return None
            self._norm = float(norm)
            return torch.tensor(self._norm)  # on the CPU, for the log

        return clip_func

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._stepped = True
        if self._norm is None:
            self._norm = _total_norm(optimizer)
        if not math.isfinite(self._norm):
            self._skipped = True
            optimizer.zero_grad(set_to_none=True)  # nothing is left to step with

    def _record(self, runner: Runner, entries: Sequence[dict]) -> None:
        """Count a step, and note what spoilt it."""
        hub, path = runner.message_hub, _path(runner)
        total = hub.runtime_info.get('nonfinite_steps', 0) + 1
        hub.update_info('nonfinite_steps', total)
        entry = entries[-1]
        shown = ', '.join(map(str, entry['images'][:4])) or 'not known'
        runner.logger.warning(
            f'Iteration {entry["iteration"]}: loss {entry["loss"]}, gradient norm '
            f'{entry["grad_norm"]}; step skipped ({self._in_a_row} in a row, {total} '
            f'in all). Images: {shown}; more in {path.name}'
        )
        try:
            before = json.loads(path.read_text()) if path.is_file() else []
            write_text(path, json.dumps([*before, *entries][-_KEPT:], indent=1))
        except (OSError, ValueError) as error:
            runner.logger.warning(f'{path} cannot be written: {error}')

    def _diagnosis(self, runner: Runner, entry: Mapping) -> str:
        loss, norm, terms = (entry[key] for key in ('loss', 'grad_norm', 'not_finite'))
        if terms:
            cause = f'these loss terms are not finite: {", ".join(terms)}'
        elif not math.isfinite(float(loss)):
            cause = 'the loss is not finite, though its terms are'
        else:
            cause = 'the loss is finite, its gradient is not'
        return (
            f'{self.patience} steps in a row, up to iteration {runner.iter + 1}, had a '
            f'non-finite loss or gradient (loss {loss}, gradient norm {norm}): '
            f'{cause}. None of them changed the weights. Look at the images in '
            f'{_path(runner)}; '
            'if they are sound, lower the learning rate or lengthen the warm-up, or '
            'train without mixed precision (--no-amp), and resume'
        )


def _path(runner: Runner) -> Path:
    return Path(runner.work_dir, _FILE.format(get_rank()))


def _statistics(model: nn.Module) -> list[Tensor]:
    """What batch-norms learn in the forward pass."""
    tensors = {
        id(tensor): tensor
        for module in model.modules()
        for tensor in (
            getattr(module, 'running_mean', None),
            getattr(module, 'running_var', None),
        )
        if isinstance(tensor, Tensor)
    }
    return list(tensors.values())


@torch.no_grad()
def _total_norm(optimizer: Optimizer) -> float:
    """Norm of all gradients, which may still be scaled."""
    grads = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group['params']
        if parameter.grad is not None
    ]
    if not grads:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))


def _not_finite(outputs: Mapping) -> list[str]:
    return [
        name
        for name, value in outputs.items()
        if 'loss' in name and not torch.as_tensor(value).isfinite().all()
    ]


def _names(data_batch: object) -> list[str | int]:
    """What the images of a batch are called."""
    samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
    names = []
    for sample in samples or ():
        meta = getattr(sample, 'metainfo', {})
        names.append(meta.get('img_path', meta.get('img_id', 'not known')))
    return names
