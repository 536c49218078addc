"""tools/slurm_train.sh against stand-ins of Slurm's commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_slurm import install

from mmbackbones.data.synthetic import draw_detection_set

ROOT = Path(__file__).parent.parent

# Takes the place of Python: notes how it was called; saves and leaves when asked to.
TRAINING = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
state = Path(os.environ['FAKE_SLURM'])
rank = os.environ['SLURM_PROCID']
start = os.environ.get('SLURM_RESTART_COUNT', '0')
names = ('MASTER_ADDR', 'MASTER_PORT', 'SLURM_NTASKS', 'SLURM_LOCALID')
call = dict({{n: os.environ[n] for n in names}}, arguments=sys.argv[1:])
# The second task is slow to save, as the one that writes is.
signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(int(rank)), sys.exit(75)))
(state / f'call_{{start}}_{{rank}}').write_text(json.dumps(call))
if os.environ.get('FAIL'):
    sys.exit(3)
if start == '0' and 'FAKE_SLURM_PREEMPT' in os.environ:
    while len(list(state.glob('call_0_*'))) < 2:
        time.sleep(0.05)
    Path(os.environ['FAKE_SLURM_PREEMPT']).touch()
    time.sleep(60)
"""


def submit(
    folder: Path, *arguments: object, **environment: object
) -> subprocess.CompletedProcess:
    """Run slurm_train.sh with the stand-ins on PATH; its state is `folder`."""
    commands = install(folder / 'bin')
    return subprocess.run(
        ['bash', 'tools/slurm_train.sh', *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            'PATH': f'{commands}:{os.environ["PATH"]}',
            'FAKE_SLURM': str(folder),
            'GPUS': '2',
            **{name: str(value) for name, value in environment.items()},
        },
    )


@pytest.fixture
def training(tmp_path: Path) -> Path:
    path = tmp_path / 'python'
    path.write_text(TRAINING.format(python=sys.executable))
    path.chmod(0o755)
    return path


def calls(folder: Path) -> dict[str, dict]:
    paths = sorted(folder.glob('call_*'))
    return {path.name[5:]: json.loads(path.read_text()) for path in paths}


def test_starts_a_process_for_each_gpu(tmp_path: Path, training: Path) -> None:
    done = submit(tmp_path, 'part', 'name', 'CFG', '--amp', PYTHON=training)
    assert done.returncode == 0, done.stderr
    request = (tmp_path / 'sbatch').read_text().split('\n')
    assert {'--gres=gpu:2', '--ntasks=2', '--nodes=1', '--requeue'} <= set(request)
    assert '--signal=B:USR1@120' in request
    found = calls(tmp_path)
    assert set(found) == {'0_0', '0_1'}
    assert found['0_1']['SLURM_LOCALID'] == '1'
    assert found['0_0']['MASTER_ADDR'] == '127.0.0.1'
    assert found['0_0']['MASTER_PORT'] == '24711'  # of the job, not 29500
    assert found['0_0']['arguments'] == [
        *('-u', str(ROOT / 'tools/train.py')),
        *('CFG', '--launcher', 'slurm', '--amp'),
    ]


def test_several_machines_are_counted(tmp_path: Path, training: Path) -> None:
    submit(tmp_path, 'p', 'n', 'CFG', PYTHON=training, GPUS=3, GPUS_PER_NODE=2)
    request = (tmp_path / 'sbatch').read_text().split('\n')
    assert {'--nodes=2', '--ntasks=3', '--ntasks-per-node=2'} <= set(request)


def test_without_gpus_none_are_asked_for(tmp_path: Path, training: Path) -> None:
    submit(tmp_path, 'p', 'n', 'CFG', PYTHON=training, GPUS_PER_NODE=0)
    request = (tmp_path / 'sbatch').read_text()
    assert '--gres' not in request and '--ntasks-per-node=2' in request


def test_preempted_job_is_queued_again_and_resumes(
    tmp_path: Path, training: Path
) -> None:
    done = submit(
        *(tmp_path, 'part', 'name', 'CFG'),
        PYTHON=training,
        FAKE_SLURM_PREEMPT=tmp_path / 'running',
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / 'job.out').read_text()
    assert 'exit status 75, job 4711 is queued again' in log
    found = calls(tmp_path)
    assert set(found) == {'0_0', '0_1', '1_0', '1_1'}
    assert '--resume' not in found['0_0']['arguments']
    assert found['1_1']['arguments'][-2:] == ['--resume', 'auto']


def test_failure_is_not_repeated(tmp_path: Path, training: Path) -> None:
    done = submit(tmp_path, 'part', 'name', 'CFG', PYTHON=training, FAIL=1)
    assert done.returncode == 3
    assert set(calls(tmp_path)) == {'0_0', '0_1'}


def test_usage_is_shown(tmp_path: Path) -> None:
    done = submit(tmp_path, 'part')
    assert done.returncode == 2 and 'PARTITION JOB_NAME CONFIG' in done.stdout


@pytest.mark.slow
def test_trains_for_real(tmp_path: Path) -> None:
    draw_detection_set(tmp_path / 'data', num_train=8, num_val=3, image_size=64)
    options = ('train_dataloader.batch_size=2', 'train_cfg.max_epochs=1')
    done = submit(
        *(tmp_path, 'part', 'name', 'configs/dfine_demo.py'),
        *('--data-root', tmp_path / 'data', '--work-dir', tmp_path / 'run'),
        *('--cfg-options', *options, 'default_hooks.logger.interval=1'),
        *('default_hooks.checkpoint.interval=1', 'model.decoder.num_layers=1'),
        PYTHON=sys.executable,
        GPUS_PER_NODE=0,
    )
    log = (tmp_path / 'job.out').read_text()
    assert done.returncode == 0, log[-3000:]
    assert 'Epoch(train) [1][2/2]' in log  # 8 images, 2 processes, 2 at a time
    assert (tmp_path / 'run' / 'epoch_1.pth').exists()
