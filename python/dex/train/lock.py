"""Who may use a run folder: one process at a time, from before it looks into the folder until it ends."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

LOCK = ".lock"
"""The file in a run folder that is locked; it names who locked it last."""
POLL = 0.2
_RACE = 5.0
"""Seconds for which a lock file that others make and remove at the same time is tried again."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_held_here: set[tuple[int, int]] = set()
"""Device and inode of every lock file that this process has locked: closing a second descriptor of one unlocks it."""
os.register_at_fork(after_in_child=_held_here.clear)  # a child inherits no locks


class FolderLock:
    """A lock on ``folder``, which is made with its parents when it is missing.

    The system releases it when the process ends, however it does. A file system without locks keeps nobody out.

    say: called with a line when `take` waits.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None):
        self.folder = folder
        self.made_file: bool = False
        """This process made the lock file, and nobody else can have made it."""
        self._say = say
        self._descriptor: int | None = None
        self._key: tuple[int, int] | None = None
        self._made_folders: list[Path] = []

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    @property
    def real(self) -> bool:
        """Held, on a file system that has locks: no other process holds the folder."""
        return self._key is not None

    def take(self, wait: float = 0.0) -> None:
        """Lock the folder, waiting up to ``wait`` seconds for another process to end; nothing if it is held already.

        ValueError, naming the process that holds it: the folder is still locked then. ValueError, naming the lock
        file, when that is a link.
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
            if holder is None:  # another process makes and removes the file or the folder at this moment
                if waited > max(wait, _RACE):
                    raise ValueError(f"out: expected a folder that stays; others keep removing {self.folder / LOCK}")
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
        """Unlock the folder. undo: first remove the lock file and the folders that `take` made, if they are empty."""
        if undo and self.held and self.made_file:
            # Unlink while still locked: a process waiting for this file sees that it is gone and retries.
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
        """Take the lock if it is free: `held` says whether. Otherwise who holds it, or None to try again."""
        self._make_folders()
        self._check_own()
        try:
            descriptor, made = self._open()
        except FileNotFoundError:  # another process has just removed the folder that it had made
            return None
        try:
            try:
                # Not flock, which the loader's forked workers would share and keep.
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
        """ValueError when this process holds the folder already. Before the file is opened: see `_held_here`."""
        with contextlib.suppress(FileNotFoundError):
            if _key(os.lstat(self.folder / LOCK)) in _held_here:
                self._refuse(f"this process, {_this_process()},")

    def _refuse(self, holder: str) -> None:
        raise ValueError(f"out: expected a folder that no other run uses; {holder} writes to {self.folder}")

    def _open(self) -> tuple[int, bool]:
        """The lock file, and whether it was made. ValueError when there is something that is no file."""
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
        """Whether the locked file is still the folder's: its last holder may have removed it."""
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
            except (FileExistsError, FileNotFoundError):  # another process makes or removes it at this moment
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
