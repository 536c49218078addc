"""What launchers set is understood; what they did not set is named."""

import os

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper

import mmbackbones  # noqa: F401
from mmbackbones.apis import cpu_processes
from mmbackbones.apis.config import prepare
from mmbackbones.apis.cpu_processes import check_launcher, init_cpu_processes

THEIRS = ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID')
OURS = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list:
    """Calls of `init_process_group`, in an environment of no launcher."""
    for name in (*THEIRS, *OURS):
        # Set first, so that what the function sets is undone as well.
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)
    calls = []
    monkeypatch.setattr(
        dist, 'init_process_group', lambda *args, **kwargs: calls.append((args, kwargs))
    )
    return calls


def test_no_launcher_is_named(started: list) -> None:
    with pytest.raises(ValueError, match='lacks RANK, WORLD_SIZE, LOCAL_RANK'):
        init_cpu_processes('pytorch')
    with pytest.raises(ValueError, match="launcher is 'pbs'; choose from pytorch"):
        init_cpu_processes('pbs')
    assert started == []


def test_processes_that_do_not_know_of_each_other(
    started: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun tools/train.py, without --launcher."""
    check_launcher('none')
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '1')
    check_launcher('none')
    monkeypatch.setenv('WORLD_SIZE', '2')
    check_launcher('pytorch')
    with pytest.raises(ValueError, match='2 processes were started, but --launcher is'):
        check_launcher('none')


def test_slurm_becomes_torch(started: list, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(THEIRS, ('9', '16', '1'), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('SLURM_NODELIST', 'node[3-4]')
    monkeypatch.setattr(cpu_processes, '_first_host', lambda nodes: nodes[:4] + '3')
    init_cpu_processes('slurm', timeout=90)
    assert [os.environ[name] for name in OURS] == ['9', '16', '1', 'node3', '29500']
    ((args, kwargs),) = started
    assert args == ('gloo',) and kwargs['timeout'].total_seconds() == 90


def test_unreadable_hosts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PATH', '')
    with pytest.raises(ValueError, match='set MASTER_ADDR to the first host'):
        cpu_processes._first_host('node[1-2]')


@pytest.mark.parametrize('kind', [AmpOptimWrapper, 'AmpOptimWrapper'])
def test_mixed_precision_is_left_to_gpus(
    monkeypatch: pytest.MonkeyPatch, kind: type | str
) -> None:
    """Also where a config states no scale."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    wrapper = dict(type=kind, dtype='bfloat16', accumulative_counts=2)
    cfg = prepare(Config(dict(model=dict(), optim_wrapper=wrapper)))
    assert cfg.optim_wrapper == dict(type='OptimWrapper', accumulative_counts=2)
