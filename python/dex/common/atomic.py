"""Files that are either the old ones or the new ones, whatever stops the process that writes them.

A file is written in the same folder under a name that ends in ``.partial``, and renamed over the old one. With ``sync``
it is also on the disk when the call returns: the file before its name, the name by flushing the folder.
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
    """``NAME.partial`` beside ``path``: what a file is called while it is written."""
    return path.with_name(path.name + PARTIAL)


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str], *, sync: bool = False, mode: int = 0o666, locked: bool = False
) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` when the block ends; an error in the block leaves ``path`` alone.

    sync: return only when the file is on the disk. mode: permissions of the file, less the umask. locked: the caller
    holds a lock that keeps other writers away; what a writer that was killed left under the `work_name` is replaced.

    Without a lock, processes that write one path at the same time, on one machine or several, each leave a whole file;
    the last one stays.
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
    """Replace ``path`` by ``data`` (text as UTF-8) as a whole; arguments as of `writing`."""
    with writing(path, sync=sync, mode=mode, locked=locked) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sync_path(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that takes the place of ``path``, absent or an empty folder, when the block ends, with every file in it
    on the disk; an error in the block leaves nothing."""
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
