"""Folders and tables that are elsewhere: whatever `fsspec` opens, copied into the cache before anything is read.

    s3://bucket/scans    memory://scans    sftp://host/scans    scans.zip    zip://::s3://bucket/scans.zip

Readers open local files alone: workers that may be killed at any moment, within a limit of memory, are no place for a
connection. So the files that a source names are copied first, once, and no more than the disk has room for; a later
start copies what is missing or has another size or time, and removes what is no longer there. The copies are the user's
own, in a folder that no other may enter.
"""

from __future__ import annotations

import calendar
import concurrent.futures
import contextlib
import datetime
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dex.common import atomic
from dex.common.units import format_bytes

from . import readers

RESERVE = 2**30
"""Bytes of the disk that are left free."""
STREAMS = 8
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")


class Entry(NamedTuple):
    """A file elsewhere. mtime_ns: 0 where the file system does not say when it was written."""

    name: str
    size: int
    mtime_ns: int


def is_url(text: str | os.PathLike[str]) -> bool:
    return _URL.match(os.fspath(text)) is not None


def place_of(argument: str) -> str:
    """What a word of the command line means: the URL of a zip file's content, the path that a local URL names, and
    anything else as it is."""
    for scheme in ("file://", "local://"):
        if argument.startswith(scheme):
            return argument.removeprefix(scheme)
    if not is_url(argument) and argument.lower().endswith(".zip") and os.path.isfile(os.path.expanduser(argument)):
        return f"zip://::{os.path.abspath(os.path.expanduser(argument))}"
    return argument


def fetch(url: str, wanted: Callable[[str], bool], cache: Path, say: Callable[[str], None]) -> Path:
    """The folder with copies of the files below `url` that are wanted, by their paths below it, and of the files that
    hold their data. Copies that were made for other runs stay.

    ValueError: no such place, nothing that opens it, no room for it. OSError: the connection, the disk.
    """
    root = cache / "remote" / hashlib.sha256(url.encode()).hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _named(url):
        system, top = _open(url)
        entries = _entries(system, top)
    if not entries:
        raise ValueError(f"root: expected files below {_shown(url)}; got none")
    chosen = {path for path in entries if wanted(path)}
    with _alone(root, say):
        _copy(system, url, root, {path: entries[path] for path in chosen}, say)
        beside = {other for path in chosen for other in _beside(root, path) if other in entries} - chosen
        _copy(system, url, root, {path: entries[path] for path in beside}, say)
        _remove_others(root, entries)
    return root


@contextlib.contextmanager
def _alone(root: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Other runs that copy into the same folder wait."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks keeps nobody out
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another run, which copies files from the same place")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise ValueError(f"root: {_shown(url)} needs fsspec, which is not installed (extra 'remote')") from None
    return fsspec.core.url_to_fs(url)


def _entries(system: Any, top: str) -> dict[str, Entry]:
    """Path below `top` -> file. Names that would lead out of a folder are no files of ours."""
    entries = {}
    above = top.rstrip("/") + "/" if top.rstrip("/") else ""
    for name, info in system.find(top, detail=True).items():
        path = name[len(above) :] if name.startswith(above) else name.lstrip("/")
        parts = path.split("/")
        if "\0" not in path and all(part not in ("", ".", "..") for part in parts):
            entries[path] = Entry(name, int(info.get("size") or 0), _mtime_ns(info))
    return entries


def _mtime_ns(info: dict[str, Any]) -> int:
    for key in ("mtime", "LastModified", "last_modified", "created", "date_time"):
        value = info.get(key)
        if isinstance(value, datetime.datetime):
            value = value.timestamp()
        elif isinstance(value, tuple):
            value = calendar.timegm((*value, 0, 0, 0)[:9])
        if isinstance(value, int | float):
            return int(value * 10**6) * 1000
    return 0


def _copy(system: Any, url: str, root: Path, entries: dict[str, Entry], say: Callable[[str], None]) -> None:
    todo = {path: entry for path, entry in sorted(entries.items()) if not _is_there(root / path, entry)}
    if not todo:
        return
    size, free = sum(entry.size for entry in todo.values()), shutil.disk_usage(root).free
    if size > free - RESERVE:
        raise ValueError(
            f"root: {_shown(url)} has {format_bytes(size)} to be copied, and {root} has room for "
            f"{format_bytes(max(0, free - RESERVE))}: give --cache a larger disk, or --files a part of it"
        )
    say(f"copying {len(todo):,} files, {format_bytes(size)}, from {_shown(url)}")

    def one(path: str) -> None:
        entry, target = todo[path], root / path
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with system.open(entry.name, "rb") as source, atomic.writing(target, mode=0o600) as copy:
            shutil.copyfileobj(source, copy, 2**20)
        os.utime(target, ns=(entry.mtime_ns, entry.mtime_ns))

    with (
        _named(url),
        concurrent.futures.ThreadPoolExecutor(STREAMS if getattr(system, "async_impl", False) else 1) as pool,
    ):
        done = [pool.submit(one, path) for path in todo]
        try:
            for future in done:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _is_there(path: Path, entry: Entry) -> bool:
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return status.st_size == entry.size and status.st_mtime_ns == entry.mtime_ns


def _beside(root: Path, path: str) -> Iterator[str]:
    """Paths of the files that may hold the data of one that was copied."""
    format, folder = readers.format_of(path), path.rpartition("/")[0]
    for name in readers.beside(root / path, format) if format is not None else ():
        yield f"{folder}/{name}" if folder else name


def _remove_others(root: Path, paths: Collection[str]) -> None:
    """Remove copies of files that are no longer there, and what a run that was killed has left."""
    for above, _, names in os.walk(root):
        for path in (os.path.join(above, name) for name in names):
            if os.path.relpath(path, root) not in paths:
                os.unlink(path)


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """What a file system raises, as ours: its text may hold what it was called with."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"root: expected a folder at {_shown(url)}; nothing is there") from None
    except ImportError as error:
        raise ValueError(f"root: {_shown(url)} cannot be opened: {error}") from None
    except ValueError as error:
        if str(error).startswith("root: "):
            raise
        why = "fsspec does not know it" if "rotocol not known" in str(error) else "expected a URL that fsspec takes"
        raise ValueError(f"root: {_shown(url)} cannot be opened: {why}") from None
    except OSError as error:
        raise OSError(error.errno, f"{_shown(url)}: {error.strerror or type(error).__name__}") from None
    except Exception as error:  # of the many libraries, each its own
        raise OSError(None, f"{_shown(url)}: {type(error).__name__}") from None


def _shown(url: str) -> str:
    """The kind of a place: the rest may hold a name or a password."""
    return url.partition(":")[0] + "://"
