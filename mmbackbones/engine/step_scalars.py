"""Loss terms for the log, read from the device together.

Upstream: `mmengine.hooks.RuntimeInfoHook` (Apache-2.0).
Departs from the source:
- one read a step; mmengine reads each of D-FINE's up to 68 terms on its own.
"""

import torch
from mmengine.hooks import RuntimeInfoHook
from mmengine.runner import Runner
from torch import Tensor

from mmbackbones.registry import HOOKS

__all__ = ['StepScalarsHook']


@HOOKS.register_module()
class StepScalarsHook(RuntimeInfoHook):
    """mmengine's `RuntimeInfoHook`, to be `default_hooks.runtime_info`.

    After each training iteration every value that the model returned is in the
    message hub as a number, as with mmengine's. Keeps no state. Priority VERY_HIGH,
    as there.
    """

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Note the values of this iteration."""
        values = dict(outputs or {})
        tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        if tensors:
            stacked = torch.stack([v.detach().double().sum() for v in tensors.values()])
            values |= zip(tensors, stacked.cpu().tolist(), strict=True)
        for name, value in values.items():
            runner.message_hub.update_scalar(f'train/{name}', value)
