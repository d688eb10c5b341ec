"""Atomic writes: whatever stops the process, a file is either the old or the new one.

A file is written in the same folder under a name that ends in ``.partial``, and renamed over the old one. With ``sync``
it is also on disk when the call returns: first the file, then its name by flushing the folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PARTIAL = ".partial"


def work_name(path: Path) -> Path:
    """``NAME.partial`` beside ``path``: the name of a file while it is written."""
    return path.with_name(path.name + PARTIAL)


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str], *, sync: bool = False, mode: int = 0o666, locked: bool = False
) -> Iterator[IO[bytes]]:
    """A binary file that replaces ``path`` at the end of the block; an error in the block leaves ``path`` unchanged.

    sync: return only when the file is on disk. mode: permissions of the file, before the umask. locked: the caller
    holds a lock that excludes other writers, so a file that a killed writer left under ``work_name`` is replaced.

    Without a lock, processes that write the same path at the same time, also on several machines, each write a complete
    file; the last one stays.
    """
    path = Path(path)
    work = work_name(path if locked else path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}"))
    if locked:
        work.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.ExitStack() as undo:
        descriptor = os.open(work, flags, mode)
        undo.callback(work.unlink, missing_ok=True)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(descriptor)
        os.replace(work, path)
        undo.pop_all()
    if sync:
        sync_path(path.parent)


def write(
    path: str | os.PathLike[str], data: bytes | str, *, sync: bool = False, mode: int = 0o666, locked: bool = False
) -> None:
    """Replace ``path`` atomically by ``data`` (text as UTF-8); arguments as in ``writing``."""
    with writing(path, sync=sync, mode=mode, locked=locked) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sync_path(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that becomes ``path``, which is absent or empty, at the end of the block, with all its files on disk; an
    error in the block leaves nothing behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    work.mkdir()
    try:
        yield work
        for file in work.rglob("*"):
            sync_path(file)
        sync_path(work)
        os.rename(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync_path(path.parent)
