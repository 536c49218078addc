"""What the tools share: arguments as users of OpenMMLab expect them, and errors.

A mistake of the user ends with one line and exit status 2, not with a traceback.
"""

import argparse
import difflib
import inspect
import os
import sys
from collections.abc import Callable, Iterable

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

__all__ = ['add_launcher', 'check_keys', 'make_parser', 'run_tool']

# What the Runner looks up in a config besides its own arguments.
_OPTIONAL_KEYS = (
    *('activation_checkpointing', 'compile', 'efficient_conv_bn_eval'),
    *('custom_imports', 'find_unused_parameters', 'model_wrapper_cfg'),
    *('runner_type', 'sync_bn'),
)


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
    parser.add_argument('config', help='config file, or its name in configs/')
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
    return parser


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a tool that may run as several processes."""
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='how processes were started; dist_train.sh and slurm_train.sh set it',
    )
    parser.add_argument(
        '--local-rank',
        '--local_rank',
        type=int,
        help='as torch.distributed.launch passes it; LOCAL_RANK is what counts',
    )


def check_keys(cfg: Config, options: Iterable[str]) -> None:
    """See that something reads what `--cfg-options` sets.

    Args:
        cfg: of the file.
        options: dotted keys; only what stands first is looked at. Whoever builds from
            the rest refuses what it does not know.

    Raises:
        ValueError: a key that is misspelt, which would change nothing in silence.
    """
    known = {*cfg, *inspect.signature(Runner).parameters, *_OPTIONAL_KEYS}
    for option in options:
        key = option.partition('.')[0]
        if key not in known:
            similar = difflib.get_close_matches(key, known, n=1)
            raise ValueError(
                f'--cfg-options {option}: neither the config nor the Runner has {key!r}'
                + (f'; did you mean {similar[0]!r}?' if similar else '')
            )


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
