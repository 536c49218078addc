"""Checkpoints of a folder in the order of the run, whatever the times of the files."""

import logging
import os
from pathlib import Path

import pytest
import torch
from killed_runs import noisy_runner

from mmbackbones.engine import atomic_files
from mmbackbones.engine.atomic_files import newest_first, resumable
from mmbackbones.engine.checkpoint_io import read_meta
from mmbackbones.engine.safe_checkpoint import SafeCheckpointHook


def write(folder: Path, time: int, **iterations: int | None) -> None:
    """Checkpoints by name, with the iteration they hold; None is a cut one."""
    for name, iteration in iterations.items():
        path = folder / f'{name}.pth'
        torch.save(dict(meta=dict(iter=iteration), state_dict={}), path)
        if iteration is None:
            path.write_bytes(path.read_bytes()[:-100])
        os.utime(path, (time, time))


def names(paths) -> list[str]:
    return [path.stem for path in paths]


@pytest.fixture(params=['as written', 'reversed', 'equal'])
def states(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Epochs of 40 iterations, the files' times as a copy may have left them."""
    order = {'as written': 1, 'reversed': -1, 'equal': 0}[request.param]
    held = dict(epoch_8=320, resume_350=350, epoch_9=360, epoch_10=400, resume_420=420)
    for i, name in enumerate(held):
        write(tmp_path, 10**9 + order * i, **{name: held[name]})
    return tmp_path


NEWEST_FIRST = ['resume_420', 'epoch_10', 'epoch_9', 'resume_350', 'epoch_8']


def test_states_come_by_iteration(states: Path) -> None:
    assert names(resumable(states)) == NEWEST_FIRST
    (states / 'last_checkpoint').write_text(str(states / 'resume_420.pth'))
    assert names(resumable(states)) == NEWEST_FIRST


def test_a_cut_one_does_not_disturb_the_others(states: Path) -> None:
    write(states, 1, epoch_11=None)
    (states / 'last_checkpoint').write_text(str(states / 'epoch_11.pth'))
    assert names(resumable(states)) == ['epoch_11', *NEWEST_FIRST]
    write(states, 2, epoch_9=None)
    left = [name for name in names(resumable(states)) if name != 'epoch_9']
    assert left == ['epoch_11', *(name for name in NEWEST_FIRST if name != 'epoch_9')]


def test_times_decide_between_states_of_one_iteration(tmp_path: Path) -> None:
    write(tmp_path, 100, epoch_2=80)
    write(tmp_path, 200, resume_80=80)
    assert names(resumable(tmp_path)) == ['resume_80', 'epoch_2']
    write(tmp_path, 300, epoch_2=80)
    assert names(resumable(tmp_path)) == ['epoch_2', 'resume_80']


def test_names_that_say_nothing_come_by_what_they_hold(tmp_path: Path) -> None:
    write(tmp_path, 300, mine=70)
    write(tmp_path, 200, iter_60=60)
    write(tmp_path, 100, epoch_2=80)
    torch.save(dict(state_dict={}), tmp_path / 'weights.pth')
    assert names(resumable(tmp_path)) == ['epoch_2', 'mine', 'iter_60', 'weights']


def test_no_more_files_are_read_than_need_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def reading(path: Path) -> dict | None:
        read.append(path.stem)
        return read_meta(path)

    monkeypatch.setattr(atomic_files, 'read_meta', reading)
    write(tmp_path, 1, **{f'epoch_{i}': 40 * i for i in range(1, 31)})
    write(tmp_path, 1, resume_1010=1010)
    assert names(newest_first(tmp_path.glob('*.pth')))[:6] == [
        'epoch_30', 'epoch_29', 'epoch_28', 'epoch_27', 'epoch_26', 'resume_1010'
    ]  # fmt: skip
    assert read == [f'epoch_{i}' for i in (30, 29, 28, 27, 26, 25)]


def test_meta_is_read_without_the_tensors(tmp_path: Path) -> None:
    noisy_runner(tmp_path).train()
    path = tmp_path / 'epoch_5.pth'
    assert (
        read_meta(path)['iter'] == torch.load(path, weights_only=False)['meta']['iter']
    )
    assert read_meta(tmp_path / 'none.pth') is None


def hook_of(folder: Path) -> SafeCheckpointHook:
    hook = SafeCheckpointHook()
    hook.out_dir, hook.filename_tmpl = str(folder), 'epoch_{}.pth'
    return hook


class FullDisk:
    """Stands for the runner, of which room-making knows only this."""

    disk_is_full = True

    logger = logging.getLogger('of the test')


def test_room_is_made_by_the_oldest_of_the_run(states: Path) -> None:
    hook = hook_of(states)
    for expected in NEWEST_FIRST[:0:-1]:
        assert hook._make_room(FullDisk, 440)
        assert not (states / f'{expected}.pth').exists()
    assert not hook._make_room(FullDisk, 440)
    assert names(states.glob('*.pth')) == ['resume_420']


def test_room_is_made_by_a_damaged_one_first(states: Path) -> None:
    write(states, 10**9 + 9, epoch_11=None)
    path = states / 'resume_420.pth'
    path.write_bytes(path.read_bytes()[:-50])
    hook = hook_of(states)
    assert hook._make_room(FullDisk, 440) and hook._make_room(FullDisk, 440)
    assert set(names(states.glob('*.pth'))) == set(NEWEST_FIRST[1:])


def test_states_ahead_of_the_run_are_the_first_to_go(tmp_path: Path) -> None:
    """The run was taken up at an earlier state than the last."""
    write(tmp_path, 9, resume_100=100, resume_900=900, epoch_20=800, epoch_1=40)
    hook = hook_of(tmp_path)
    assert names(hook._by_age(120, 'resume_*.pth', 'epoch_*.pth')) == [
        'epoch_20', 'resume_900', 'epoch_1', 'resume_100'
    ]  # fmt: skip
