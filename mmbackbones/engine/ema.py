"""Exponential moving average of a model, with the ramp that D-FINE trains with.

D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution
Refinement, arXiv 2410.13842.
Upstream: https://github.com/Peterande/D-FINE src/optim/ema.py (Apache-2.0), itself
after timm's ModelEma.
Departs from the source:
- two entries that are one tensor are averaged once, not twice;
- the loop over tensors is one fused call.
"""

import math
from itertools import islice, takewhile

import torch
from mmengine.hooks import EMAHook
from mmengine.model import BaseAveragedModel, is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmbackbones.engine.train_loops import step_is_complete
from mmbackbones.registry import HOOKS, MODELS

__all__ = ['RampEMA', 'RampEMAHook']

_MUCH = 0.3  # of the start in the average at the end

_Slot = tuple[dict[str, Tensor | None], str]


@MODELS.register_module()
class RampEMA(BaseAveragedModel):
    """Averaged copy of a model.

    Update number t = 1, 2, ... sets every floating parameter and buffer to
    `d(t) * average + (1 - d(t)) * model` with
    `d(t) = (1 - momentum) * (1 - exp(-t / warmup_iters))`. The very first update
    follows the same formula (mmengine's own averages copy there). Batch-norm
    statistics are averaged; integer and boolean entries (batch counters, masks)
    keep the value they had when the copy was made, as in the original.

    Args:
        model: to be averaged; it is copied.
        momentum: 1 - decay; 1e-4 is the published decay 0.9999.
        warmup_iters: time constant of the ramp in updates; 0 for a constant decay.

    Raises:
        ValueError: `momentum` is not in (0, 1), or `warmup_iters` is negative.
    """

    def __init__(
        self, model: nn.Module, momentum: float = 1e-4, warmup_iters: int = 1000
    ) -> None:
        if not 0 < momentum < 1:
            raise ValueError(
                f'momentum is {momentum}; give 1 - decay, between 0 and 1 '
                '(1e-4 for a decay of 0.9999)'
            )
        if warmup_iters < 0:
            raise ValueError(f'warmup_iters is {warmup_iters}; give 0 or more')
        # With buffers, so that EMAHook swaps them too for validation.
        super().__init__(model, update_buffers=True)
        self.momentum = momentum
        self.warmup_iters = warmup_iters
        self._averaged = _floating_slots(self.module)
        self._source: list[_Slot] = []
        self._source_id: int | None = None

    def momentum_at(self, update: int) -> float:
        """Weight `1 - d(t)` that the model has in update number t = 1, 2, ..."""
        if self.warmup_iters == 0:
            return self.momentum
        return 1 + (1 - self.momentum) * math.expm1(-update / self.warmup_iters)

    def share_of_start(self, updates: int) -> float:
        """How much of the average is the model it began with, after some updates."""
        if self.warmup_iters == 0:
            return (1 - self.momentum) ** updates
        first = range(1, min(updates, 10 * self.warmup_iters) + 1)
        return math.prod(1 - self.momentum_at(update) for update in first)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards `model`, which may be wrapped (DDP)."""
        if is_model_wrapper(model):
            model = model.module
        if self._source_id != id(model):
            self._source, self._source_id = _floating_slots(model), id(model)
        self.steps += 1
        # `steps` stays on the CPU: reading it does not wait for the device.
        weight = self.momentum_at(self.steps.item())
        _move(
            [table[name] for table, name in self._averaged],
            [table[name] for table, name in self._source],
            weight,
        )


@HOOKS.register_module()
class RampEMAHook(EMAHook):
    """Keeps a `RampEMA` of the model; validates, tests and saves with it.

    mmengine's `EMAHook` copies the model before its weights are initialised and
    mends that by copying again at the first update. Here the copy is renewed when
    training starts, after initialisation and loading, so that the first update can
    be an average as published. Everything else is mmengine's: the averaged weights
    are the `state_dict` of a checkpoint, the trained ones and the number of
    updates its `ema_state_dict`; resuming swaps them back. Where gradients are
    accumulated, it moves once a step of the optimiser, not at every iteration.

    Priority NORMAL: after a validation the trained weights are back before
    `StageSwitchHook` and `CheckpointHook` (LOW, VERY_LOW) save.

    Args:
        momentum: 1 - decay; 1e-4 is the published decay 0.9999.
        warmup_iters: time constant of the ramp in updates; 0 for a constant decay.
    """

    def __init__(self, momentum: float = 1e-4, warmup_iters: int = 1000) -> None:
        super().__init__(ema_type=RampEMA, momentum=momentum, warmup_iters=warmup_iters)

    def before_train(self, runner: Runner) -> None:
        """Start the average from the weights that training starts from."""
        if self.ema_model.steps == 0:
            self.ema_model.module.load_state_dict(self.src_model.state_dict())
        share = self.ema_model.share_of_start(_num_steps(runner))
        if share > _MUCH:
            runner.logger.warning(
                f'After the last step the average of weights, which is validated and '
                f'saved, will still be {share:.0%} of what training starts from: the '
                f'run is too short for momentum {self.ema_model.momentum:g}. Set '
                'default_hooks.ema.warmup_iters=1000, or train longer'
            )

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Move the average where this iteration completed a step."""
        if step_is_complete(runner):
            super().after_train_iter(runner, batch_idx, data_batch, outputs)


def _num_steps(runner: Runner) -> int:
    """Steps of the optimiser in the whole run."""
    count = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
    return runner.max_iters // count


def _move(averages: list[Tensor], sources: list[Tensor], weight: float) -> None:
    """`average += weight * (source - average)`, in place; kernels of maps first.

    On the CPU that is a step of gradient ascent along the sources with weight decay
    1, of which torch has one operator for a list: a fifth faster where most tensors
    are small. It walks the memory, so both sides must lie in it alike; what can be
    laid out in several ways (channels last) are kernels with four dimensions.
    """
    num_kernels = sum(1 for _ in takewhile(lambda x: x.ndim > 3, averages))
    pairs = zip(averages, sources, strict=True)
    if all(
        average.is_cpu
        and average.stride() == source.stride()
        and average.dtype == source.dtype
        for average, source in islice(pairs, max(num_kernels, 1))
    ):
        torch._fused_sgd_(
            averages,
            sources,
            [],
            lr=weight,
            weight_decay=1.0,
            momentum=0.0,
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
        )
    else:
        torch._foreach_lerp_(averages, sources, weight)


def _floating_slots(module: nn.Module) -> list[_Slot]:
    """Where the floating entries of the state dict hang, each tensor once.

    Those of four dimensions or more come first.

    The tables are kept rather than the tensors: moving or re-loading a module may
    put another tensor in a slot.
    """
    slots, seen = [], set()
    for child in module.modules():
        transient = child._non_persistent_buffers_set
        for table in (child._parameters, child._buffers):
            for name, tensor in table.items():
                if (
                    tensor is not None
                    and tensor.is_floating_point()
                    and name not in transient
                    and id(tensor) not in seen
                ):
                    seen.add(id(tensor))
                    slots.append((table, name))
    return sorted(slots, key=lambda slot: slot[0][slot[1]].ndim < 4)
