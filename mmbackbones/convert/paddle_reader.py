"""Reading `.pdparams` files without PaddlePaddle and without running their pickle.

Upstream of the format: https://github.com/PaddlePaddle/Paddle
python/paddle/framework/io.py (Apache-2.0). `paddle.save` pickles a dictionary from
names to numpy arrays, protocol 2 to 4.
Departs from the source:
- names in the pickle are looked up in a short list here and never imported; arrays
  are put together from their bytes by torch, so that numpy's own unpickling, which
  trusts what it reads, has no part in it.
"""

import pickle
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ['is_plain_pickle', 'read_pdparams']

# numpy's code of a little-endian number -> dtype. PaddlePaddle has no uint16: these
# are the bits of bfloat16.
_DTYPES = {
    'f2': torch.float16,
    'u2': torch.bfloat16,
    'f4': torch.float32,
    'f8': torch.float64,
    'b1': torch.bool,
    'u1': torch.uint8,
    'i1': torch.int8,
    'i2': torch.int16,
    'i4': torch.int32,
    'i8': torch.int64,
}
# Under this key, PaddlePaddle keeps its own names of the parameters.
_BOOKKEEPING = 'StructuredToParameterName@@'


class _Dtype:
    """Stands for `numpy.dtype`."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.byte_order = '|'

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = state[1]

    def to_torch(self) -> torch.dtype:
        if self.code not in _DTYPES or self.byte_order not in '<|':
            raise pickle.UnpicklingError(
                f'array of numpy type {self.byte_order}{self.code}; it may be one of '
                f'{list(_DTYPES)}, little-endian'
            )
        return _DTYPES[self.code]


class _Array:
    """Stands for `numpy.ndarray`."""

    def __init__(self, *_: object) -> None:
        self.state = None

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def to_torch(self) -> Tensor:
        _, shape, dtype, is_fortran, raw = self.state
        dtype = dtype.to_torch()
        if not isinstance(raw, bytes) or len(raw) != prod(shape) * dtype.itemsize:
            raise pickle.UnpicklingError(
                f'array of shape {shape} and {dtype} in {len(raw)} {type(raw).__name__}'
            )
        if not raw:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(bytearray(raw), dtype=dtype)
        if is_fortran:
            return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape))))
        return flat.reshape(shape)


def _encode(text: str, codec: str) -> bytes:
    """How protocol 2 spells bytes."""
    if codec != 'latin1':
        raise pickle.UnpicklingError(f'bytes in the encoding {codec!r}')
    return text.encode('latin1')


class _StandIn:
    """What a file may call, and not change: a pickle can set attributes, too."""

    __slots__ = ('_function',)

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *args: Any) -> object:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError(f'it changes {self._function.__name__}')


_STAND_INS = {
    'collections.OrderedDict': dict,
    'builtins.tuple': tuple,
    '__builtin__.tuple': tuple,
    '_codecs.encode': _encode,
    '__builtin__.bytes': lambda: b'',  # how protocol 2 spells no bytes
    'numpy.dtype': _Dtype,
    'numpy.ndarray': _Array,
    'numpy.core.multiarray._reconstruct': _Array,  # numpy 1
    'numpy._core.multiarray._reconstruct': _Array,  # numpy 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _StandIn:
        try:
            return _StandIn(_STAND_INS[f'{module}.{name}'])
        except KeyError:
            raise pickle.UnpicklingError(
                f'it names GLOBAL {module}.{name}, and may name {list(_STAND_INS)}'
            ) from None


def _plain(value: object) -> object:
    """Tensors in the place of arrays, at any depth."""
    if isinstance(value, _Array):
        return value.to_torch()
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if k != _BOOKKEEPING}
    # A tensor saved beside other things: PaddlePaddle's name for it, and the array.
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], _Array):
        return value[1].to_torch()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value


def is_plain_pickle(path: Path) -> bool:
    """Whether a file is a pickle and not one of torch's archives, old or new."""
    with path.open('rb') as file:
        head = file.read(3)
    # torch's old format is several pickles, the first of which is a long number.
    return head[:1] == b'\x80' and head[2:] != b'\x8a'


def read_pdparams(path: Path) -> object:
    """What `paddle.save` wrote, with tensors for arrays.

    Args:
        path: a `.pdparams` file, or another pickle of numpy arrays.

    Returns:
        Usually a dictionary from names to tensors, else what was saved.

    Raises:
        pickle.UnpicklingError: the file names something else than arrays, holds
            arrays of something else than numbers, or is broken. Nothing of it was
            run.
    """
    with path.open('rb') as file:
        try:
            return _plain(_Unpickler(file).load())
        except (pickle.UnpicklingError, OSError):
            raise
        except Exception as error:  # whatever a broken pickle provokes
            raise pickle.UnpicklingError(
                f'broken pickle ({type(error).__name__}: {error})'
            ) from error
