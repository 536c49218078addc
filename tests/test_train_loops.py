"""Toy runs that are killed at every iteration, resumed, and compared bit by bit."""

import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from killed_runs import (
    EPOCH_LENGTH,
    NoisyModel,
    journal,
    kill_at,
    noisy_runner,
    train,
)
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from mmbackbones.engine.param_groups import ParamGroupConstructor
from mmbackbones.engine.train_loops import ResumableEpochLoop, ResumableIterLoop

KILLED = -signal.SIGKILL


@pytest.fixture(scope='module', params=['epochs', 'iterations'])
def whole(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[bool, dict]:
    """Whether epochs are counted, and the journal of a run that nobody killed."""
    by_epoch = request.param == 'epochs'
    work_dir = tmp_path_factory.mktemp('whole')
    assert train(work_dir, by_epoch=by_epoch) == 0
    return by_epoch, journal(work_dir)


def test_the_run_to_compare_with_is_a_hard_one(whole: tuple[bool, dict]) -> None:
    by_epoch, events = whole
    assert sum(event.startswith('loss') for event in events) == 20
    assert len(set(events.values())) == len(events)  # noise in every step
    assert sum(event.startswith('score') for event in events) == (5 if by_epoch else 4)


@pytest.mark.parametrize('iteration', [0, 7, 12, 19])
def test_killed_at_an_iteration(
    whole: tuple[bool, dict], tmp_path: Path, iteration: int
) -> None:
    """Of 5 epochs of 4; the final stage begins with iteration 12 (0-based)."""
    by_epoch, events = whole
    at = kill_at('before', iteration)
    assert train(tmp_path, by_epoch=by_epoch, at=at) == KILLED
    assert len(journal(tmp_path)) < len(events)
    assert train(tmp_path, by_epoch=by_epoch) == 0
    assert journal(tmp_path) == events


def test_killed_over_and_over(whole: tuple[bool, dict], tmp_path: Path) -> None:
    by_epoch, events = whole
    for iteration in (5, 9, 14):
        at = kill_at('before', iteration)
        assert train(tmp_path, by_epoch=by_epoch, at=at) == KILLED
    assert train(tmp_path, by_epoch=by_epoch) == 0
    assert journal(tmp_path) == events


@pytest.mark.parametrize('epoch', [3, 5])
def test_a_validation_that_was_cut_off_is_made_up_for(
    whole: tuple[bool, dict], tmp_path: Path, epoch: int
) -> None:
    by_epoch, events = whole
    done = epoch * EPOCH_LENGTH if by_epoch else min(6 * epoch, 20)
    at = kill_at('validation', done)
    assert train(tmp_path, by_epoch=by_epoch, at=at) == (KILLED if done <= 20 else 0)
    assert f'score {done}' not in journal(tmp_path)
    assert train(tmp_path, by_epoch=by_epoch) == 0
    assert journal(tmp_path) == events


def test_workers_change_nothing(whole: tuple[bool, dict], tmp_path: Path) -> None:
    by_epoch, events = whole
    at = kill_at('before', 6)
    assert train(tmp_path, by_epoch=by_epoch, num_workers=2, at=at) == KILLED
    assert train(tmp_path, by_epoch=by_epoch, num_workers=1) == 0
    assert journal(tmp_path) == events


@pytest.mark.parametrize('by_epoch', [True, False])
def test_another_batch_size_goes_on_at_the_same_sample(
    tmp_path: Path, by_epoch: bool
) -> None:
    """Killed with 6 of 8 samples done; these were 3 batches, and are now 6."""
    at = kill_at('before', 3)
    assert train(tmp_path, by_epoch=by_epoch, at=at) == KILLED
    starts = []

    def stop(event: str, runner: object) -> None:
        loop = runner.train_loop
        starts.append((loop.iter, loop.runner.message_hub.get_info('train_position')))
        raise InterruptedError

    runner = noisy_runner(
        tmp_path, by_epoch=by_epoch, batch_size=1, resume=True, at=stop
    )
    with pytest.raises(InterruptedError):
        runner.train()
    iteration, position = starts[0]
    assert position['batches'] == 7  # 6 samples, and the one that begins here
    assert iteration == (6 if by_epoch else 3)


def test_mmengines_loops_are_replaced(tmp_path: Path) -> None:
    for given, expected in (
        (dict(type=EpochBasedTrainLoop, max_epochs=2), ResumableEpochLoop),
        (dict(type='EpochBasedTrainLoop', max_epochs=2), ResumableEpochLoop),
        (dict(by_epoch=False, max_iters=2), ResumableIterLoop),
        (dict(type=IterBasedTrainLoop, max_iters=2), ResumableIterLoop),
    ):
        runner = noisy_runner(tmp_path, train_cfg=given)
        assert type(runner.build_train_loop(given)) is expected


def test_an_epoch_without_a_batch_is_an_error(tmp_path: Path) -> None:
    """8 samples, of which `drop_last` leaves none; not a run that ends at once."""
    for by_epoch in (True, False):
        with pytest.raises(ValueError, match=r'gives no batch.*batch_size = 9'):
            noisy_runner(
                tmp_path, by_epoch=by_epoch, batch_size=9, drop_last=True
            ).train()


def accumulating(counts: int) -> dict:
    optimizer = dict(type='AdamW', lr=0.05)
    return dict(
        optim_wrapper=dict(
            optimizer=optimizer,
            clip_grad=dict(max_norm=1.0),
            accumulative_counts=counts,
        )
    )


@pytest.mark.parametrize('by_epoch', [True, False])
@pytest.mark.parametrize('counts', [2, 3])
def test_accumulated_gradients_are_not_lost(
    tmp_path: Path, by_epoch: bool, counts: int
) -> None:
    """States are due every 3 iterations; steps are of 2 or 3, epochs of 4."""
    options = dict(by_epoch=by_epoch, **accumulating(counts))
    whole = tmp_path / 'whole'
    assert train(whole, **options) == 0
    for iteration in (8, 11):
        work_dir = tmp_path / f'killed_{iteration}'
        at = kill_at('before', iteration)
        assert train(work_dir, at=at, **options) == KILLED
        assert train(work_dir, **options) == 0
        assert journal(work_dir) == journal(whole)


def test_an_epoch_ends_with_a_step(tmp_path: Path) -> None:
    """Of 4 iterations, in steps of 3 and 1, which is not divided by 3."""
    weights: dict[int, torch.Tensor] = {}

    def at(event: str, runner: Runner) -> None:
        weights[runner.iter] = runner.model.weight.detach().clone()

    noisy_runner(
        tmp_path, at=at, hooks=dict(stage_switch=None), **accumulating(3)
    ).train()
    steps = [i for i in range(20) if i and not weights[i].equal(weights[i - 1])]
    assert steps == [3, 4, 7, 8, 11, 12, 15, 16, 19]


class HalfModel(NoisyModel):
    """With a product in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        torch.nn.init.constant_(self.linear.weight, 0.3)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, inputs: torch.Tensor, mode: str = 'tensor') -> object:
        result = super().forward(inputs, mode)
        if mode == 'loss':
            product = self.linear(inputs)
            assert product.dtype == torch.bfloat16
            result['loss'] = result['loss'] + product.float().square().mean()
        return result


@pytest.mark.parametrize(('fused', 'counts'), [(True, 1), (True, 2), (False, 1)])
def test_mixed_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool, counts: int
) -> None:
    """mmengine's wrapper, with a scaler that lives on the CPU and searches its scale.

    At first scaled losses are infinite, and steps are skipped; later the scale grows.
    """
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    scaler = partial(torch.amp.GradScaler, 'cpu')
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', scaler)
    wrapper = dict(
        type='AmpOptimWrapper',
        dtype='bfloat16',
        loss_scale=dict(init_scale=2.0**127, growth_interval=4),
        accumulative_counts=counts,
        constructor=ParamGroupConstructor,
        optimizer=dict(type='AdamW', lr=0.05, fused=fused),
        clip_grad=dict(max_norm=1.0),
    )

    def run(work_dir: Path, **kwargs: object) -> int:
        return train(work_dir, model=HalfModel(), optim_wrapper=wrapper, **kwargs)

    def scale(work_dir: Path) -> dict:
        state = torch.load(work_dir / 'epoch_5.pth', weights_only=False)
        return state['optimizer']['loss_scaler']

    whole = tmp_path / 'whole'
    assert run(whole) == 0
    assert scale(whole)['scale'] < 2.0**127
    for iteration in (4, 14):  # within the search; after the reload of the best
        work_dir = tmp_path / f'killed_{iteration}'
        assert run(work_dir, at=kill_at('before', iteration)) == KILLED
        assert run(work_dir) == 0
        assert journal(work_dir) == journal(whole)
        assert scale(work_dir) == scale(whole)
