"""A lock on a run folder: one process at a time, from before it inspects the folder until it ends."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

LOCK = ".lock"
"""The locked file in a run folder; it names the last process that locked it."""
POLL = 0.2
_RACE = 5.0
"""Seconds of retries while other processes create and remove the lock file."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_held_here: set[tuple[int, int]] = set()
"""Device and inode of every lock file locked by this process, since closing a second descriptor would unlock it."""
os.register_at_fork(after_in_child=_held_here.clear)  # A child inherits no locks


class FolderLock:
    """A lock on ``folder``, which is created with its parents if missing.

    The system releases it when the process ends, however it ends. On a file system without locks it excludes nobody.

    say: called with a line when ``take`` waits.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None):
        self.folder = folder
        self.made_file: bool = False
        """Whether this process, and no other, created the lock file."""
        self._say = say
        self._descriptor: int | None = None
        self._key: tuple[int, int] | None = None
        self._made_folders: list[Path] = []

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    @property
    def real(self) -> bool:
        """Whether the lock is held on a file system with locks, so that no other process can hold it."""
        return self._key is not None

    def take(self, wait: float = 0.0) -> None:
        """Lock the folder, waiting up to ``wait`` seconds for another process; does nothing if it is already held.

        ValueError, naming the process that holds it: still locked after ``wait`` seconds. ValueError, naming the lock
        file: it is a link.
        """
        began, announced = time.monotonic(), False
        while not self.held:
            try:
                holder = self._try()
            except BaseException:
                self._remove_folders()
                raise
            if self.held:
                break
            waited = time.monotonic() - began
            if holder is None:  # Another process is creating or removing the file or the folder
                if waited > max(wait, _RACE):
                    raise ValueError(
                        f"out: expected a folder that stays; other processes keep removing {self.folder / LOCK}"
                    )
                time.sleep(POLL / 20)
                continue
            if waited > wait:
                self._remove_folders()
                self._refuse(holder)
            if not announced:
                self._say(f"{holder} writes to {self.folder}; waiting for it to end")
            announced = True
            time.sleep(POLL)

    def release(self, undo: bool = False) -> None:
        """Unlock the folder. undo: first remove the lock file and the folders that ``take`` made, if they are empty."""
        if undo and self.held and self.made_file:
            # Unlink while still locked, so that a process waiting for the file sees that it is gone and retries.
            with contextlib.suppress(FileNotFoundError):
                (self.folder / LOCK).unlink()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._key is not None:
            _held_here.discard(self._key)
            self._key = None
        if undo:
            self._remove_folders()

    def _try(self) -> str | None:
        """Take the lock if it is free, and set ``held``; else return who holds it, or None to try again."""
        self._make_folders()
        self._check_own()
        try:
            descriptor, made = self._open()
        except FileNotFoundError:  # Another process has just removed the folder
            return None
        try:
            try:
                # Not flock, which the loader's forked workers would inherit and keep.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "another process"
                if error.errno not in _NO_LOCKS:
                    raise
            else:
                if not self._in_place(descriptor):
                    return None
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"{_this_process()}\n".encode(), 0)
                self._key = _key(os.fstat(descriptor))
                _held_here.add(self._key)
            self._descriptor = descriptor
            self.made_file = made
            return None
        finally:
            if not self.held:
                os.close(descriptor)

    def _check_own(self) -> None:
        """ValueError if this process already holds the folder. Runs before the file is opened; see ``_held_here``."""
        with contextlib.suppress(FileNotFoundError):
            if _key(os.lstat(self.folder / LOCK)) in _held_here:
                self._refuse(f"this process, {_this_process()},")

    def _refuse(self, holder: str) -> None:
        raise ValueError(f"out: expected a folder that no other run uses; {holder} writes to {self.folder}")

    def _open(self) -> tuple[int, bool]:
        """The lock file, and whether it was created. ValueError: the path is a link or a folder."""
        path, flags = self.folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        try:
            return os.open(path, flags), False
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR):
                raise
            kind = "link" if path.is_symlink() else "folder"
            raise ValueError(f"out: expected a file to lock; {path} is a {kind}") from None

    def _in_place(self, descriptor: int) -> bool:
        """Whether the locked file is still in the folder; its last holder may have removed it."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.lstat(self.folder / LOCK))
        except FileNotFoundError:
            return False

    def _make_folders(self) -> None:
        for folder in (*reversed(self.folder.parents), self.folder):
            if folder.exists():
                continue
            try:
                folder.mkdir()
            except (FileExistsError, FileNotFoundError):  # Another process is creating or removing it
                if folder.is_symlink() and not folder.exists():
                    raise
            else:
                self._made_folders.append(folder)

    def _remove_folders(self) -> None:
        while self._made_folders:
            with contextlib.suppress(OSError):
                self._made_folders.pop().rmdir()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _key(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino
