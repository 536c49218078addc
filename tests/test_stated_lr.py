"""A resumed run has the learning rate that its config states, schedule and all."""

import shutil
from pathlib import Path

import pytest
from killed_runs import noisy_runner
from mmengine.runner import Runner
from toy_runner import METRIC

from mmbackbones.engine import flat_cosine  # noqa: F401  (registers)

WARM_UP = dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=6)
FLAT_COSINE = dict(
    type='FlatCosineLR',
    flat_until=1,
    constant_from=4,
    of_epochs=5,
    warmup=2,
    by_epoch=False,
)
# What a run of 4 iterations an epoch may be scheduled by; ends follow its length.
SCHEDULES = dict(
    cosine=[WARM_UP, dict(type='CosineAnnealingLR', by_epoch=True, eta_min=0.001)],
    converted=[dict(type='CosineAnnealingLR', end=5, convert_to_iter_based=True)],
    poly=[WARM_UP, dict(type='PolyLR', power=0.9, by_epoch=False, begin=6)],
    steps=[WARM_UP, dict(type='MultiStepLR', milestones=[2, 4, 7], gamma=0.5)],
    flat_cosine=[FLAT_COSINE],
    momentum=[dict(type='CosineAnnealingMomentum', eta_min=0.1, by_epoch=False)],
    none=[],  # not at all
)


QUIET = dict(ema=None, nan_guard=None, preemption=None, stage_switch=None)
Rates = dict[int, list[tuple[float, float]]]


def train(
    work_dir: Path,
    schedule: list[dict],
    *,
    epochs: int = 5,
    stop: int = -1,
    lr: float = 0.05,
    hooks: dict | None = None,
    **overrides: object,
) -> tuple[Rates, list[str]]:
    """Start or resume a run that saves a state each 9 iterations.

    Returns:
        Learning rate and momentum by iteration; what was said of the rate.
    """

    def at(event: str, runner: Runner) -> None:
        if runner.iter == stop:
            raise InterruptedError
        if event == 'before':
            groups = runner.optim_wrapper.param_groups
            rates[runner.iter] = [(group['lr'], group['betas'][0]) for group in groups]

    rates: Rates = {}
    said: list[str] = []
    checkpoint = dict(type='SafeCheckpointHook', interval=100, iter_interval=9)
    arguments = dict(
        param_scheduler=schedule or None,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=lr)),
        hooks=dict(QUIET, checkpoint=checkpoint) | (hooks or {}),
        **dict.fromkeys(('val_dataloader', 'val_evaluator', 'val_cfg')),
    )
    work_dir.mkdir(exist_ok=True)
    runner = noisy_runner(work_dir, at=at, resume=True, **{**arguments, **overrides})
    runner.logger.warning = runner.logger.info = lambda text, *args: said.append(text)
    try:
        runner.train()
    except InterruptedError:
        assert stop >= 0
    return rates, [text for text in said if 'earning rate' in text]


def after(rates: Rates, iteration: int) -> Rates:
    return {i: rate for i, rate in rates.items() if i >= iteration}


@pytest.mark.parametrize('name', SCHEDULES)
def test_a_later_end_moves_the_schedule(tmp_path: Path, name: str) -> None:
    """The rates of a run that was this long from the beginning, bit by bit."""
    schedule = SCHEDULES[name]
    longer = [dict(s, end=8) if s.get('end') == 5 else s for s in schedule]
    expected, _ = train(tmp_path / 'long', longer, epochs=8)
    before, _ = train(tmp_path, schedule, stop=10)
    rates, said = train(tmp_path, longer, epochs=8, stop=20)
    again, said_again = train(tmp_path, longer, epochs=8)
    assert min(rates) == 9 and rates | again == after(expected, 9)
    # Resumed with the config of the checkpoint: nothing is touched.
    assert min(again) == 18 and not said_again
    assert len(said) == (schedule != [])
    if before != {i: expected[i] for i in before}:
        assert 'end 5 -> 8' in said[0] or 'end 20 -> 32' in said[0]


def test_another_schedule_is_taken_up(tmp_path: Path) -> None:
    """Other kinds, one more, one less, none; a rate that is lower as well."""
    train(tmp_path / 'a', SCHEDULES['cosine'], stop=10)
    for name in ('steps', 'flat_cosine', 'none'):
        expected, _ = train(tmp_path / f'whole_{name}', SCHEDULES[name], lr=0.01)
        shutil.copytree(tmp_path / 'a', tmp_path / name)
        rates, (said,) = train(tmp_path / name, SCHEDULES[name], lr=0.01)
        assert rates == after(expected, 9)
        assert 'rate 0.05 -> 0.01' in said and 'not of the checkpoint' in said


def test_a_rate_without_a_schedule_holds(tmp_path: Path) -> None:
    train(tmp_path, [], stop=10)
    rates, (said,) = train(tmp_path, [], lr=0.01)
    assert all(rate == [(0.01, 0.9)] for rate in after(rates, 9).values())
    assert '(rate 0.05 -> 0.01)' in said


def test_a_schedule_that_follows_scores_stays_and_says_so(tmp_path: Path) -> None:
    """Its past cannot be run through."""
    plateau = dict(type='ReduceOnPlateauLR', monitor=METRIC, rule='greater')
    schedule = [WARM_UP, plateau]
    train(tmp_path, schedule, stop=10)
    shutil.copytree(tmp_path, tmp_path / 'same')
    _, said = train(tmp_path / 'same', schedule)
    assert not said
    rates, (said,) = train(tmp_path, schedule, epochs=8, lr=0.01)
    assert 'stay those of the CHECKPOINT' in said and 'load_from=<checkpoint>' in said
    assert 'ReduceOnPlateauLR.end 5 -> 8' in said and 'rate 0.05 -> 0.01' in said
    assert all(rate == [(0.05, 0.9)] for rate in after(rates, 9).values())


def test_a_run_that_saves_no_optimiser_has_its_rate(tmp_path: Path) -> None:
    checkpoint = dict(type='SafeCheckpointHook', iter_interval=9, save_optimizer=False)
    hooks = dict(checkpoint=checkpoint)
    expected, _ = train(tmp_path / 'whole', SCHEDULES['poly'])
    train(tmp_path, SCHEDULES['poly'], stop=10, hooks=hooks)
    rates, said = train(tmp_path, SCHEDULES['poly'], hooks=hooks)
    assert rates == after(expected, 9) and 'the optimizer starts anew' in said[0]


def test_another_batch_size_keeps_the_place_in_the_schedule(tmp_path: Path) -> None:
    """3 of 10 iterations of four samples, then 6 of 20 of two."""
    hooks = dict(checkpoint=dict(type='SafeCheckpointHook', iter_interval=3))
    expected, _ = train(tmp_path / 'whole', [FLAT_COSINE])
    train(tmp_path, [FLAT_COSINE], stop=3, batch_size=4, hooks=hooks)
    rates, said = train(tmp_path, [FLAT_COSINE])
    assert rates == after(expected, 6)
    assert 'end 10 -> 20' in said[0] and 'the same samples 1 -> 2' in said[0]


@pytest.mark.parametrize('batch_size', [2, 4])
def test_a_scaled_rate_is_scaled_without_being_asked_again(
    tmp_path: Path, batch_size: int
) -> None:
    """Begun with 2 samples a step over the 8 that the rate is for; resumed twice."""
    scale = dict(base_batch_size=8, enable=True)
    options = dict(
        auto_scale_lr=scale,
        epochs=8,
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=0.05, weight_decay=0.1),
            paramwise_cfg=dict(norm_decay_mult=0.0),  # several groups
        ),
    )
    train(tmp_path, [], stop=10, **options)
    scale['enable'] = False
    for stop in (10, -1):
        rates, said = train(tmp_path, [], batch_size=batch_size, stop=stop, **options)
        assert {rate for ((rate, _), *_) in rates.values()} == {0.05 * batch_size / 8}
        (begun,) = (text for text in said if 'was begun with --auto-scale-lr' in text)
        assert f'{batch_size} samples in a step over 8' in begun
        changed = any('(rate 0.0125 -> 0.025' in text for text in said)
        assert changed == (batch_size == 4 and stop == 10)
    rates, _ = train(tmp_path / 'other', [], **options)
    assert rates[0][0] == (0.05, 0.9)
