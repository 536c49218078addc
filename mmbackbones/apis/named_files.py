"""Files that users name: configs and checkpoints."""

import difflib
from pathlib import Path

from mmengine.runner import CheckpointLoader

from mmbackbones.inference.runtimes import SUFFIXES

__all__ = ['check_checkpoint', 'find_config', 'read_checkpoint']

_CONFIGS = ('.py', '.json', '.yaml', '.yml')
_CHECKPOINTS = ('.pth', '.pt', '.safetensors', '.pdparams', '.bin', '.ckpt')
_EXPORTED = sorted({suffix for known in SUFFIXES.values() for suffix in known})
_WHAT = (
    'a checkpoint holds weights: a .pth file of tools/train.py or of an official '
    'release, .safetensors or .pdparams'
)


def find_config(name: str) -> str:
    """Path of a config: of a file, or of one in `configs/` by its stem.

    Raises:
        ValueError: there is none, with similar names.
    """
    suffix = Path(name).suffix.lower()
    if suffix in _CONFIGS:
        if Path(name).is_file():
            return name
        raise ValueError(f'config file {name!r} does not exist; see configs/')
    if suffix in _CHECKPOINTS:
        raise ValueError(
            f'{name!r} is a checkpoint, which comes second, after its config (a file '
            'or a name of configs/)'
        )
    folder = Path(__file__).parents[2] / 'configs'
    shipped = {path.stem: path for path in folder.glob('*.py')}
    if name in shipped:
        return str(shipped[name])
    similar = difflib.get_close_matches(name, shipped, n=3, cutoff=0.4)
    raise ValueError(
        f'{name!r} is no config file (.py), no exported file (.onnx, .xml, .engine, '
        f'.pt2) and no name of a config in {str(folder)!r}'
        + (f'; similar ones are {", ".join(similar)}' if similar else '')
    )


def check_checkpoint(path: str) -> None:
    """See that a checkpoint is there, before anything is built for it.

    Raises:
        ValueError: it is not, or it is an exported file.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _EXPORTED:
        raise ValueError(
            f'checkpoint {path!r} is an exported file ({suffix}), which holds its '
            'weights and stands alone, as first argument of Inferencer, tools/infer.py '
            f'and tools/serve.py, without a config; {_WHAT}'
        )
    if '://' not in path and not Path(path).expanduser().is_file():
        raise ValueError(f'checkpoint {path!r} does not exist')


def read_checkpoint(path: str) -> dict:
    """A mapping with `state_dict`, and `meta` where the file has it.

    Raises:
        ValueError: it is missing, unreadable or no checkpoint.
    """
    check_checkpoint(path)
    try:
        return CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except ValueError as error:
        if 'weights_only' not in str(error):
            raise
        # Without torch's text, which advises to run whatever the file holds.
        raise ValueError(
            f'checkpoint {path!r} cannot be read, it is truncated or of another '
            f'format; {_WHAT}'
        ) from error
