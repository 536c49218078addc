"""Clipping by the norm of all gradients, within the optimiser's own pass over them.

Upstream: `torch.nn.utils.clip_grad_norm_` (BSD-3-Clause).
Departs from the source:
- gradients are not scaled in a pass of their own: a fused optimiser divides by
  `grad_scale` as it reads them, and leaves them clipped behind.
"""

from collections.abc import Sequence
from functools import partial

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from mmbackbones.engine.listed_adamw import ListedAdamW, list_tensors

__all__ = ['FusedClip', 'fuse_clipping']

_SHORT = 4096  # elements


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
    ) -> Tensor | None:
        """The norm before clipping; reads nothing from the device.

        A `ListedAdamW` lists the gradients itself, whatever `parameters` are.
        """
        if isinstance(self._optimizer, ListedAdamW):
            grads = self._optimizer.gather()
        else:
            grads = [parameter.grad for parameter in parameters]
        if not grads:
            return None
        norm = _total_norm(grads)
        self._optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)
        return norm


def _total_norm(grads: list[Tensor]) -> Tensor:
    """2-norm of all; short vectors, most of a model's tensors, are joined first."""
    short, rest = [], []
    for grad in grads:
        is_short = grad.ndim == 1 and len(grad) <= _SHORT
        (short if is_short else rest).append(grad)
    if short:
        rest.append(torch.cat(short))
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(rest)))


def _forget_scale(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """What follows a step of its own accord has a scale of its own."""
    if hasattr(optimizer, 'grad_scale'):
        del optimizer.grad_scale


def fuse_clipping(wrapper: OptimWrapper) -> None:
    """Let a wrapper clip and step so, where that is the same; before any step.

    In full precision with a fused Adam or AdamW, clipped by the 2-norm. A loss scaler
    needs the scale for itself. A fused AdamW becomes a `ListedAdamW` in any case.
    """
    wrapper.optimizer = list_tensors(wrapper.optimizer)
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
        if isinstance(optimizer, ListedAdamW):
            wrapper._clip_grad = partial(_clip_listed, wrapper)


def _clip_listed(wrapper: OptimWrapper) -> None:
    """Clip as mmengine's `_clip_grad`, which looks at all parameters first."""
    norm = wrapper.clip_func((), **wrapper.clip_grad_kwargs)
    if norm is not None:
        wrapper.message_hub.update_scalar(f'train/{wrapper.grad_name}', float(norm))
