"""Exclusive locks between processes, by ``flock``: the system releases them when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

POLL = 0.02
"""Seconds between two attempts if the wait is limited."""


class NoLocks(OSError):
    """The file system has no locks, as some network file systems."""


@contextlib.contextmanager
def exclusive(path: Path, *, wait: float = math.inf, mode: int = 0o666) -> Iterator[None]:
    """Exclusive access for the block: a lock on the folder ``path``, or on the file ``path``, which is created.

    It also excludes other threads and a second lock in the same process. It does not follow a link to a file.

    wait: seconds to wait for another holder. mode: permissions of a new file, before the umask.

    Raises BlockingIOError if the lock is still held after ``wait``, and NoLocks.
    """
    kind = os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    descriptor = os.open(path, kind | os.O_CLOEXEC, mode)
    try:
        acquire(descriptor, wait)
        yield
    finally:
        os.close(descriptor)


def acquire(descriptor: int, wait: float = math.inf) -> None:
    """Lock an open file until its descriptor is closed; arguments and errors as in ``exclusive``."""
    end = time.monotonic() + wait
    operation = fcntl.LOCK_EX | (0 if wait == math.inf else fcntl.LOCK_NB)
    while True:
        try:
            return fcntl.flock(descriptor, operation)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise NoLocks(error.errno, error.strerror) from error
            if time.monotonic() >= end:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        time.sleep(POLL)
