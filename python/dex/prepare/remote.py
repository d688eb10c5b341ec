"""Remote folders and tables: anything ``fsspec`` opens, copied into the cache before anything is read.

    s3://bucket/scans    memory://scans    sftp://host/scans    scans.zip    zip://::s3://bucket/scans.zip

Readers open only local files: workers have a memory limit and may be killed at any moment, so they keep no connections.
The files that a source names are copied first, once, if the disk has room. A later start copies files that are missing
or have another size or time, and removes copies of files that no longer exist. Only the user can enter the folder of
the copies.
"""

from __future__ import annotations

import calendar
import concurrent.futures
import contextlib
import datetime
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dex.common import atomic, locks
from dex.common.units import format_bytes

from . import readers

RESERVE = 2**30
"""Bytes of the disk that stay free."""
STREAMS = 8
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")


class Entry(NamedTuple):
    """A remote file. mtime_ns: 0 if the file system gives no time of modification."""

    name: str
    size: int
    mtime_ns: int


def is_url(text: str | os.PathLike[str]) -> bool:
    return _URL.match(os.fspath(text)) is not None


def place_of(argument: str) -> str:
    """The place that a command-line argument names: the URL of a zip file's content, the path of a local URL, and
    anything else unchanged."""
    for scheme in ("file://", "local://"):
        if argument.startswith(scheme):
            return argument.removeprefix(scheme)
    if not is_url(argument) and argument.lower().endswith(".zip") and os.path.isfile(os.path.expanduser(argument)):
        return f"zip://::{os.path.abspath(os.path.expanduser(argument))}"
    return argument


def fetch(url: str, wanted: Callable[[str], bool], cache: Path, say: Callable[[str], None]) -> Path:
    """The folder with copies of the wanted files below ``url``, and of the separate files with their data. ``wanted``
    gets paths below ``url``. Copies made for other runs stay.

    Raises ValueError if the place does not exist, cannot be opened or is too large; OSError for a fault of the
    connection or the disk.
    """
    root = cache / "remote" / hashlib.sha256(url.encode()).hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _named(url):
        system, top = _open(url)
        entries = _entries(system, top)
    if not entries:
        raise ValueError(f"root: expected files below {_shown(url)}, got none")
    chosen = {path for path in entries if wanted(path)}
    with _alone(root, say):
        _copy(system, url, root, {path: entries[path] for path in chosen}, say)
        beside = {other for path in chosen for other in _beside(root, path) if other in entries} - chosen
        _copy(system, url, root, {path: entries[path] for path in beside}, say)
        _remove_others(root, entries)
    return root


@contextlib.contextmanager
def _alone(root: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Make other runs that copy into the same folder wait."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(locks.NoLocks):
            try:
                stack.enter_context(locks.exclusive(root, wait=0))
            except BlockingIOError:
                say("waiting for another run that is copying files from the same place")
                stack.enter_context(locks.exclusive(root))
        yield


def _open(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise ValueError(f"root: {_shown(url)} needs fsspec, which is not installed (extra 'remote')") from None
    return fsspec.core.url_to_fs(url)


def _entries(system: Any, top: str) -> dict[str, Entry]:
    """Path below ``top`` -> file, without names that would lead out of the folder."""
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
            f"root: {_shown(url)} has {format_bytes(size)} to copy, but {root} has room for "
            f"{format_bytes(max(0, free - RESERVE))}: give --cache a larger disk, or --files for a part of it"
        )
    say(f"copying {len(todo):,} files, {format_bytes(size)}, from {_shown(url)}")

    def copy_file(path: str) -> None:
        entry, target = todo[path], root / path
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with system.open(entry.name, "rb") as source, atomic.writing(target, mode=0o600) as copy:
            shutil.copyfileobj(source, copy, 2**20)
        os.utime(target, ns=(entry.mtime_ns, entry.mtime_ns))

    with (
        _named(url),
        concurrent.futures.ThreadPoolExecutor(STREAMS if getattr(system, "async_impl", False) else 1) as pool,
    ):
        copies = [pool.submit(copy_file, path) for path in todo]
        try:
            for copied in copies:
                copied.result()
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
    """Paths of the separate files that may hold the data of a copied one."""
    format, folder = readers.format_of(path), path.rpartition("/")[0]
    for name in readers.beside(root / path, format) if format is not None else ():
        yield f"{folder}/{name}" if folder else name


def _remove_others(root: Path, paths: Collection[str]) -> None:
    """Remove copies of files that no longer exist, and leftovers of killed runs."""
    for above, _, names in os.walk(root):
        for path in (os.path.join(above, name) for name in names):
            if os.path.relpath(path, root) not in paths:
                os.unlink(path)


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """Replace the errors of a file system by our own: their text may contain the URL."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"root: expected a folder at {_shown(url)}, got nothing") from None
    except ImportError as error:
        raise ValueError(f"root: {_shown(url)} cannot be opened: {error}") from None
    except ValueError as error:
        if str(error).startswith("root: "):
            raise
        why = "fsspec does not know it" if "rotocol not known" in str(error) else "expected a URL that fsspec takes"
        raise ValueError(f"root: {_shown(url)} cannot be opened: {why}") from None
    except OSError as error:
        raise OSError(error.errno, f"{_shown(url)}: {error.strerror or type(error).__name__}") from None
    except Exception as error:  # Every library has its own kinds of errors
        raise OSError(None, f"{_shown(url)}: {type(error).__name__}") from None


def _shown(url: str) -> str:
    """The scheme of a URL: the rest may contain a name or a password."""
    return url.partition(":")[0] + "://"
