"""Which checkpoints are kept, and what is said about the disk."""

import errno
import logging
import re
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from killed_runs import METRIC, noisy_runner
from mmengine.runner import Runner

from mmbackbones.engine import disk_space
from mmbackbones.engine.disk_space import PatientVisBackend, checkpoint_bytes
from mmbackbones.engine.safe_checkpoint import SafeCheckpointHook

Usage = namedtuple('Usage', 'total used free')


def checkpoint_hook(**kwargs: object) -> dict:
    return dict(checkpoint=dict(type=SafeCheckpointHook, **kwargs))


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (dict(), ['epoch_3', 'epoch_4', 'epoch_5']),
        (
            dict(iter_interval=6, max_keep_ckpts=1),
            ['epoch_5', 'resume_12', 'resume_18'],
        ),
        (dict(iter_interval=0, interval=2), ['epoch_2', 'epoch_4', 'epoch_5']),
        (dict(max_keep_ckpts=-1), [f'epoch_{i}' for i in range(1, 6)]),
        (
            dict(interval=7, by_epoch=False, max_keep_ckpts=2, iter_interval=5),
            ['iter_14', 'iter_20', 'resume_10', 'resume_15'],
        ),
    ],
)
def test_what_is_kept(tmp_path: Path, options: dict, expected: list[str]) -> None:
    hooks = dict(checkpoint_hook(**options), stage_switch=None)
    noisy_runner(tmp_path, hooks=hooks).train()
    assert sorted(path.stem for path in tmp_path.glob('*.pth')) == sorted(expected)
    newest = (tmp_path / 'last_checkpoint').read_text()
    assert Path(newest).stem in ('epoch_5', 'iter_20')


def test_the_best_is_kept_and_its_successor_comes_first(tmp_path: Path) -> None:
    present: list[set[str]] = []

    def at(event: str, runner: Runner) -> None:
        present.append({path.name for path in tmp_path.glob('best*')})

    hooks = checkpoint_hook(save_best=METRIC, rule='less')
    runner = noisy_runner(tmp_path, at=at, hooks=hooks)
    save, during = runner.save_checkpoint, []

    def save_checkpoint(out_dir: str, filename: str, **kwargs: object) -> bool:
        if filename.startswith('best'):
            during.append({path.name for path in tmp_path.glob('best*')})
        return save(out_dir, filename, **kwargs)

    runner.save_checkpoint = save_checkpoint
    runner.train()
    assert len(during) > 1  # it was replaced
    assert [len(names) for names in during] == [0] + [1] * (len(during) - 1)
    (best,) = tmp_path.glob('best*')
    info = runner.message_hub.runtime_info
    assert info['best_ckpt'] == str(best)
    content = torch.load(best, weights_only=False)
    assert 'optimizer' not in content


def test_a_validation_alone_saves_nothing(tmp_path: Path) -> None:
    hooks = checkpoint_hook(save_best=METRIC, rule='less')
    assert METRIC in noisy_runner(tmp_path, hooks=hooks).val()
    assert not list(tmp_path.rglob('*.pth'))


def test_metrics_that_are_not_there_are_named(tmp_path: Path) -> None:
    hooks = checkpoint_hook(save_best='coco/segm_mAP', rule='greater')
    with pytest.raises(ValueError, match=rf"'coco/segm_mAP'.*{METRIC}"):
        noisy_runner(tmp_path, hooks=hooks).train()


def test_the_size_is_foreseen(tmp_path: Path) -> None:
    """Of a model whose tensors outweigh the rest of the file."""
    runner = noisy_runner(tmp_path)
    runner.model.register_parameter(
        'large', torch.nn.Parameter(torch.zeros(500_000), requires_grad=True)
    )
    forward = runner.model.forward

    def with_large(inputs: torch.Tensor, mode: str = 'tensor') -> object:
        result = forward(inputs, mode)
        if mode == 'loss':
            result['loss'] = result['loss'] + runner.model.large.square().sum()
        return result

    runner.model.forward = with_large
    runner.train()
    whole, weights = checkpoint_bytes(
        runner.model, runner.optim_wrapper.optimizer, averaged=True
    )
    assert whole == pytest.approx((tmp_path / 'epoch_5.pth').stat().st_size, rel=0.02)
    assert weights == pytest.approx(
        next(tmp_path.glob('best*')).stat().st_size, rel=0.02
    )


@pytest.mark.parametrize(('free', 'said'), [(10**12, False), (1000, True)])
def test_a_disk_that_is_too_small_is_said_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, said: bool
) -> None:
    monkeypatch.setattr(
        disk_space.shutil, 'disk_usage', lambda folder: Usage(0, 0, free)
    )
    warnings: list[str] = []

    class Started(Exception):
        pass

    def at(event: str, runner: Runner) -> None:
        raise Started

    runner = noisy_runner(tmp_path, at=at)
    runner.logger.warning = lambda text, *args: warnings.append(text)
    with pytest.raises(Started):
        runner.train()
    assert any('the disk will be FULL' in text for text in warnings) is said
    if said:
        assert any(re.search(r'takes about \d+ MiB', text) for text in warnings)


def test_scalars_that_cannot_be_written_do_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = PatientVisBackend(save_dir=str(tmp_path))
    backend.add_scalars(dict(a=1.0))
    written = (tmp_path / 'scalars.json').read_text()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr('mmengine.visualization.vis_backend.dump', full)
        backend.add_scalars(dict(a=2.0))
        backend.add_scalar('a', 3.0)
    assert (tmp_path / 'scalars.json').read_text().strip() == written.strip()
    backend.add_scalars(dict(a=4.0))
    assert '4.0' in (tmp_path / 'scalars.json').read_text()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match='iter_interval is -1'):
        SafeCheckpointHook(iter_interval=-1)
