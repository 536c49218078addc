"""The learning rate that a config states, also where a run is resumed.

MMEngine takes the rates of a checkpoint: one that was lowered before resuming, as one
does after a divergence, has no effect, and nothing says so.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner

__all__ = ['keep_stated_lr']


@contextmanager
def keep_stated_lr(runner: Runner) -> Iterator[None]:
    """Load optimiser and schedules in the block, and keep the base rates from before.

    Where the base rate of a group is another one in the checkpoint, its present rate
    and its part of each schedule are scaled by the ratio, with a warning.

    Args:
        runner: with optimiser and schedulers built. Several optimisers are left alone.
    """
    stated = _base_rates(runner)
    yield
    loaded = _base_rates(runner)
    changed = [
        i
        for i, (mine, theirs) in enumerate(zip(stated, loaded, strict=True))
        if theirs and not math.isclose(mine, theirs)
    ]
    if not changed:
        return
    for i in changed:
        ratio = stated[i] / loaded[i]
        group = runner.optim_wrapper.param_groups[i]
        for key in {'lr', 'initial_lr'} & group.keys():
            group[key] *= ratio
        for scheduler in runner.param_schedulers or ():
            if scheduler.param_name == 'lr':
                scheduler.base_values[i] *= ratio
                scheduler._last_value[i] *= ratio
    mine, theirs = ([rates[i] for i in changed] for rates in (stated, loaded))
    runner.logger.warning(
        f'The learning rate is as stated now, {_shown(mine)}, and not as in the '
        f'checkpoint, {_shown(theirs)}; the course of its schedule goes on'
    )


def _base_rates(runner: Runner) -> list[float]:
    """Rate of each group before any schedule."""
    if isinstance(runner.optim_wrapper, OptimWrapperDict):
        return []
    groups = runner.optim_wrapper.param_groups
    return [group.get('initial_lr', group['lr']) for group in groups]


def _shown(rates: list[float]) -> str:
    return ', '.join(f'{rate:g}' for rate in dict.fromkeys(rates))
