"""Stand-ins for Slurm's commands that run a job on this machine at once.

`install` writes `sbatch`, `srun` and `scontrol` to a folder for the front of PATH.
They set the variables that Slurm sets. `sbatch` runs the script in the foreground,
sends it the signal of `--signal=B:USR1@...` where the test asks for that, and starts
it again where `scontrol requeue` was called.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

__all__ = ['install']

_TEMPLATE = """#!/bin/sh
exec {python} {here} {name} "$@"
"""


def install(folder: Path) -> Path:
    """Write the commands; the folder."""
    folder.mkdir()
    here = Path(__file__).resolve()
    for name in ('sbatch', 'srun', 'scontrol'):
        path = folder / name
        path.write_text(_TEMPLATE.format(python=sys.executable, here=here, name=name))
        path.chmod(0o755)
    return folder


def _sbatch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument('-p')
    for name in ('job-name', 'nodes', 'ntasks', 'ntasks-per-node', 'cpus-per-task'):
        parser.add_argument(f'--{name}', required=True)
    for name in ('gres', 'output', 'open-mode', 'signal', 'time'):
        parser.add_argument(f'--{name}')
    parser.add_argument('--requeue', action='store_true')
    parser.add_argument('command', nargs=argparse.REMAINDER)
    args = parser.parse_args(arguments)
    state = Path(os.environ['FAKE_SLURM'])
    (state / 'sbatch').write_text('\n'.join(arguments))
    environment = dict(
        os.environ,
        SLURM_JOB_ID='4711',
        SLURM_JOB_NODELIST='node[1-1]',
        SLURM_NTASKS=args.ntasks,
        SLURM_CPUS_PER_TASK=args.cpus_per_task,
    )
    # Slurm runs a copy of the script.
    script = state / 'slurm_script'
    script.write_bytes(Path(args.command[0]).read_bytes())
    requests = state / 'requeue'
    for restart in range(5):
        if restart:
            environment['SLURM_RESTART_COUNT'] = str(restart)
        log = (state / 'job.out').open('a')
        job = subprocess.Popen(
            ['bash', str(script), *args.command[1:]],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        preempt = os.environ.get('FAKE_SLURM_PREEMPT')
        if preempt and not restart:
            while not Path(preempt).exists() and job.poll() is None:
                time.sleep(0.05)
            job.send_signal(signal.SIGUSR1)
        status = job.wait()
        if not requests.exists():
            return status
        requests.unlink()
    return status


def _srun(arguments: list[str]) -> int:
    first = next(i for i, word in enumerate(arguments) if not word.startswith('-'))
    count = int(os.environ['SLURM_NTASKS'])
    tasks = []

    def forward(number: int, _: object) -> None:
        for task in tasks:
            task.send_signal(number)

    signal.signal(signal.SIGUSR1, forward)
    for rank in range(count):
        names = dict(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NTASKS=count)
        environment = {**os.environ, 'SLURM_NODELIST': 'node[1-1]'}
        environment.update((name, str(value)) for name, value in names.items())
        tasks.append(subprocess.Popen(arguments[first:], env=environment))
    # A task that a signal ended counts as 128 + its number.
    statuses = [task.wait() for task in tasks]
    return max(128 - status if status < 0 else status for status in statuses)


def _scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ['show', 'hostnames']:
        print('127.0.0.1')
        return 0
    if arguments == ['requeue', '4711']:
        (Path(os.environ['FAKE_SLURM']) / 'requeue').touch()
        return 0
    return 1


if __name__ == '__main__':
    command = dict(sbatch=_sbatch, srun=_srun, scontrol=_scontrol)[sys.argv[1]]
    sys.exit(command(sys.argv[2:]))
