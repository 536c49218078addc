"""Reading checkpoint files as data: tensors and plain values, never code.

MMEngine reads a checkpoint with `torch.load` and leaves `weights_only` to the
version of torch. Up to 2.5 that runs whatever a file says; from 2.6 on it refuses
the training log that MMEngine itself saves, so that no run can be resumed. Here it
is always on, and what MMEngine's Runner saves is allowed, name by name.
"""

import ast
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from urllib.parse import urlsplit

import numpy as np
import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
)

from mmbackbones.convert.paddle_reader import is_plain_pickle, read_pdparams

__all__ = ['load_from_http', 'load_from_local', 'read_meta', 'register_loaders']

ARRAY_DTYPES = (np.bool_, np.int32, np.int64, np.float32, np.float64)
"""Of logged scalars; a checkpoint's weights are tensors, not arrays."""


def _under_name(path: str, function: Callable) -> Callable:
    """`function` as the unpickler is to know it, `module.name`."""

    def call(*args):
        return function(*args)

    call.__module__, _, call.__name__ = path.rpartition('.')  # torch 2.4 reads this
    call.__qualname__ = call.__name__
    return call


def _history_method(owner: type, name: str) -> Callable:
    """The one use of `getattr` in a log: a statistic of `HistoryBuffer`."""
    if owner is not HistoryBuffer or name not in ('current', 'max', 'mean', 'min'):
        raise UnpicklingError(f'Unsupported use of GLOBAL builtins.getattr: {name!r}')
    return getattr(owner, name)


@cache
def _allowed_globals() -> tuple[Callable, ...]:
    """All that a file of the Runner names beyond torch's own list."""
    array, multiarray = np.zeros(1), []
    for name, function in (
        ('_reconstruct', array.__reduce__()[0]),
        ('scalar', array[0].__reduce__()[0]),
    ):
        for package in ('core', '_core'):  # of numpy 1 and 2
            path = f'numpy.{package}.multiarray.{name}'
            multiarray.append(_under_name(path, function))
    return (
        HistoryBuffer,
        Namespace,  # the arguments, in what the official trainers save
        _under_name('builtins.getattr', _history_method),
        _under_name('builtins.bytes', lambda: b''),  # the data of an empty array
        # The data of others; torch 2.4 does not have it on its list.
        _under_name('_codecs.encode', lambda text, _: text.encode('latin1')),
        np.ndarray,
        np.dtype,
        *(type(np.dtype(kind)) for kind in ARRAY_DTYPES),
        *multiarray,
    )


@contextmanager
def _allowing(allowed: tuple[Callable, ...]) -> Iterator[None]:
    """Widen torch's list for the block only (`safe_globals` came with torch 2.5)."""
    before = list(get_safe_globals())
    add_safe_globals(list(allowed))
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def _is_torchscript(path: Path) -> bool:
    """Such a file holds code, and torch before 2.6 would load it all the same."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith('/constants.pkl') for name in archive.namelist())


def _read(path: Path, map_location) -> object:
    """What the file holds; ValueError with one clear line where it cannot be had."""
    if not path.is_file():
        raise ValueError(f'checkpoint {str(path)!r} does not exist')
    if _is_torchscript(path):
        raise ValueError(
            f'checkpoint {str(path)!r} is a TorchScript program, not a set of weights'
        )
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(path)
        if is_plain_pickle(path):
            return read_pdparams(path)
        with _allowing(_allowed_globals()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch lets through whatever a broken file provokes
        text = str(error)
        refused = re.search(r'GLOBAL ([\w.]+\w)', text)
        if isinstance(error, UnpicklingError) and refused:
            raise ValueError(
                f'checkpoint {str(path)!r} was refused: it names '
                f'{refused[1]!r}, which is code and not data. Nothing of it was run. '
                'Convert it to plain tensors where it was made'
            ) from error
        reason = text.strip().partition('\n')[0]
        raise ValueError(
            f'checkpoint {str(path)!r} cannot be read, it is truncated or of another '
            f'format ({type(error).__name__}: {reason})'
        ) from error


def _normalise(content: object, path: Path) -> dict:
    """One form for all: a mapping with `state_dict` and `meta`.

    The releases of D-FINE and RT-DETR hold `model` and, where they were saved in
    training, `ema.module`, the weights that were evaluated: these win. Those of
    Hiera hold `model_state`.
    """
    if not isinstance(content, Mapping):
        raise ValueError(
            f'checkpoint {str(path)!r} holds no weights: a mapping is needed, it is '
            f'of type {type(content).__name__}'
        )
    ema = content.get('ema')
    if 'state_dict' in content:
        weights, result = content['state_dict'], content
    elif isinstance(ema, Mapping) and 'module' in ema:
        print_log(f'Takes the averaged weights (ema) of {path}', 'current')
        weights = ema['module']
        result = {'state_dict': weights, 'meta': {}}
    else:
        weights = content.get('model', content.get('model_state', content))
        result = {'state_dict': weights, 'meta': {}}
    values = weights.values() if isinstance(weights, Mapping) else ()
    if not any(isinstance(value, Tensor) for value in values):
        raise ValueError(
            f'checkpoint {str(path)!r} holds no weights; looked for tensors under '
            "'state_dict', 'ema.module', 'model', 'model_state' and the top level, "
            f'found the keys {sorted(map(str, content))[:10]}'
        )
    return result


# All that MMEngine's dump of a config consists of.
_DATA_NODES = (
    *(ast.Module, ast.Assign, ast.Name, ast.Store, ast.Load, ast.Constant),
    *(ast.Dict, ast.List, ast.Tuple, ast.Set, ast.UnaryOp, ast.USub),
    *(ast.Call, ast.keyword),
)
_DATA_CALLS = ('dict', 'list', 'tuple', 'set', 'float')


def _is_data(text: str) -> bool:
    """Whether the text of a config only assigns values."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return False
    return all(isinstance(node, _DATA_NODES) for node in nodes) and all(
        isinstance(node.func, ast.Name) and node.func.id in _DATA_CALLS
        for node in nodes
        if isinstance(node, ast.Call)
    )


def _without_code(content: dict, path: Path) -> dict:
    """Leave out a config that is a program: MMEngine would run it on resume."""
    meta = content.get('meta')
    for key in ('cfg', 'config'):
        text = meta.get(key) if isinstance(meta, dict) else None
        if isinstance(text, str) and not _is_data(text):
            del meta[key]
            print_log(
                f'The config inside checkpoint {str(path)!r} is left out: it does '
                'more than assign values, and reading it would run that',
                'current',
                level=30,
            )
    return content


def load_from_local(filename: str, map_location=None) -> dict:
    """Read a `.pth`, `.safetensors` or `.pdparams` file.

    Args:
        filename: path; `~` is the home folder.
        map_location: as of `torch.load`; `.safetensors` stay on the CPU.

    Returns:
        The file's mapping if it has `state_dict`; otherwise
        `{'state_dict': weights, 'meta': {}}`.

    Raises:
        ValueError: no such file, truncated, no weights inside, or a pickle that
            names code (which is then not run).
    """
    path = Path(filename).expanduser()
    return _without_code(_normalise(_read(path, map_location), path), path)


def read_meta(filename: str | Path) -> dict | None:
    """The `meta` of a checkpoint of the Runner, without reading its tensors.

    Returns:
        An empty one where the file has none; None where it cannot be read.
    """
    try:
        with _allowing(_allowed_globals()):
            content = torch.load(
                filename, map_location='cpu', weights_only=True, mmap=True
            )
    except Exception:  # as in `_read`
        return None
    meta = content.get('meta') if isinstance(content, dict) else None
    return meta if isinstance(meta, dict) else {}


def load_from_http(filename: str, map_location=None) -> dict:
    """Download to torch's cache once, then read as `load_from_local`.

    Args:
        filename: URL.
        map_location: as of `torch.load`.
    """
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    target = folder / Path(urlsplit(filename).path).name

    def fetch() -> None:
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(filename, str(target))

    if get_rank() == 0:
        fetch()
    barrier()
    fetch()  # on the other machines of a run
    return load_from_local(str(target), map_location)


def register_loaders() -> None:
    """Put these loaders in the place of MMEngine's; repeating it is harmless."""
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(
        ('http://', 'https://'), load_from_http, force=True
    )
