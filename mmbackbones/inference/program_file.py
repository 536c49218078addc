"""Programs of `torch.export` from anyone: read as data, or refused.

`torch.export.load` by itself runs what a file wants: it unpickles example inputs
freely, evaluates expressions of sizes as Python, executes guards, loads compiled
libraries and looks up any function of torch by name. Only what a network needs is let
through here; a file that wants more is refused before PyTorch sees it.
"""

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram

__all__ = ['load_program']

_MEMBERS = re.compile(
    r'([^/]+/)?(data/(weights|constants|sample_inputs)/[\w.-]+|models/\w+\.json|'
    r'extra(_files)?/[\w.-]+|serialized_\w+\.(json|pt)|'
    r'(\.data/)?(version|serialization_id)|archive_(format|version)|byteorder)'
)
"""Files of the archive; torch to 2.6 has `serialized_*` and no folder around all."""

_TARGETS = re.compile(
    r'torch\.ops\.aten\.(?!from_file\b)\w+\.\w+|'
    r'torch\.ops\.higher_order\.wrap_with_(autocast|set_grad_enabled)|'
    r'_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge)'
)
_SIZES = re.compile(
    r"([\d+/(), '=-]|\*(?!\*)|[su]\d+\b|"
    r'\b(Symbol|Integer|Rational|Add|Mul|Max|Min|Mod|FloorDiv|CeilDiv|PythonMod|'
    r'positive|integer|nonnegative|True)\b)+'
)
_NAMES = re.compile(r'[\w.]*')
_RULES = {'target': _TARGETS, 'expr_str': _SIZES}
_FREE = ('metadata', 'torch_version')
_CONTAINERS = (None, 'builtins.tuple', 'builtins.list', 'builtins.dict')


def load_program(
    path: str, extra_files: dict[str, str] | None = None
) -> ExportedProgram:
    """Load a `.pt2` without running anything that is in it.

    Args:
        path: of the file.
        extra_files: by name; each value is replaced by the file's text.

    Raises:
        ValueError: it is no such file, PyTorch cannot read it, or it holds more than a
            network's graph and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            forbidden = next(_forbidden(archive), None)
        if forbidden is None:
            with _tensors_only():
                return torch.export.load(path, extra_files=extra_files)
    except Exception as error:  # a zip file's, pickle's, or PyTorch's own
        raise ValueError(f'PyTorch refuses {path!r}: {error}') from error
    raise ValueError(
        f'{path!r} is refused: {forbidden}; a program of torch.export that '
        'tools/export.py wrote holds nothing of the kind'
    )


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """`torch.load` unpickles tensors and plain containers only, whoever calls it."""
    name = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
    before = os.environ.get(name)
    os.environ[name] = '1'
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _forbidden(archive: zipfile.ZipFile) -> Iterator[str]:
    """What is in an archive that a network does not need, in words."""
    names = archive.namelist()
    if len({name.lower() for name in names}) < len(names):
        yield 'two of its files have one name'
    for name in names:
        if not _MEMBERS.fullmatch(name):
            yield f'it has a file {name!r}'
        if name.endswith('.json'):
            yield from _forbidden_in(json.loads(archive.read(name)))


def _forbidden_in(value: Any, rule: re.Pattern = _NAMES) -> Iterator[str]:
    """Likewise of a part of the description: names become Python code in a graph."""
    if isinstance(value, str) and not rule.fullmatch(value):
        yield f'it says {value!r}'
    elif isinstance(value, list):
        for part in value:
            yield from _forbidden_in(part, rule)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _forbidden_in(key)
            if key == 'guards_code' and part:
                yield f'it has guards to execute, {part!r}'
            elif key in ('in_spec', 'out_spec'):
                yield from _forbidden_containers(json.loads(part or 'null'))
            elif key not in _FREE:
                yield from _forbidden_in(part, _RULES.get(key, _NAMES))


def _forbidden_containers(value: Any) -> Iterator[str]:
    """Likewise of nested inputs or outputs."""
    if isinstance(value, list):
        for part in value:
            yield from _forbidden_containers(part)
    elif isinstance(value, dict):
        if value.get('type') not in _CONTAINERS:
            yield f'its inputs or outputs are a {value.get("type")!r}'
        yield from _forbidden_containers(value.get('children_spec', []))
