"""Checkpoints are whole or not there; the newest whole one is resumed."""

import errno
import logging
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from killed_runs import in_child, journal, kill_at, noisy_runner, train
from mmengine.fileio import LocalBackend
from mmengine.runner import Runner

from mmbackbones.engine.atomic_files import is_whole, resumable

KILLED = -signal.SIGKILL


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its fourth epoch, after 14 iterations."""
    work_dir = tmp_path_factory.mktemp('run')
    assert train(work_dir, at=kill_at('before', 14)) == KILLED
    return work_dir


@pytest.fixture
def work_dir(run: Path, tmp_path: Path) -> Path:
    """A copy of it, which keeps the times of the files."""
    shutil.copytree(run, tmp_path / 'copy')
    (tmp_path / 'copy' / 'last_checkpoint').write_text(
        str(tmp_path / 'copy' / 'epoch_3.pth')
    )
    return tmp_path / 'copy'


def resumed_iteration(work_dir: Path, messages: list[str] | None = None) -> int:
    """Where a resumed run begins; its warnings go to `messages`."""

    class Found(Exception):
        pass

    def stop(event: str, runner: Runner) -> None:
        raise Found(runner.iter)

    runner = noisy_runner(work_dir, resume=True, at=stop)
    if messages is not None:
        runner.logger.warning = lambda text, *args: messages.append(text)
    with pytest.raises(Found) as found:
        runner.train()
    return found.value.args[0]


def test_what_lies_there(work_dir: Path) -> None:
    names = {path.name for path in work_dir.glob('*.pth')}
    states = {'epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth', 'resume_9.pth',
              'resume_12.pth', 'stage1_best.pth'}  # fmt: skip
    assert names >= states and len(names) == len(states) + 1
    assert (work_dir / 'last_checkpoint').read_text().endswith('epoch_3.pth')
    assert resumed_iteration(work_dir) == 12
    assert all(is_whole(path) for path in work_dir.glob('*.pth'))


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'one byte', 'gone'])
def test_a_damaged_last_one_is_said_and_the_one_before_taken(
    work_dir: Path, damage: str
) -> None:
    last = work_dir / 'epoch_3.pth'
    data = bytearray(last.read_bytes())
    if damage == 'gone':
        last.unlink()
    else:
        data[len(data) // 2] ^= 1
        sizes = {'truncated': len(data) - 100, 'empty': 0, 'one byte': len(data)}
        last.write_bytes(data[: sizes[damage]])
    (work_dir / 'resume_12.pth').unlink()
    os.utime(work_dir / 'epoch_1.pth')  # as a copy may leave the times
    messages: list[str] = []
    assert resumed_iteration(work_dir, messages) == 9
    (said,) = (text for text in messages if 'epoch_3.pth' in text)
    assert 'truncated, damaged or gone' in said and 'resume_9.pth' in said


def test_order_of_candidates(work_dir: Path) -> None:
    names = [path.name for path in resumable(work_dir)]
    assert names[0] == 'epoch_3.pth'
    assert not any('best' in name for name in names) and len(names) == 5


def test_a_work_dir_that_moved_or_was_copied(work_dir: Path, run: Path) -> None:
    for folder in (Path('/nowhere'), run):
        (work_dir / 'last_checkpoint').write_text(str(folder / 'epoch_2.pth'))
        assert next(resumable(work_dir)) == work_dir / 'epoch_2.pth'
    assert resumed_iteration(work_dir) == 8


def test_nothing_to_resume_starts_at_the_beginning(tmp_path: Path) -> None:
    messages: list[str] = []
    assert resumed_iteration(tmp_path, messages) == 0
    assert any('No checkpoint to resume from' in text for text in messages)


def test_a_first_start_takes_the_weights_that_the_config_names(
    run: Path, tmp_path: Path
) -> None:
    """`--resume auto` from the first start on: fine-tuning must not lose its start."""

    class Found(Exception):
        pass

    def stop(event: str, runner: Runner) -> None:
        raise Found(runner.iter, runner.model.state_dict())

    weights = run / 'epoch_2.pth'
    for work_dir, iteration in ((tmp_path, 0), (run, 12)):
        runner = noisy_runner(work_dir, resume='auto', load_from=str(weights), at=stop)
        with pytest.raises(Found) as found:
            runner.train()
        begun, state = found.value.args
        assert begun == iteration
        expected = torch.load(weights, weights_only=False)['state_dict']
        equal = [torch.equal(state[name], expected[name]) for name in expected]
        assert all(equal) == (work_dir == tmp_path)


def test_weights_alone_are_not_resumed_from(run: Path, tmp_path: Path) -> None:
    """Else the optimiser would start anew, and nobody be told."""
    (best,) = run.glob('best*')
    plain = tmp_path / 'plain.pth'
    torch.save(torch.load(best, weights_only=False)['state_dict'], plain)
    for path, lacking in (
        (best, 'lacks optimizer: it'),
        (plain, 'lacks epoch, iter, message_hub, optimizer: it'),
    ):
        runner = noisy_runner(tmp_path, resume=True, load_from=str(path))
        with pytest.raises(ValueError, match=f'{path.name}.*{lacking} holds weights'):
            runner.train()


def test_a_run_that_saves_no_optimiser_is_resumed_with_a_warning(
    tmp_path: Path,
) -> None:
    checkpoint = dict(type='SafeCheckpointHook', interval=1, save_optimizer=False)
    hooks = dict(checkpoint=checkpoint, stage_switch=None)
    noisy_runner(tmp_path, hooks=hooks).train()
    messages: list[str] = []
    runner = noisy_runner(tmp_path, hooks=hooks, resume=True)
    runner.logger.warning = lambda text, *args: messages.append(text)
    runner.train()
    assert any('has no optimizer, which starts anew' in text for text in messages)


@pytest.mark.parametrize('scheduled', [True, False])
def test_a_learning_rate_that_was_lowered_holds(
    tmp_path: Path, scheduled: bool
) -> None:
    """Also after the best of the first stage is loaded, which has the former."""
    overrides = {} if scheduled else dict(param_scheduler=None)
    rates: dict[float, dict[int, float]] = {}

    def runner_of(folder: str, lr: float, end: int = -1) -> Runner:
        def at(event: str, runner: Runner) -> None:
            if runner.iter == end:
                raise InterruptedError
            (rate,) = runner.optim_wrapper.get_lr()['lr']
            rates.setdefault(lr, {})[runner.iter] = rate

        wrapper = dict(optimizer=dict(type='AdamW', lr=lr))
        return noisy_runner(
            tmp_path / folder, at=at, optim_wrapper=wrapper, resume=True, **overrides
        )

    (tmp_path / 'a').mkdir()
    with pytest.raises(InterruptedError):
        runner_of('a', 0.05, end=9).train()
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    runner_of('a', 0.05).train()
    messages: list[str] = []
    lowered = runner_of('b', 0.005)
    lowered.logger.warning = lambda text, *args: messages.append(text)
    lowered.train()
    assert any('not of the checkpoint (rate 0.05 -> 0.005)' in m for m in messages)
    assert min(rates[0.005]) == 9
    for iteration, rate in rates[0.005].items():
        # The best that is reloaded may be of another epoch, whose warm-up it repeats.
        assert rate <= 0.005
        if iteration <= 12:
            assert rate == pytest.approx(rates[0.05][iteration] / 10)


def test_nothing_whole_is_an_error(work_dir: Path) -> None:
    for path in work_dir.glob('*.pth'):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r'none of the checkpoints.*epoch_3\.pth'):
        noisy_runner(work_dir, resume=True).train()


def test_killed_while_writing(tmp_path: Path) -> None:
    """Half of the fourth checkpoint is on the disk, and not under its name."""
    put, calls = LocalBackend.put, []

    def half(self: LocalBackend, data: bytes, path: str) -> None:
        calls.append(path)
        if len(calls) == 4:
            put(self, data[: len(data) // 2], path)
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, data, path)

    def work() -> None:
        LocalBackend.put = half
        noisy_runner(tmp_path).train()

    assert in_child(work) == KILLED
    (partial,) = tmp_path.glob('.*.partial')
    assert not is_whole(partial)
    assert all(is_whole(path) for path in tmp_path.glob('*.pth'))
    assert train(tmp_path) == 0
    assert not list(tmp_path.glob('.*.partial'))
    whole = tmp_path / 'whole'
    assert train(whole) == 0
    assert journal(tmp_path) == journal(whole)


def full_disk(monkeypatch: pytest.MonkeyPatch, when: list[bool]) -> None:
    """Writing a checkpoint fails half-way while `when[0]`."""
    put = LocalBackend.put

    def fail(self: LocalBackend, data: bytes, path: str) -> None:
        if not when[0]:
            return put(self, data, path)
        put(self, data[: len(data) // 2], path)
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(LocalBackend, 'put', fail)


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [False]
    full_disk(monkeypatch, full)
    present: dict[int, set[str]] = {}

    def at(event: str, runner: Runner) -> None:
        full[0] = 5 <= runner.iter < 15
        present[runner.iter] = {path.name for path in tmp_path.glob('*.pth')}

    runner = noisy_runner(tmp_path, at=at)
    errors: list[str] = []
    runner.logger.error = lambda text, *args: errors.append(text)
    runner.train()
    assert errors and all('could NOT be written' in text for text in errors)
    assert not list(tmp_path.glob('.*.partial'))
    # One whole state was never given up.
    assert all(
        any(name.startswith(('epoch', 'resume')) for name in names)
        for iteration, names in present.items()
        if iteration > 3
    )
    assert runner.iter == 20
    last = (tmp_path / 'last_checkpoint').read_text()
    assert last.endswith('epoch_5.pth') and is_whole(last)


def test_the_end_of_training_that_cannot_be_saved_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [False]
    full_disk(monkeypatch, full)

    def at(event: str, runner: Runner) -> None:
        full[0] = runner.iter >= 14

    with pytest.raises(OSError, match='end of training could not be written'):
        noisy_runner(tmp_path, at=at).train()


def test_the_system_refuses_to_write(tmp_path: Path) -> None:
    """A real error of the kernel: files may not grow beyond half a checkpoint."""
    assert train(tmp_path / 'free') == 0
    size = (tmp_path / 'free' / 'epoch_5.pth').stat().st_size

    def at(event: str, runner: Runner) -> None:
        limit = size // 2 if 5 <= runner.iter < 15 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    tight = tmp_path / 'tight'
    assert train(tight, at=at, log_level=logging.CRITICAL) == 0
    assert journal(tight) == journal(tmp_path / 'free')
    kept = sorted(path.name for path in tight.glob('epoch*'))
    assert kept == ['epoch_1.pth', 'epoch_4.pth', 'epoch_5.pth']
    assert not list(tight.glob('.*.partial'))


def test_checkpoints_load_elsewhere(work_dir: Path) -> None:
    content = torch.load(work_dir / 'epoch_3.pth', weights_only=False)
    assert {'state_dict', 'ema_state_dict', 'optimizer', 'message_hub', 'meta',
            'param_schedulers'} == set(content)  # fmt: skip
