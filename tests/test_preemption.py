"""SIGTERM and SIGUSR1: the step is finished, saved, and the exit code says requeue."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from killed_runs import (
    RANKS,
    in_child,
    in_ranks,
    journal,
    kill_at,
    noisy_runner,
    train,
)
from mmengine.runner import Runner

from mmbackbones.engine.preemption import PreemptionHook

REQUEUE = 75


def send(number: int, event: str, iteration: int, *, group: bool = False):
    """A signal to the own process, or to all of its group, at an event."""

    def at(now: str, runner: Runner) -> None:
        if now == event and runner.iter == iteration:
            if group:
                os.killpg(0, number)
                time.sleep(0.3)  # for the workers to die of it, if they would
            else:
                os.kill(os.getpid(), number)

    return at


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict:
    work_dir = tmp_path_factory.mktemp('whole')
    assert train(work_dir) == 0
    return journal(work_dir)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_the_step_is_finished_and_saved(
    whole: dict, tmp_path: Path, number: int
) -> None:
    assert train(tmp_path, at=send(number, 'before', 9)) == REQUEUE
    assert (tmp_path / 'last_checkpoint').read_text().endswith('resume_10.pth')
    assert train(tmp_path) == 0
    assert journal(tmp_path) == whole


def test_workers_live_on(whole: dict, tmp_path: Path) -> None:
    """Slurm signals all processes of a step."""
    at = send(signal.SIGTERM, 'before', 5, group=True)
    start = time.monotonic()

    def work() -> None:
        os.setpgid(0, 0)
        noisy_runner(tmp_path, num_workers=2, at=at).train()

    assert in_child(work) == REQUEUE
    assert time.monotonic() - start < 60  # nobody waits for the workers' end
    assert (tmp_path / 'last_checkpoint').read_text().endswith('resume_6.pth')
    assert train(tmp_path) == 0
    assert journal(tmp_path) == whole


@pytest.mark.parametrize('by_epoch', [True, False])
def test_accumulated_gradients_are_stepped_with_first(
    tmp_path: Path, by_epoch: bool
) -> None:
    """Of 4 iterations; validations are within a step where iterations are counted."""
    wrapper = dict(optimizer=dict(type='AdamW', lr=0.05), accumulative_counts=4)
    options = dict(by_epoch=by_epoch, optim_wrapper=wrapper)
    whole = tmp_path / 'whole'
    assert train(whole, **options) == 0
    events = [('before', 9, 12)]
    if not by_epoch:
        events.append(('validation', 6, 8))
    for event, iteration, done in events:
        work_dir = tmp_path / event
        at = send(signal.SIGTERM, event, iteration)
        assert train(work_dir, at=at, **options) == REQUEUE
        newest = (work_dir / 'last_checkpoint').read_text()
        assert torch.load(newest, weights_only=False)['meta']['iter'] == done
        assert train(work_dir, **options) == 0
        assert journal(work_dir) == journal(whole)


def test_in_a_validation(whole: dict, tmp_path: Path) -> None:
    """Nothing lies there of this iteration but the state from before it."""
    hooks = dict(checkpoint=dict(no_epochs(), iter_interval=0))
    at = send(signal.SIGTERM, 'validation', 8)
    assert train(tmp_path, at=at, hooks=hooks) == REQUEUE
    content = torch.load(tmp_path / 'resume_8.pth', weights_only=False)
    assert content['meta']['epoch'] == 2
    trained = content['ema_state_dict']['module.weight']
    assert not torch.equal(trained, content['state_dict']['weight'])
    assert 'score 8' not in journal(tmp_path)
    assert train(tmp_path, hooks=hooks) == 0
    assert journal(tmp_path) == whole


def no_epochs() -> dict:
    from killed_runs import METRIC, SafeCheckpointHook

    return dict(type=SafeCheckpointHook, interval=100, save_best=METRIC, rule='greater')


@pytest.mark.parametrize('event', ['before', 'validation'])
def test_all_ranks_leave_when_one_is_signalled(tmp_path: Path, event: str) -> None:
    """The second of two, which sees it 2 steps before the ranks agree, or validates."""

    hooks = dict(preemption=dict(type=PreemptionHook, agree_every=4))
    overrides: dict = dict(RANKS, hooks=hooks)
    if event == 'before':
        hooks['stage_switch'] = None
        overrides.update(val_dataloader=None, val_evaluator=None, val_cfg=None)

    def work(rank: int) -> None:
        at = send(signal.SIGUSR1, event, 5 if event == 'before' else 4)
        quiet = kill_at('never', 0)
        noisy_runner(tmp_path, at=at if rank else quiet, **overrides).train()

    assert in_ranks(work) == [REQUEUE, REQUEUE]
    done = 8 if event == 'before' else 4
    ends = [
        (tmp_path / f'journal_rank{rank}').read_text().splitlines()[-1].split()[:2]
        for rank in (0, 1)
    ]
    last = ['loss', '7'] if event == 'before' else ['score', '4']
    assert ends == [last, last]
    newest = (tmp_path / 'last_checkpoint').read_text()
    assert torch.load(newest, weights_only=False)['meta']['iter'] == done


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    noisy_runner(tmp_path).train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='agree_every is 0'):
        PreemptionHook(agree_every=0)
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
    with pytest.raises(ValueError, match='saves with SafeCheckpointHook'):
        noisy_runner(tmp_path, hooks=hooks).train()
