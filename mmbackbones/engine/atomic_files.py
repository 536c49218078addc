"""Files that are whole or not there: written aside, flushed, put in place at once."""

import heapq
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import inf
from pathlib import Path

from mmbackbones.engine.checkpoint_io import read_meta

__all__ = [
    'is_whole',
    'iterations_of',
    'newest_first',
    'partial_path',
    'put_in_place',
    'resumable',
    'write_text',
]

POINTER = 'last_checkpoint'
"""Name of the file in a work dir that says which checkpoint is the newest."""

_PARTIAL = '.partial'
# Without an optimiser, or of another time than the newest state.
_NOT_RESUMABLE = ('best_', 'stage1_best')
# Whose numbers count iterations; those of others, epochs for one, do not.
_BY_ITERATION = ('iter_', 'resume_')


def partial_path(path: str | Path) -> Path:
    """Where a file is written until it is whole; in the same folder."""
    path = Path(path)
    return path.with_name(f'.{path.name}{_PARTIAL}')


def put_in_place(path: str | Path) -> None:
    """Let the partial file of `path` take its place, whatever happens meanwhile.

    The data reaches the disk before the name does, so that a kill or a power cut
    leaves the former file or the new one.

    Raises:
        OSError: the disk is full, or gone; the former file is untouched.
    """
    path = Path(path)
    partial = partial_path(path)
    with partial.open('rb') as file:
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    """Write a small file at once.

    Raises:
        OSError: as of `put_in_place`; no partial file is left.
    """
    partial = partial_path(path)
    try:
        partial.write_text(text)
        put_in_place(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def is_whole(path: str | Path) -> bool:
    """Whether a checkpoint of `torch.save` is complete and unchanged.

    Such a file is a zip archive: its table stands at the end, and every entry has a
    checksum. All of it is read; nothing is unpickled.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError):
        return False


def _kind_and_number(path: Path) -> tuple[str, int]:
    kind, number = re.fullmatch(r'(.*?)(\d*)', path.stem, re.DOTALL).groups()
    return kind, int(number or -1)


def iterations_of(path: Path) -> float:
    """Iterations that were done when a checkpoint was saved.

    By its name if that counts them, else by what it holds.

    Returns:
        -1 for a file that is no state of a run, infinity for one that cannot be read.
    """
    kind, number = _kind_and_number(path)
    if kind in _BY_ITERATION:
        return number
    meta = read_meta(path)
    return inf if meta is None else meta.get('iter', -1)


def newest_first(paths: Iterable[Path]) -> Iterator[Path]:
    """Checkpoints by how far the run had come, which copying them does not change.

    Those of one kind, `epoch_*` for one, by the number in the name; of two kinds by
    iteration, where a damaged one comes first. Times of files decide between equals.
    Epochs are looked up in the files, as late as can be.
    """
    kinds = defaultdict(list)
    for path in paths:
        kinds[_kind_and_number(path)[0]].append(path)
    rows = [sorted(row, key=_number_and_time, reverse=True) for row in kinds.values()]
    yield from heapq.merge(*rows, key=_iterations_and_time, reverse=True)


def _number_and_time(path: Path) -> tuple[int, int]:
    return _kind_and_number(path)[1], path.stat().st_mtime_ns


def _iterations_and_time(path: Path) -> tuple[float, int]:
    return iterations_of(path), path.stat().st_mtime_ns


def resumable(work_dir: str | Path) -> Iterator[Path]:
    """Checkpoints of a run that it could go on from, the newest first.

    First the one that `last_checkpoint` names (looked for in the work dir first, which
    may be a copy or have moved), then the others as `newest_first` has them. They may
    be damaged, see `is_whole`.
    """
    work_dir = Path(work_dir)
    pointer = work_dir / POINTER
    named = Path(pointer.read_text().strip()) if pointer.is_file() else None
    folder = work_dir
    if named is not None:
        own = work_dir / named.name
        named = named if named.is_file() and not own.is_file() else own
        folder = named.parent
        yield named
    others = (
        path
        for path in folder.glob('*.pth')
        if path != named and not path.name.startswith(_NOT_RESUMABLE)
    )
    yield from newest_first(others)
