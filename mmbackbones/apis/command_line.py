"""What the tools share: arguments as users of OpenMMLab expect them, and errors.

A mistake of the user ends with one line and exit status 2, not with a traceback.
"""

import argparse
import os
import sys
from collections.abc import Callable

from mmengine.config import DictAction

__all__ = ['make_parser', 'run_tool']


def make_parser(
    description: str, *, checkpoint: bool = False
) -> argparse.ArgumentParser:
    """Parser with the arguments that every tool over a config takes.

    Args:
        description: the tool's docstring, examples included.
        checkpoint: whether a checkpoint is the second positional argument.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file, see configs/')
    if checkpoint:
        parser.add_argument('checkpoint', help='ours, or an official release (.pth)')
    parser.add_argument('--data-root', help="data set folder, in place of the config's")
    parser.add_argument(
        '--work-dir', help='folder for what is written (work_dirs/<config name>)'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='any other value of the config, by its dotted key',
    )
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='how processes were started; dist_train.sh and slurm_train.sh set it',
    )
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0)
    return parser


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool; a `ValueError` becomes `error: <message>` and exit status 2.

    MMB_TRACEBACK=1 in the environment shows where it came from.
    """
    try:
        main()
    except ValueError as error:
        if os.environ.get('MMB_TRACEBACK'):
            raise
        # A data loader's worker sends its traceback along; the message comes last.
        message = str(error).rpartition('ValueError: ')[2].strip()
        print(
            f'error: {message}\n(MMB_TRACEBACK=1 shows where it was raised)',
            file=sys.stderr,
        )
        sys.exit(2)
