"""Phases of a run: which augmentation is on when, and which matching.

DEIM: DETR with Improved Matching for Fast Convergence, arXiv 2412.04234 (four phases
of dense one-to-one); DEIMv2, arXiv 2509.20787 (change of the matcher).
Upstream: https://github.com/Intellindust-AI-Lab/DEIM
engine/data/transforms/container.py, engine/data/dataloader.py;
https://github.com/Intellindust-AI-Lab/DEIMv2 engine/deim/matcher.py (Apache-2.0).
Departs from the source:
- turning points move with the length of the run;
- as `StageSwitchHook`.
"""

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmbackbones.engine.stage_switch import StageSwitchHook, change_pipeline, unwrap
from mmbackbones.registry import HOOKS, MODELS

__all__ = ['MatcherSwitchHook', 'PhaseHook', 'enable_augments', 'scaled_epoch']


def scaled_epoch(epoch: float, of_epochs: int, max_epochs: int) -> int:
    """The epoch of a run of `max_epochs` at the same share as one of `of_epochs`."""
    return int(epoch * max_epochs / of_epochs + 0.5)


@HOOKS.register_module()
class PhaseHook(StageSwitchHook):
    """Divides what comes before the final stage into phases of augmentation.

    `phases[i]` lasts until epoch `ends[i]`; the last of these begins the final stage
    of `StageSwitchHook`, which has its own pipeline, no batch augment, and begins
    with the best of all phases. `ends` are epochs of a run of `of_epochs`, as
    published: in a run of another length phases keep their share, and the final
    stage has an epoch at least.

    The learning rate goes on by the count of iterations; reloads do not rewind it.

    Args:
        ends: epochs (0-based) that begin the phase after `phases[i]`.
        of_epochs: length of the run that `ends` are stated for.
        phases: one for each of `ends`, with `pipeline`, configs of the transforms,
            and `augments`, class names of the batch augments that are on; others
            are off. Names that the data preprocessor does not have are left out.
        pipeline: of the final stage.
        **kwargs: as `StageSwitchHook`.

    Raises:
        ValueError: `ends` are not in order, not within `of_epochs`, or not as many
            as `phases`; a phase has other keys, or names an unknown augment.
    """

    def __init__(
        self,
        ends: Sequence[int],
        of_epochs: int,
        phases: Sequence[dict],
        pipeline: Sequence[dict],
        **kwargs: Any,
    ) -> None:
        if list(ends) != sorted(ends) or not ends or not 0 <= ends[0] <= ends[-1]:
            raise ValueError(f'ends is {tuple(ends)}; give rising epochs')
        if ends[-1] > of_epochs:
            raise ValueError(
                f'ends is {tuple(ends)}, which is not within of_epochs = {of_epochs}'
            )
        if len(phases) != len(ends):
            raise ValueError(
                f'there are {len(phases)} phases but ends is {tuple(ends)}; give each '
                'its end'
            )
        for i, phase in enumerate(phases):
            _check_phase(i, phase)
        if 'num_final_epochs' in kwargs:
            raise ValueError(
                f'num_final_epochs is {kwargs["num_final_epochs"]}, but the last stage '
                f'follows from ends = {tuple(ends)} of {of_epochs} epochs; leave it out'
            )
        super().__init__(of_epochs - ends[-1], pipeline, **kwargs)
        self.ends = tuple(ends)
        self.of_epochs = of_epochs
        self.phases = list(phases)
        self._entered: int | None = None
        self._augments: list[nn.Module] = []

    def phase_at(self, epoch: int, max_epochs: int) -> int:
        """Number of the phase, 0-based; `len(phases)` is the final stage."""
        final = max_epochs - self.num_final_of(max_epochs)
        if epoch >= final:
            return len(self.phases)
        starts = (scaled_epoch(e, self.of_epochs, max_epochs) for e in self.ends[:-1])
        return sum(epoch >= start for start in starts)

    def num_final_of(self, max_epochs: int) -> int:
        """Epochs of the final stage in a run of that length."""
        if self.ends[-1] == self.of_epochs:
            return 0
        final = scaled_epoch(self.ends[-1], self.of_epochs, max_epochs)
        return max(1, max_epochs - final)

    def before_train(self, runner: Runner) -> None:
        """Fix the length of the final stage."""
        self.num_final_epochs = self.num_final_of(runner.max_epochs)
        preprocessor = unwrap(runner.model).data_preprocessor
        augments = getattr(preprocessor, 'batch_augments', None) or ()
        self._augments = [a for a in augments if getattr(a, 'enabled', False)]
        super().before_train(runner)

    def before_train_epoch(self, runner: Runner) -> None:
        """Enter a phase, or the final stage, where it is time."""
        number = self.phase_at(runner.epoch, runner.max_epochs)
        if number != self._entered and number < len(self.phases):
            self._enter(runner, number)
        self._entered = number
        super().before_train_epoch(runner)

    def _enter(self, runner: Runner, number: int) -> None:
        phase = self.phases[number]
        change_pipeline(runner.train_dataloader, phase['pipeline'])
        on = enable_augments(self._augments, phase['augments'])
        runner.logger.info(
            f'Phase {number + 1} of {len(self.phases) + 1} from epoch '
            f'{runner.epoch + 1}: {len(phase["pipeline"])} transforms; on: '
            f'{on or "no batch augment"}'
        )

    def _reload(self, runner: Runner) -> None:
        schedulers = runner.param_schedulers or []
        states = [dict(scheduler.state_dict()) for scheduler in schedulers]
        super()._reload(runner)
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)
            groups = scheduler.optimizer.param_groups
            for group, value in zip(groups, scheduler.get_last_value(), strict=True):
                group[scheduler.param_name] = value


def enable_augments(augments: Sequence[nn.Module], names: Sequence[str]) -> list[str]:
    """Switch batch augments on whose class is in `names`, others off.

    Args:
        augments: those that were on as they were built.
        names: of classes; may name some that are not there.

    Returns:
        Names of those that are on.
    """
    for augment in augments:
        augment.enabled = type(augment).__name__ in names
    return [type(augment).__name__ for augment in augments if augment.enabled]


def _check_phase(number: int, phase: dict) -> None:
    if set(phase) != {'pipeline', 'augments'}:
        raise ValueError(
            f'phases[{number}] has {sorted(phase)}; give pipeline and augments'
        )
    unknown = [name for name in phase['augments'] if MODELS.get(name) is None]
    if unknown:
        raise ValueError(
            f'phases[{number}].augments names {unknown}, which no module registers; '
            'choose among the classes of data_preprocessor.batch_augments'
        )


@HOOKS.register_module()
class MatcherSwitchHook(Hook):
    """Gives the criterion another matcher for the last epochs.

    Fires before training epochs; a resumed run has the matcher of its epoch.

    Args:
        start: first epoch (0-based) with it, in a run of `of_epochs`.
        of_epochs: length of the run that `start` is stated for; in others the epoch
            at the same share.
        matcher: its config, `ScoreIoUMatcher` as published.

    Raises:
        ValueError: `start` is not within `of_epochs`.
    """

    def __init__(self, start: int, of_epochs: int, matcher: dict) -> None:
        if not 0 <= start <= of_epochs:
            raise ValueError(f'start is {start}; give an epoch from 0 to {of_epochs}')
        self.start = start
        self.of_epochs = of_epochs
        self.matcher = MODELS.build(matcher)
        self._switched = False

    def before_train_epoch(self, runner: Runner) -> None:
        """Switch where it is time."""
        start = scaled_epoch(self.start, self.of_epochs, runner.max_epochs)
        if runner.epoch < start or self._switched:
            return
        unwrap(runner.model).criterion.matcher = self.matcher
        self._switched = True
        runner.logger.info(
            f'{type(self.matcher).__name__} matches from epoch {runner.epoch + 1} on'
        )
