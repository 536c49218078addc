"""Clipping by the norm of all gradients, within the optimiser's own pass over them.

Upstream: `torch.nn.utils.clip_grad_norm_` (BSD-3-Clause).
Departs from the source:
- gradients are not scaled in a pass of their own: a fused optimiser divides by
  `grad_scale` as it reads them, and leaves them clipped behind.
"""

from collections.abc import Sequence

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

__all__ = ['FusedClip', 'fuse_clipping']


class FusedClip:
    """`clip_grad_norm_` in the 2-norm, completed by the next step of an optimiser.

    Args:
        optimizer: fused, of torch; its parameters are on one device.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        optimizer.register_step_post_hook(_forget_scale)

    @torch.no_grad()
    def __call__(
        self, parameters: Sequence[nn.Parameter], max_norm: float, **_: float
    ) -> Tensor:
        """The norm before clipping; reads nothing from the device."""
        norms = torch._foreach_norm([parameter.grad for parameter in parameters])
        norm = torch.linalg.vector_norm(torch.stack(norms))
        self._optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)
        return norm


def _forget_scale(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """What follows a step of its own accord has a scale of its own."""
    if hasattr(optimizer, 'grad_scale'):
        del optimizer.grad_scale


def fuse_clipping(wrapper: OptimWrapper) -> None:
    """Let a wrapper clip so, where that is the same.

    In full precision with a fused Adam or AdamW, clipped by the 2-norm. A loss scaler
    needs the scale for itself.
    """
    optimizer, options = wrapper.optimizer, wrapper.clip_grad_kwargs or {}
    if (
        type(wrapper) is OptimWrapper
        and isinstance(optimizer, Adam)
        and optimizer.defaults.get('fused')
        and set(options) <= {'max_norm', 'norm_type'}
        and 'max_norm' in options
        and options.get('norm_type', 2) == 2
    ):
        wrapper.clip_func = FusedClip(optimizer)
