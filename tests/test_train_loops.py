"""Toy runs that are killed at every iteration, resumed, and compared bit by bit."""

import signal
from pathlib import Path

import pytest
from killed_runs import EPOCH_LENGTH, journal, kill_at, noisy_runner, train
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

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
