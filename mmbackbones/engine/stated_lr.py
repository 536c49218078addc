"""The learning rate and the schedule that a config states, also in a resumed run.

MMEngine takes both from the checkpoint: a rate that was lowered before resuming, as one
does after a divergence, or an end that has moved with `max_epochs`, has no effect, and
nothing says so.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence

from mmengine.optim import OptimWrapperDict
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.runner import Runner

from mmbackbones.engine.train_loops import iterations_factor

__all__ = ['StatedLR']

# Attributes of a schedule that are no settings: where it stands, and on what.
_STATE = {'last_step', '_global_step', '_last_value', 'base_values'}
_STATE |= {'best', 'num_bad_epochs', 'cooldown_counter'}  # ReduceOnPlateau
_STATE |= {'optimizer', 'verbose'}


class StatedLR:
    """Rates and schedules as stated, taken before those of a checkpoint are loaded.

    Where the two differ, the stated schedule is run through, without training, to the
    position of the checkpoint: the rate is the one that the run would have had there,
    had it been started like this. Where they do not, nothing is touched.

    Args:
        runner: with optimiser and schedulers built. Several optimisers are left alone.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        single = not isinstance(runner.optim_wrapper, OptimWrapperDict)
        schedulers = _schedulers(runner) if single else []
        self._names = {'lr', *(scheduler.param_name for scheduler in schedulers)}
        self._settings = [dict(vars(scheduler)) for scheduler in schedulers]
        groups = runner.optim_wrapper.param_groups if single else []
        self._groups = [{k: group[k] for k in self._keys(group)} for group in groups]

    def scale(self, factor: float) -> None:
        """Multiply the stated learning rates, as `Runner.scale_lr` does."""
        if not self._groups:
            return
        # Without the group that the wrapper adds, the base rate of the log.
        own = len(self._runner.optim_wrapper.optimizer.param_groups)
        for group in self._groups[:own]:
            for key in group:
                if _belongs(key, 'lr'):
                    group[key] *= factor

    def restore(self, checkpoint: Mapping) -> None:
        """Go back to what is stated, where the checkpoint has brought something else.

        Args:
            checkpoint: whose optimiser and schedules the runner has loaded.
        """
        if not self._groups:
            return
        changes = list(self._changes(checkpoint))
        if not changes:
            return
        said, logger = '; '.join(changes), self._runner.logger
        for scheduler in _schedulers(self._runner):
            if getattr(scheduler, 'need_val_args', False):
                logger.warning(
                    f'Learning rate and schedule stay those of the CHECKPOINT, not of '
                    f'the config ({said}): {type(scheduler).__name__} follows from '
                    'scores of the past. For those of the config start a new run from '
                    'the weights, --cfg-options load_from=<checkpoint>'
                )
                return
        logger.warning(
            f'Learning rate and schedule are those of the config, not of the '
            f'checkpoint ({said})'
        )
        self._start_anew()
        self._run_through(*self._position(checkpoint))

    def _keys(self, group: Mapping) -> list[str]:
        """Those of what is scheduled: `lr`, `initial_lr`, ..."""
        return [k for k in group if any(_belongs(k, name) for name in self._names)]

    def _changes(self, checkpoint: Mapping) -> Iterator[str]:
        """What is not as in the checkpoint, `name old -> new`."""
        pairs = zip(self._groups, self._runner.optim_wrapper.param_groups, strict=True)
        rates = [(_base_rate(theirs), _base_rate(mine)) for mine, theirs in pairs]
        changed = [pair for pair in rates if not math.isclose(*pair)]
        if changed:
            theirs, mine = (_shown(rates) for rates in zip(*changed, strict=True))
            yield f'rate {theirs} -> {mine}'
        states = checkpoint.get('param_schedulers', ())
        if len(states) != len(self._settings):
            yield f'number of schedules {len(states)} -> {len(self._settings)}'
        else:
            yield from self._changed_settings(states)
        factor = iterations_factor(self._runner, checkpoint)
        if factor != 1 and any(not settings['by_epoch'] for settings in self._settings):
            yield f'iterations over the same samples 1 -> {factor:g}'
        if 'optimizer' not in checkpoint:
            yield 'the optimizer starts anew'

    def _changed_settings(self, states: Sequence[Mapping]) -> Iterator[str]:
        schedulers = _schedulers(self._runner)
        for scheduler, mine, theirs in zip(
            schedulers, self._settings, states, strict=True
        ):
            for key in mine | theirs:
                old, new = theirs.get(key), mine.get(key)
                if key not in _STATE and old != new:
                    yield f'{type(scheduler).__name__}.{key} {old} -> {new}'

    def _position(self, checkpoint: Mapping) -> tuple[int, int]:
        """Epochs and iterations that schedules have behind them."""
        # A reload of an earlier state rewinds schedules, but not the count of the run.
        states = checkpoint.get('param_schedulers', ())
        steps = {state['by_epoch']: state['_global_step'] for state in states}
        iterations = steps.get(False, checkpoint['meta']['iter'])
        factor = iterations_factor(self._runner, checkpoint)
        return steps.get(True, checkpoint['meta']['epoch']), round(iterations * factor)

    def _start_anew(self) -> None:
        """Optimiser and schedulers as they are built."""
        groups = self._runner.optim_wrapper.param_groups
        for group, stated in zip(groups, self._groups, strict=True):
            for key in self._keys(group):
                del group[key]
            group.update(stated)
        schedulers = _schedulers(self._runner)
        for scheduler, settings in zip(schedulers, self._settings, strict=True):
            vars(scheduler).clear()
            vars(scheduler).update(settings, last_step=-1, _global_step=-1)
            name = scheduler.param_name
            scheduler.base_values = [group[f'initial_{name}'] for group in groups]
            for group, value in zip(groups, scheduler.base_values, strict=True):
                group[name] = value

    def _run_through(self, epochs: int, iterations: int) -> None:
        """Step the schedulers as training does."""
        schedulers = _schedulers(self._runner)
        by_epoch = [scheduler for scheduler in schedulers if scheduler.by_epoch]
        by_iteration = [scheduler for scheduler in schedulers if not scheduler.by_epoch]
        length = len(self._runner.train_dataloader)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that the optimiser has made no step
            _step(schedulers)
            for iteration in range(1, iterations + 1):
                _step(by_iteration)
                if iteration % length == 0 and epochs:
                    _step(by_epoch)
                    epochs -= 1
            for _ in range(epochs):
                _step(by_epoch)


def _schedulers(runner: Runner) -> list[_ParamScheduler]:
    return runner.param_schedulers or []


def _step(schedulers: Sequence[_ParamScheduler]) -> None:
    for scheduler in schedulers:
        scheduler.step()


def _belongs(key: str, name: str) -> bool:
    """Whether a key of a group is of what is scheduled (`initial_lr`, `max_lr`)."""
    return key == name or key.endswith(f'_{name}')


def _base_rate(group: Mapping) -> float:
    """Before any schedule."""
    return group.get('initial_lr', group['lr'])


def _shown(rates: Sequence[float]) -> str:
    return ', '.join(f'{rate:g}' for rate in dict.fromkeys(rates))
