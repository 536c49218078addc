"""AdamW whose lists of tensors are made once, not in every step.

Decoupled Weight Decay Regularization, arXiv 1711.05101.
Upstream: `torch.optim.AdamW` (BSD-3-Clause), of which the fused kernel is called.
Departs from the source:
- parameters, moments and step counters are looked up once for as long as the same
  parameters have gradients; half of a step of D-FINE-N was spent on that;
- the counters of a group lie in one tensor and count in one operation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

__all__ = ['ListedAdamW', 'list_tensors']

_OPTIONS = ('lr', 'betas', 'eps', 'weight_decay', 'maximize')


@dataclass
class _Lists:
    """What a group steps with.

    Attributes:
        parameters: those with a gradient.
        identities: of them, to tell whether the next step has the same.
        moments: their first moments.
        squares: their second moments.
        steps: their counters, views of `counters`.
        counters: `(number of parameters,)`.
    """

    parameters: list[nn.Parameter]
    identities: list[int]
    moments: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]
    counters: Tensor


class ListedAdamW(AdamW):
    """Fused AdamW; state, results and checkpoints are those of torch's.

    Args:
        params: parameters or groups, on one device and of one dtype.
        **options: of `torch.optim.AdamW`; `fused` is set.

    Raises:
        ValueError: `amsgrad`, `capturable` or `differentiable`.
    """

    def __init__(self, params: object, **options: object) -> None:
        super().__init__(params, **{**options, 'fused': True})
        for key in ('amsgrad', 'capturable', 'differentiable'):
            if any(group[key] for group in self.param_groups):
                raise ValueError(f'{key} is set; ListedAdamW has no such variant')
        self._lists: dict[int, _Lists] = {}  # by index of the group
        self._gathered: list[tuple[list, list]] | None = None

    def __setstate__(self, state: dict) -> None:
        """Take the state of a checkpoint, a copy or a pickle."""
        super().__setstate__(state)
        self._lists, self._gathered = {}, None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As any optimiser's."""
        self._gathered = None
        super().zero_grad(set_to_none)

    def gather(self) -> list[Tensor]:
        """All gradients; the next step takes them as they are now listed."""
        self._gathered = []
        for group in self.param_groups:
            pairs = [(p, g) for p in group['params'] if (g := p.grad) is not None]
            self._gathered.append(([p for p, _ in pairs], [g for _, g in pairs]))
        return [grad for _, grads in self._gathered for grad in grads]

    @torch.no_grad()
    def step(self, closure: Callable[[], object] | None = None) -> object:
        """Update all parameters that have a gradient.

        Args:
            closure: computes gradients and returns the loss, before the update.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._gathered is None or closure is not None:
            self.gather()
        gathered, self._gathered = self._gathered, None
        for index, (parameters, grads) in enumerate(gathered):
            if parameters:
                lists = self._lists_of(index, parameters)
                self._update(self.param_groups[index], lists, grads)
        return loss

    def _lists_of(self, index: int, parameters: list[nn.Parameter]) -> _Lists:
        identities = list(map(id, parameters))
        lists = self._lists.get(index)
        if lists is None or lists.identities != identities:
            entries = [self._entry(parameter) for parameter in parameters]
            counters = torch.stack([entry['step'] for entry in entries])
            for entry, counter in zip(entries, counters.unbind(), strict=True):
                entry['step'] = counter
            moments, squares, steps = (
                [entry[key] for entry in entries]
                for key in ('exp_avg', 'exp_avg_sq', 'step')
            )
            lists = _Lists(parameters, identities, moments, squares, steps, counters)
            self._lists[index] = lists
        return lists

    def _entry(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """State of a parameter; that of a new one is zero."""
        entry = self.state[parameter]
        if not entry:
            entry['step'] = torch.zeros(
                (), dtype=torch.float32, device=parameter.device
            )
            for key in ('exp_avg', 'exp_avg_sq'):
                entry[key] = torch.zeros_like(parameter)
        return entry

    def _update(self, group: dict, lists: _Lists, grads: list[Tensor]) -> None:
        # A loss scaler sets both, clipping the first.
        scale = getattr(self, 'grad_scale', None)
        found_inf = getattr(self, 'found_inf', None)
        lists.counters.add_(1)
        torch._fused_adamw_(
            lists.parameters,
            grads,
            lists.moments,
            lists.squares,
            [],
            lists.steps,
            lr=group['lr'],
            beta1=group['betas'][0],
            beta2=group['betas'][1],
            weight_decay=group['weight_decay'],
            eps=group['eps'],
            amsgrad=False,
            maximize=group['maximize'],
            grad_scale=scale,
            found_inf=found_inf,
        )
        if found_inf is not None:  # the kernel did nothing
            lists.counters.sub_(found_inf)


def list_tensors(optimizer: Optimizer) -> Optimizer:
    """The same optimiser as a `ListedAdamW` where that steps alike, before any step.

    Returns:
        A new optimiser on the same parameters for a plain, fused AdamW on one device
        and of one dtype; any other is returned as it is.
    """
    groups = optimizer.param_groups
    kinds = {
        (parameter.device, parameter.dtype)
        for group in groups
        for parameter in group['params']
        if parameter.requires_grad
    }
    plain = type(optimizer) is AdamW and all(
        group.get('fused')
        and not (group['amsgrad'] or group['capturable'] or group['differentiable'])
        and not any(isinstance(v, Tensor) for v in (group['lr'], *group['betas']))
        for group in groups
    )
    if not plain or len(kinds) != 1 or optimizer.state:
        return optimizer
    options = {key: optimizer.defaults[key] for key in _OPTIONS}
    return ListedAdamW(groups, **options)
