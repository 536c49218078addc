"""Files that are whole or not there: written aside, flushed, put in place at once."""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ['is_whole', 'partial_path', 'put_in_place', 'resumable', 'write_text']

POINTER = 'last_checkpoint'
"""Name of the file in a work dir that says which checkpoint is the newest."""

_PARTIAL = '.partial'
# Without an optimiser, or of another time than the newest state.
_NOT_RESUMABLE = ('best_', 'stage1_best')


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


def resumable(work_dir: str | Path) -> Iterator[Path]:
    """Checkpoints of a run that it could go on from, the newest first.

    First the one that `last_checkpoint` names (looked for in the work dir first, which
    may be a copy or have moved), then the others by the time when they were written.
    They may be damaged, see `is_whole`.
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
    yield from sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
