"""Who may use a run folder: one process at a time, from before it looks into the folder until it ends."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path

LOCK = ".lock"
"""The file in a run folder that is locked; it names who locked it last."""
POLL = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class FolderLock:
    """A lock on ``folder``, which is made with its parents when it is missing.

    The system releases it when the process ends, however it does. A file system without locks keeps nobody out.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._descriptor: int | None = None
        self._made_file = False
        self._made_folders: list[Path] = []

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def take(self, wait: float = 0.0) -> None:
        """Lock the folder, waiting up to ``wait`` seconds for another process to end; nothing if it is held already.

        ValueError, naming the process that holds it: the folder is still locked then.
        """
        deadline, announced = time.monotonic() + wait, False
        while not self.held:
            holder = self._try()
            if holder is None:
                continue
            if time.monotonic() > deadline:
                self._remove_folders()
                raise ValueError(f"out: expected a folder that no other run uses; {holder} writes to {self.folder}")
            if not announced:
                print(f"dex pretrain: {holder} writes to {self.folder}; waiting for it to end", file=sys.stderr)
            announced = True
            time.sleep(POLL)

    def release(self, undo: bool = False) -> None:
        """Unlock the folder. undo: first remove the lock file and the folders that `take` made, if they are empty."""
        if undo and self.held and self._made_file:
            # While it is locked: whoever waits for this file then finds another one or none in its place, and retries.
            with contextlib.suppress(FileNotFoundError):
                (self.folder / LOCK).unlink()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if undo:
            self._remove_folders()

    def _try(self) -> str | None:
        """Take the lock if it is free: `held` says whether. Otherwise who holds it, or None to try again at once."""
        self._make_folders()
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
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            self._descriptor, self._made_file = descriptor, made
            return None
        finally:
            if not self.held:
                os.close(descriptor)

    def _open(self) -> tuple[int, bool]:
        """The lock file, and whether it was made."""
        path, flags = self.folder / LOCK, os.O_RDWR | os.O_CLOEXEC
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        return os.open(path, flags), False

    def _in_place(self, descriptor: int) -> bool:
        """Whether the locked file is still the folder's: its last holder may have removed it."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.folder / LOCK))
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
