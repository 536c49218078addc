"""Counting and timing: worked by hand where it can be, bounded where not."""

import itertools
import json
import time
from dataclasses import asdict

import pytest
import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

import mmbackbones  # noqa: F401
from mmbackbones.engine.ema import RampEMA
from mmbackbones.evaluation.benchmark import (
    SplitTime,
    Timing,
    conditions,
    count_flops,
    count_parameters,
    format_table,
    measure,
    measure_stages,
    training_stages,
)


@pytest.mark.parametrize(
    ('seconds', 'expected'),
    [
        ([0.002], Timing(2, 2, 2, 2, 1)),
        ([0.001, 0.003], Timing(2, 1, 3, 1, 2)),
        ([0.004, 0.001, 0.002, 0.003, 0.1], Timing(3, 1.5, 52, 1, 5)),
    ],
)
def test_timing_summarises(seconds: list, expected: Timing) -> None:
    assert asdict(Timing.of(seconds)) == pytest.approx(asdict(expected))


def test_parameters_by_child() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(2, 1))
    model[2].requires_grad_(False)
    assert count_parameters(model) == {
        'total': 115, 'trainable': 112, '0': 112, '2': 3}  # fmt: skip


def test_flops_are_two_per_multiply_add() -> None:
    conv = nn.Conv2d(3, 8, 3, padding=1, device='meta')
    x = torch.empty(2, 3, 10, 20, device='meta')
    assert count_flops(lambda: conv(x).relu()) == 2 * (2 * 10 * 20) * 8 * 3 * 9
    query = torch.empty(1, 2, 5, 4, device='meta')
    attention = nn.functional.scaled_dot_product_attention
    # Two products, (5 x 4) by (4 x 5) and (5 x 5) by (5 x 4), in each of 2 heads.
    assert count_flops(lambda: attention(query, query, query)) == 2 * 2 * (2 * 100)


def test_measure_counts_warmup_apart() -> None:
    calls = []
    timing = measure(
        lambda: (calls.append(0), time.sleep(0.002)),
        device='cpu',
        num_warmup=2,
        num_runs=3,
    )
    assert len(calls) == 5 and timing.num_runs == 3
    assert 2 <= timing.min_ms <= timing.median_ms <= timing.q75_ms
    with pytest.raises(ValueError, match='num_runs is 0'):
        measure(lambda: None, device='cpu', num_runs=0)


def test_stages_pass_their_value_on_and_split() -> None:
    seen = []

    def work(value: object) -> SplitTime:
        seen.append(value)
        time.sleep(0.004)
        return SplitTime('made', {'part': 0.003})

    timings = measure_stages(
        {'first': lambda none: 'given', 'work': work, 'last': seen.append},
        device='cpu',
        num_warmup=0,
        num_runs=1,
    )
    assert seen == ['given', 'made']
    assert list(timings) == ['first', 'work', 'part', 'last', 'total']
    assert timings['part'].median_ms == pytest.approx(3)
    assert timings['work'].median_ms >= 1
    assert timings['total'].median_ms == pytest.approx(
        sum(timings[name].median_ms for name in ('first', 'work', 'part', 'last'))
    )


class Criterion(nn.Module):
    def forward(self, output: Tensor) -> dict[str, Tensor]:
        time.sleep(0.005)
        return dict(loss=output.square().mean())


class Preprocessor(BaseDataPreprocessor):
    def forward(self, data: dict, training: bool = False) -> dict:
        assert training
        return super().forward(data)


class Model(BaseModel):
    """With the loss as a child, or within the model."""

    def __init__(self, with_criterion: bool) -> None:
        super().__init__(data_preprocessor=Preprocessor())
        self.layer = nn.Linear(4, 4)
        if with_criterion:
            self.criterion = Criterion()

    def forward(self, inputs: Tensor, mode: str) -> dict[str, Tensor]:
        assert mode == 'loss'
        criterion = getattr(self, 'criterion', Criterion())
        return criterion(self.layer(inputs))


@pytest.mark.parametrize('with_criterion', [True, False])
def test_training_stages_train_and_part_the_loss(with_criterion: bool) -> None:
    model = Model(with_criterion)
    before = model.layer.weight.clone()
    ema = RampEMA(model)
    optim_wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=0.1))
    batches = itertools.repeat(dict(inputs=torch.ones(2, 4)))
    stages = training_stages(model, batches, optim_wrapper, ema=ema)
    timings = measure_stages(stages, device='cpu', num_warmup=1, num_runs=2)
    names = ['data', 'preprocess', 'forward', 'loss', 'backward', 'optimizer', 'ema',
             'total']  # fmt: skip
    if not with_criterion:
        names.remove('loss')
        assert timings['forward'].median_ms >= 5
    else:
        assert timings['loss'].median_ms >= 5
    assert list(timings) == names
    assert not torch.equal(model.layer.weight, before)
    assert ema.steps == 3
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model._forward_hooks and not model.layer._forward_hooks
    if with_criterion:
        assert not model.criterion._forward_hooks


def test_report_is_a_table_and_json() -> None:
    timing = Timing(2.0, 1.5, 2.5, 1.0, 9)
    table = format_table(dict(forward=timing, total=Timing(8.0, 8, 8, 8, 9)))
    assert table.splitlines() == [
        '         median ms   q25   q75  share',
        'forward       2.00  1.50  2.50    25%',
        'total         8.00  8.00  8.00   100%',
    ]
    assert format_table(dict(run=timing)).splitlines()[1].endswith('2.50')
    facts = conditions('cpu')
    assert json.loads(json.dumps(facts)) == facts and facts['torch']
