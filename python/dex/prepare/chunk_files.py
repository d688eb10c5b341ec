"""The three files of a chunk while they are written.

    chunks/<source>-<chunk>.bin      for each kept image, its encoded bytes and then its histogram
    chunks/<source>-<chunk>.jsonl    a line for each kept image and for some dropped slices, then the counts
    ids/<source>-<chunk>.jsonl       the file behind each kept image and each refusal: rows of ``trace``

They appear only when complete; the second comes last and marks the chunk as done. Until then their names end in
".partial", the process that writes them holds a lock, and ``unfinished`` records the progress.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from dex.common import atomic, locks

from .trace import json_line
from .unfinished import Unfinished


class Busy(Exception):
    """Another process is working on the chunk."""


class CannotWrite(Exception):
    """An OSError while writing, as opposed to one of the file being read."""

    def __init__(self, error: OSError):
        super().__init__(error.errno)
        self.error = error


def paths(private: Path, name: str) -> tuple[Path, Path, Path]:
    """The .bin, the .jsonl and the ids file of a chunk."""
    return private / "chunks" / f"{name}.bin", private / "chunks" / f"{name}.jsonl", private / "ids" / f"{name}.jsonl"


def is_done(private: Path, name: str) -> bool:
    return paths(private, name)[1].exists()


class ChunkFiles:
    """A chunk's three files while they are written. Raises Busy if another process is writing them, and CannotWrite
    for any OSError."""

    def __init__(self, private: Path, name: str, identity: str, tail: int):
        """identity: names everything that determines the chunk beside its files; tail: number of bytes that follow
        each image."""
        self._final = paths(private, name)
        self._partial = [atomic.work_name(path) for path in self._final]
        self._files: list[Any] = []
        progress = self._final[1].with_suffix(".unfinished")
        self._unfinished = Unfinished(progress, self._partial, identity, tail)
        self._finished = False

    def __enter__(self) -> ChunkFiles:
        try:
            for path in self._partial:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                self._files.append(os.fdopen(descriptor, "r+b"))
                if len(self._files) == 1:
                    locks.acquire(descriptor, wait=0)
        except BlockingIOError:
            self._close()
            raise Busy from None
        except OSError as error:
            self._close()
            raise CannotWrite(error) from None
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is CannotWrite and not self._finished:  # Free the space on a full disk
            self._unfinished.forget()
            for path in self._partial:
                path.unlink(missing_ok=True)
        self._close()

    def add(self, line: dict[str, Any], data: bytes) -> None:
        offset = self._files[0].tell()
        self._write(0, data)
        self._write(1, json_line({**line, "offset": offset}))

    def show(self, row: dict[str, Any]) -> None:
        """Keep a thumbnail of a dropped slice for the page of left-out images."""
        self._write(1, json_line(row))

    def note(self, row: dict[str, Any]) -> None:
        """Keep the origin of an image or of a refusal."""
        self._write(2, json_line(row))

    def sizes(self) -> tuple[int, int, int]:
        return tuple(file.tell() for file in self._files)

    def cut(self, sizes: tuple[int, int, int]) -> None:
        """Remove what was written after ``sizes``."""
        try:
            for file, size in zip(self._files, sizes, strict=True):
                if file.seek(0, os.SEEK_END) < size:
                    raise RuntimeError("a file of the chunk is shorter than when it was saved")
                file.seek(size)
                file.truncate()
        except OSError as error:
            raise CannotWrite(error) from None

    def flush(self) -> tuple[int, int, int]:
        try:
            for file in self._files:
                file.flush()
        except OSError as error:
            raise CannotWrite(error) from None
        return self.sizes()

    def keep(self, sizes: tuple[int, int, int], state: dict[str, Any]) -> None:
        """Save ``state``, which belongs to these sizes, so that a run after a kill resumes there."""
        try:
            self._unfinished.keep(sizes, state)
        except OSError as error:
            raise CannotWrite(error) from None

    def left(self) -> tuple[tuple[int, int, int], dict[str, Any]] | None:
        """The sizes and the state that a killed run left."""
        return self._unfinished.left()

    def finish(self, counts: dict[str, Any]) -> None:
        """Write the last line and rename the files to their final names, the .jsonl last."""
        self.flush()
        with open(self._partial[1], "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        end = {"bytes": self._files[0].tell(), "sha256": digest, "counts": counts}
        self._write(1, json_line({"end": end}))
        try:
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
            for number in (0, 2, 1):
                os.replace(self._partial[number], self._final[number])
                atomic.sync_path(self._final[number].parent)
            self._unfinished.forget()
        except OSError as error:
            raise CannotWrite(error) from None
        self._finished = True

    def _write(self, number: int, data: bytes) -> None:
        try:
            self._files[number].write(data)
        except OSError as error:
            raise CannotWrite(error) from None

    def _close(self) -> None:
        for file in self._files:
            try:
                file.close()
            except OSError:  # A full disk: buffered data is lost, but was never recorded as saved
                pass
        self._files = []
