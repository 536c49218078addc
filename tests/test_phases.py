"""Phases of augmentation: where they turn, what is on, resume, and the matcher."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner
from torch import nn
from toy_runner import METRIC, Stamp, toy_runner

from mmbackbones.engine.ema import RampEMAHook
from mmbackbones.engine.phases import MatcherSwitchHook, PhaseHook, scaled_epoch
from mmbackbones.losses import DETRCriterion
from mmbackbones.losses.matching import HungarianMatcher, ScoreIoUMatcher

PLAIN, DENSE, STRONG, FINAL = 1, 2, 3, 5  # stamps of the pipelines
ON = 'FakeMultiScale'


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner's stand-in for multi-scale counts as a registered module."""
    from mmbackbones.engine import phases

    known = {ON: nn.Module, 'MixUp': nn.Module}
    stand_in = SimpleNamespace(get=known.get, build=phases.MODELS.build)
    monkeypatch.setattr(phases, 'MODELS', stand_in)


def stamp(value: int) -> list[dict]:
    return [dict(type=Stamp, value=value)]


def phases() -> list[dict]:
    return [
        dict(pipeline=stamp(PLAIN), augments=()),
        dict(pipeline=stamp(DENSE), augments=('MixUp', ON)),
        dict(pipeline=stamp(STRONG), augments=()),
    ]


def hooks(ends: tuple = (1, 2, 3), of_epochs: int = 4, **switch: object) -> dict:
    return dict(
        stage_switch=dict(
            type=PhaseHook,
            ends=ends,
            of_epochs=of_epochs,
            phases=phases(),
            pipeline=stamp(FINAL),
            **switch,
        ),
        ema=dict(type=RampEMAHook, momentum=0.1, warmup_iters=3),
        checkpoint=dict(type=CheckpointHook, interval=1, save_best=METRIC),
    )


class RecordAugment(Hook):
    def __init__(self) -> None:
        self.enabled: list[bool] = []

    def after_train_epoch(self, runner: Runner) -> None:
        augment = runner.model.data_preprocessor.batch_augments[0]
        self.enabled.append(augment.enabled)


def per_epoch(runner: Runner) -> list[int]:
    assert runner.model.seen[::2] == runner.model.seen[1::2]
    return [int(value) for value in runner.model.seen[::2]]


# Published phases of sizes L, S, M, N, R18, R50, X of 24 epochs, and Atto.
PUBLISHED = [
    ((4, 29, 50), 58),
    ((4, 64, 120), 132),
    ((4, 49, 90), 102),
    ((4, 78, 148), 160),
    ((4, 64, 117), 120),
    ((4, 34, 58), 60),
    ((2, 12, 20), 24),
    ((4, 250, 400, 468), 500),
]


def hook_of(ends: tuple, of_epochs: int) -> PhaseHook:
    phase = dict(pipeline=[], augments=())
    return PhaseHook(ends, of_epochs, [phase] * len(ends), [])


@pytest.mark.parametrize(('ends', 'of_epochs'), PUBLISHED)
@pytest.mark.parametrize('factor', [1, 2, 3])
def test_phases_turn_at_the_published_epochs_and_at_their_multiples(
    ends: tuple, of_epochs: int, factor: int
) -> None:
    hook = hook_of(ends, of_epochs)
    found = [hook.phase_at(e, factor * of_epochs) for e in range(factor * of_epochs)]
    lengths = [b - a for a, b in zip((0, *ends), (*ends, of_epochs), strict=True)]
    assert [found.count(i) for i in range(len(ends) + 1)] == [
        factor * length for length in lengths
    ]
    assert found == sorted(found)


@pytest.mark.parametrize('max_epochs', range(1, 60))
def test_short_runs_end_in_the_final_stage(max_epochs: int) -> None:
    hook = hook_of((4, 29, 50), 58)
    found = [hook.phase_at(epoch, max_epochs) for epoch in range(max_epochs)]
    assert found == sorted(found) and found[-1] == 3
    assert hook.num_final_of(max_epochs) == found.count(3)
    for i, end in enumerate((4, 29, 50)):
        begun = sum(number <= i for number in found)
        assert abs(begun - end * max_epochs / 58) <= 0.5 or begun == max_epochs - 1
    if max_epochs >= 12:
        assert set(found) == {0, 1, 2, 3}


def test_no_final_stage_where_the_last_phase_ends_with_the_run() -> None:
    hook = hook_of((4, 10), 10)
    assert hook.num_final_of(5) == 0
    assert [hook.phase_at(epoch, 5) for epoch in range(5)] == [0, 0, 1, 1, 1]


def test_epochs_are_rounded_half_up() -> None:
    assert [scaled_epoch(4, 58, n) for n in (1, 7, 8, 58, 87)] == [0, 0, 1, 4, 6]
    assert scaled_epoch(29, 58, 5) == 3


@pytest.mark.parametrize(
    ('max_epochs', 'expected', 'num_workers'),
    [
        (4, [PLAIN, DENSE, STRONG, FINAL], 2),  # persistent: hold the old pipeline
        (8, [PLAIN] * 2 + [DENSE] * 2 + [STRONG] * 2 + [FINAL] * 2, 0),
        (1, [FINAL], 0),
    ],
)
def test_pipeline_and_augments_follow_the_phases(
    tmp_path: Path, max_epochs: int, expected: list, num_workers: int
) -> None:
    runner = toy_runner(
        tmp_path, hooks(), max_epochs=max_epochs, num_workers=num_workers
    )
    record = RecordAugment()
    runner.register_hook(record)
    runner.train()
    assert per_epoch(runner) == expected
    assert record.enabled == [number == DENSE for number in expected]
    runner.train_dataloader._iterator = None  # ends its workers now


def test_an_augment_that_was_built_off_stays_off(tmp_path: Path) -> None:
    runner = toy_runner(tmp_path, hooks(), max_epochs=2)
    runner.model.data_preprocessor.batch_augments[0].enabled = False
    record = RecordAugment()
    runner.register_hook(record)
    runner.train()
    assert record.enabled == [False, False]


@pytest.mark.parametrize('resume_after', [2, 5])
def test_resume_lands_in_the_right_phase(tmp_path: Path, resume_after: int) -> None:
    scores = [0.2, 0.4, 0.1, 0.3, 0.5, 0.45]

    def run(work_dir: Path, **kwargs: object) -> Runner:
        settings = hooks((1, 3, 4), 6)
        runner = toy_runner(work_dir, settings, max_epochs=6, **kwargs)
        runner.train()
        return runner

    whole = run(tmp_path / 'whole', scores=scores)
    assert per_epoch(whole) == [PLAIN] + [DENSE] * 2 + [STRONG] + [FINAL] * 2

    class Interrupt(Exception):
        pass

    class InterruptHook(Hook):
        priority = 'LOWEST'

        def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
            if runner.epoch == resume_after:
                raise Interrupt

    first = toy_runner(
        tmp_path / 'parts', hooks((1, 3, 4), 6), max_epochs=6, scores=scores
    )
    first.register_hook(InterruptHook())
    with pytest.raises(Interrupt):
        first.train()
    second = run(tmp_path / 'parts', scores=scores[resume_after:], resume=True)
    assert per_epoch(first) + per_epoch(second) == per_epoch(whole)
    torch.testing.assert_close(
        second.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0
    )


def test_a_reload_takes_the_best_but_not_its_rate(tmp_path: Path) -> None:
    rates, weights = [], []

    class Record(Hook):
        priority = 'LOWEST'

        def before_train_epoch(self, runner: Runner) -> None:
            rates.append(runner.optim_wrapper.param_groups[0]['lr'])
            weights.append(runner.model.weight.detach().clone())

    runner = toy_runner(tmp_path, hooks(), max_epochs=4, scores=[0.4, 0.1, 0.2, 0.3])
    runner.register_hook(Record())
    runner.train()
    # 0.1 of 0.05, rising over 29 steps; two steps an epoch.
    expected = [0.05 * (0.1 + 0.9 * step / 29) for step in (0, 2, 4, 6)]
    assert rates == pytest.approx(expected)
    assert torch.equal(weights[3], weights[1])  # of after the first epoch


class ToyDetector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = DETRCriterion()


@pytest.mark.parametrize(
    ('max_epochs', 'first'), [(58, 45), (116, 90), (6, 5), (1, 1), (12, 9)]
)
def test_the_matcher_changes_once_and_for_good(max_epochs: int, first: int) -> None:
    model = ToyDetector()
    hook = MatcherSwitchHook(45, 58, dict(type=ScoreIoUMatcher, iou_power=3.0))
    logger = SimpleNamespace(info=lambda text: None)
    for epoch in range(max_epochs):
        hook.before_train_epoch(
            SimpleNamespace(
                epoch=epoch, max_epochs=max_epochs, model=model, logger=logger
            )
        )
        kind = ScoreIoUMatcher if epoch >= first else HungarianMatcher
        assert type(model.criterion.matcher) is kind


def test_bad_arguments_are_named() -> None:
    good = dict(ends=(1, 2, 3), of_epochs=4, phases=phases(), pipeline=[])
    for change, message in [
        (dict(ends=(2, 1, 3)), r'ends is \(2, 1, 3\)'),
        (dict(ends=()), r'ends is \(\)'),
        (dict(ends=(1, 2, 5)), 'of_epochs = 4'),
        (dict(ends=(1, 2)), 'there are 3 phases'),
        (dict(num_final_epochs=8), r'num_final_epochs is 8, but .* leave it out'),
        (dict(phases=[dict(pipeline=[])] * 3), r"phases\[0\] has \['pipeline'\]"),
        (
            dict(phases=[dict(pipeline=[], augments=['MixDown'])] * 3),
            'MixDown',
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            PhaseHook(**{**good, **change})
    with pytest.raises(ValueError, match='start is 59'):
        MatcherSwitchHook(59, 58, dict(type=ScoreIoUMatcher))
