"""The flat-cosine schedule at its published check values, and at odd lengths."""

import math
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import Runner
from torch import nn
from torch.optim import AdamW
from toy_runner import toy_runner

from mmbackbones.engine.flat_cosine import FlatCosineLR

EPOCH = 3696  # iterations, COCO at 32 images a step


def schedule(end: int, **options: object) -> FlatCosineLR:
    groups = [
        dict(params=[nn.Parameter(torch.zeros(1))], lr=lr) for lr in (5e-4, 2.5e-5)
    ]
    points = dict(of_epochs=58, flat_until=29, constant_from=50, by_epoch=False)
    return FlatCosineLR(AdamW(groups), end=end, **{**points, **options})


def test_check_values_of_size_l() -> None:
    factor = schedule(58 * EPOCH).factor
    assert 5e-4 * factor(1000) == pytest.approx(1.25e-4)
    assert factor(0) == 0
    assert factor(2000) == factor(20 * EPOCH) == factor(29 * EPOCH) == 1
    assert 5e-4 * factor(40 * EPOCH) == pytest.approx(3.657e-4, abs=5e-8)
    # Between them: (1 + cos(pi * 11 / 21)) / 2 of the way from gamma to 1.
    way = (1 + math.cos(math.pi * 11 / 21)) / 2
    assert factor(40 * EPOCH) == pytest.approx(0.5 + 0.5 * way)
    assert 5e-4 * factor(50 * EPOCH) == 2.5e-4
    assert 5e-4 * factor(51 * EPOCH) == 2.5e-4
    assert factor(58 * EPOCH - 1) == 0.5


@pytest.mark.parametrize('epochs', [12, 58, 116])
def test_turning_points_keep_their_share_of_the_run(epochs: int) -> None:
    factor = schedule(epochs * 1000).factor
    published = schedule(58 * 1000).factor
    for share in (0.5, 0.55, 0.7, 0.85, 0.87, 0.99):
        assert factor(share * epochs * 1000) == pytest.approx(
            published(share * 58_000)
        ), share


def test_no_warm_up_is_none() -> None:
    factor = schedule(58 * 10, warmup=0).factor
    assert factor(0) == factor(1) == 1


def test_warm_up_ends_with_the_flat_part_at_the_latest() -> None:
    factor = schedule(58, warmup=2000).factor
    assert factor(28) < factor(29) == 1


@pytest.mark.parametrize('constant_from', [29, 58])
def test_parts_may_be_empty(constant_from: int) -> None:
    factor = schedule(58 * 10, warmup=0, constant_from=constant_from).factor
    assert factor(290) == 1
    assert factor(291) == 0.5 if constant_from == 29 else 0.99 < factor(291) < 1


def test_gamma_of_one_stays_flat() -> None:
    factor = schedule(580, warmup=0, gamma=1.0).factor
    assert {factor(i) for i in range(580)} == {1.0}


def test_groups_keep_their_own_rates_step_by_step() -> None:
    scheduler = schedule(580, warmup=10)
    groups = scheduler.optimizer.param_groups
    for iteration in range(579):
        expected = scheduler.factor(iteration)
        rates = [group['lr'] for group in groups]
        assert rates == pytest.approx([5e-4 * expected, 2.5e-5 * expected])
        scheduler.optimizer.step()
        scheduler.step()


class RecordRate(Hook):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def before_train_iter(self, runner: Runner, *args: object, **kw: object) -> None:
        self.rates.append(runner.optim_wrapper.param_groups[0]['lr'] / 0.05)


def test_a_runner_builds_it_and_resumes_it(tmp_path: Path) -> None:
    """8 iterations: warm-up to 2, flat to 4, cosine to 6."""

    def run(max_epochs: int, **kwargs: object) -> list[float]:
        runner = toy_runner(
            tmp_path,
            dict(checkpoint=dict(type='CheckpointHook', interval=1)),
            max_epochs=max_epochs,
            param_scheduler=dict(
                type='FlatCosineLR',
                by_epoch=False,
                of_epochs=4,
                flat_until=2,
                constant_from=3,
                warmup=2,
            ),
            **kwargs,
        )
        record = RecordRate()
        runner.register_hook(record)
        runner.train()
        return record.rates

    assert PARAM_SCHEDULERS.get('FlatCosineLR') is FlatCosineLR
    expected = [0, 0.25, 1, 1, 1, 0.75, 0.5, 0.5]
    assert run(4) == pytest.approx(expected)
    checkpoint = tmp_path / 'epoch_2.pth'
    assert run(4, resume=True, load_from=str(checkpoint)) == pytest.approx(expected[4:])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(flat_until=51), 'flat_until is 51'),
        (dict(constant_from=59), 'constant_from 59'),
        (dict(warmup=-1), 'warmup -1'),
        (dict(gamma=-0.5), 'gamma is -0.5'),
        (dict(by_epoch=True), 'state by_epoch=False'),
    ],
)
def test_bad_values_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(580, **options)
