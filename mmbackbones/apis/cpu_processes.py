"""Several processes without a GPU: what mmengine's launchers do, less CUDA.

MMEngine's `init_dist` calls `torch.cuda.set_device` whatever the backend, which a
CPU-only torch refuses. It leaves a process group alone that exists already, so here
one is made before the Runner is.
"""

import os
import subprocess
from datetime import timedelta

import torch.distributed as dist

__all__ = ['check_launcher', 'init_cpu_processes']

# What a launcher calls rank, number of processes and rank within the machine.
_NAMES = dict(
    pytorch=('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    slurm=('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    mpi=(
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_LOCAL_RANK',
    ),
)


def check_launcher(launcher: str) -> None:
    """See that processes which torchrun started know of each other, on GPUs too.

    Raises:
        ValueError: `launcher` is 'none' in one of several.
    """
    count = os.environ.get('WORLD_SIZE', '1')
    if launcher == 'none' and 'LOCAL_RANK' in os.environ and count != '1':
        raise ValueError(
            f'{count} processes were started, but --launcher is none: each would do '
            'all of the work, in the same work dir. Add --launcher pytorch'
        )


def init_cpu_processes(launcher: str, *, timeout: float | None = None) -> None:
    """Join the other processes of this run over gloo, once.

    Sets `RANK`, `WORLD_SIZE`, `LOCAL_RANK` and, where they are not set, `MASTER_ADDR`
    (under Slurm the first host of the job) and `MASTER_PORT` (29500).

    Args:
        launcher: 'pytorch', 'slurm' or 'mpi', as of mmengine's Runner.
        timeout: seconds after which a process that waits for another gives up; None
            takes torch's.

    Raises:
        ValueError: an unknown launcher, or one that did not start this process.
    """
    if dist.is_initialized():
        return
    if launcher not in _NAMES:
        raise ValueError(f'launcher is {launcher!r}; choose from {", ".join(_NAMES)}')
    missing = [name for name in _NAMES[launcher] if name not in os.environ]
    if missing:
        raise ValueError(
            f'--launcher {launcher}: the environment lacks {", ".join(missing)}; start '
            'the processes by tools/dist_train.sh or tools/slurm_train.sh, or leave '
            '--launcher out for a single process'
        )
    for name, theirs in zip(_NAMES['pytorch'], _NAMES[launcher], strict=True):
        os.environ[name] = os.environ[theirs]
    if launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
        os.environ['MASTER_ADDR'] = _first_host(os.environ['SLURM_NODELIST'])
    os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
    os.environ.setdefault('MASTER_PORT', '29500')
    limit = None if timeout is None else timedelta(seconds=timeout)
    dist.init_process_group('gloo', timeout=limit)


def _first_host(node_list: str) -> str:
    """First name in Slurm's short form, such as `node[3-6,9]`."""
    command = ['scontrol', 'show', 'hostnames', node_list]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f'SLURM_NODELIST {node_list!r} could not be read by scontrol ({error}); '
            'set MASTER_ADDR to the first host of the job'
        ) from error
    return done.stdout.split()[0]
