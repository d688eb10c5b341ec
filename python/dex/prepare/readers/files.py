"""The first steps of every reader: open only regular files, and check sizes before anything is allocated."""

from __future__ import annotations

import bz2
import functools
import io
import logging
import os
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dex.common import bombs, faults

from .stack import Refused

RATIO = 100
"""Largest ratio of a file's unpacked frames to its size: anything above is nearly constant, and slow to unpack."""

STREAMED = 4
"""Largest size of a volume that is read frame by frame, as a multiple of the memory limit."""

OTHER = "it is damaged or of another format; copy it again, or give it its own suffix"
_EITHER = 32 + zlib.MAX_WBITS  # gzip or zlib, by the first bytes
_MAX_MEMBERS = 2**16


@dataclass(frozen=True)
class Limits:
    """``memory_mb``: MiB in addition to what the process already has; ``seconds``: until a silent worker counts as
    hanging; ``pixels``: of one frame."""

    memory_mb: int = 512
    seconds: float = 10.0
    pixels: int = 40_000_000

    @classmethod
    def within(cls, memory_mb: int) -> Limits:
        """Limits for this memory: with twice as much, a frame may have twice as many pixels and take twice as long."""
        more = memory_mb / cls.memory_mb
        return cls(memory_mb, cls.seconds * max(1.0, more), int(cls.pixels * more))

    @property
    def memory(self) -> int:
        """The memory limit in bytes."""
        return self.memory_mb * 2**20

    @property
    def streamed(self) -> int:
        """Largest size in bytes of a volume that is read frame by frame."""
        return STREAMED * self.memory

    @property
    def remedy(self) -> str:
        """How to accept larger files, for the text of a refusal."""
        return f"--memory above {self.memory_mb} takes more"

    def check_frame(self, height: int, width: int) -> None:
        """Raise Refused unless a frame with these sides may be decoded."""
        if height < 1 or width < 1:
            raise Refused("unreadable", f"sides of {height} and {width} pixels")
        if height * width > self.pixels:
            raise Refused("too large", f"{height} x {width} pixels, at most {self.pixels}; {self.remedy}")

    def check_all(self, total: int, packed: int) -> None:
        """Raise Refused if ``total`` bytes of frames are packed into too few bytes to be images."""
        if total > self.memory and total > RATIO * packed:
            raise Refused("too large", f"{total} bytes in all from {packed} packed ones")

    def holds(self, stored: int, height: int, width: int, itemsize: int) -> bool:
        """Whether ``stored`` bytes may be kept during the work on frames with these sides and bytes per pixel. That
        work takes the decoded frame, a copy of it, and 4 bytes per pixel of float32."""
        return stored + height * width * (2 * itemsize + 4) <= self.memory - 32 * 2**20


BZIP2_BYTES = 2**26
"""Limit of data packed by bzip2: more take too long, at 20 MB per second."""


class BoundedFile(io.BufferedReader):
    """A file whose reads never allocate more than its remaining bytes. Raises Refused("too large") for a read of more
    than ``largest`` bytes, and after ``calls`` reads."""

    largest: int = 2**62
    calls: int = 2**62

    def __init__(self, raw: io.RawIOBase, size: int):
        super().__init__(raw, 2**16)
        self.size = size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self.size - self.tell())
        wanted = left if size is None or size < 0 else min(size, left)
        self.calls -= 1
        if wanted > self.largest or self.calls < 0:
            raise Refused("too large", "more data in one place than a reader accepts")
        return super().read(wanted)


def opened(path: str | bytes | os.PathLike[str], kind: type[BoundedFile] = BoundedFile) -> BoundedFile:
    """The regular file at ``path``. Raises Refused("unreadable") for a link, a device, a pipe or a folder, and for a
    file that the system does not open."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise Refused("unreadable", getattr(error, "strerror", None) or type(error).__name__) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise Refused("unreadable", "not a regular file: a link, a device or a folder; copy the file itself")
    if not status.st_size:
        os.close(descriptor)
        raise Refused("unreadable", "the file is empty; copy it again, or leave it out")
    return kind(io.FileIO(descriptor, "rb"), status.st_size)


_MEMBER = b"\x1f\x8b"


class Unpacked:
    """The data of a gzip file's members, or of a zlib stream, from byte ``start`` on. Python's own module reads the
    names of members and trailing zeros byte by byte, and accepts any number of members."""

    def __init__(self, raw: BoundedFile, start: int = 0):
        self._raw, self._start = raw, start
        self._begin()

    def readinto(self, out: memoryview) -> int:
        """Read at least one byte and at most as many as ``out`` holds; 0 at the end, after the last checksum was
        verified."""
        while True:
            if self._inflate.eof:
                rest = self._inflate.unused_data.lstrip(b"\0")  # Archives on tapes are padded
                while len(rest) < len(_MEMBER):
                    if not (block := self._raw.read(2**16)):
                        return 0
                    rest = (rest + block).lstrip(b"\0")
                if not rest.startswith(_MEMBER):  # Bytes appended to the file; gzip ignores them too
                    return 0
                self._members += 1
                if self._members > _MAX_MEMBERS:
                    raise Refused("too large", f"more than {_MAX_MEMBERS} gzip members")
                self._inflate, self._input = zlib.decompressobj(_EITHER), rest
            block = self._input or self._raw.read(2**16)
            if not block:
                raise Refused("unreadable", "the packed data end early: truncated; copy it again")
            data = self._inflate.decompress(block, len(out))
            self._input = self._inflate.unconsumed_tail
            if data:
                out[: len(data)] = data
                self._place += len(data)
                return len(data)

    def read(self, size: int) -> bytes:
        out, done = memoryview(bytearray(size)), 0
        while done < size and (got := self.readinto(out[done:])):
            done += got
        return bytes(out[:done])

    def seek(self, place: int) -> None:
        if place < self._place:
            self._begin()
        while self._place < place and self.read(min(place - self._place, 2**20)):
            pass

    def _begin(self) -> None:
        self._raw.seek(self._start)
        self._inflate, self._input = zlib.decompressobj(_EITHER), b""
        self._place, self._members = 0, 1


def packing(raw: BoundedFile) -> str:
    """How a file is packed, by its first bytes: "gzip", "bzip2" or ""."""
    start = raw.read(3)
    raw.seek(0)
    return "gzip" if start.startswith(_MEMBER) else "bzip2" if start == b"BZh" else ""


def unpacked(raw: BoundedFile, packed: str, start: int = 0) -> BoundedFile | Unpacked | bz2.BZ2File:
    """The data of a file that is packed from byte ``start`` on, or the file. packed: as from ``packing``."""
    if packed == "bzip2":
        raw.seek(start)
        return bz2.BZ2File(raw)
    return Unpacked(raw, start) if packed else raw


@contextmanager
def opened_unpacked(path: Path, packed: str, start: int = 0) -> Iterator[BoundedFile | Unpacked | bz2.BZ2File]:
    """``unpacked`` for the file at ``path``."""
    with opened(path) as raw:
        yield unpacked(raw, packed, start)


def check_scans(data: bytes) -> None:
    """Raise Refused if a JPEG has more scans than any encoder writes."""
    if bombs.has_too_many_scans(data):
        raise Refused("too large", bombs.SCANS)


def has_magic(file: BoundedFile) -> bool:
    """Whether a file has the magic of DICOM at byte 128. The position afterwards is right behind it."""
    file.seek(128)
    return file.read(4) == b"DICM"


def fill(file: Any, out: np.ndarray, beat: Callable[[], None] = lambda: None) -> None:
    """Fill ``out`` (contiguous) from the file, calling ``beat`` from time to time. Raises Refused if the file ends too
    early."""
    view = memoryview(out.reshape(-1).view(np.uint8))
    done = 0
    while done < len(view):
        got = file.readinto(view[done : done + 2**22])
        if not got:
            raise Refused("unreadable", f"{len(view)} bytes declared, the file ends after {done}: copy it again")
        done += got
        beat()


def native(array: np.ndarray) -> np.ndarray:
    """The same values in this machine's byte order; do not use the given array afterwards."""
    return array if array.dtype.isnative else array.byteswap(inplace=True).view(array.dtype.newbyteorder("="))


@contextmanager
def quiet(subject: str) -> Iterator[None]:
    """Let no text of a library out: no warning, no log, and any exception but Refused becomes Refused("unreadable") in
    our own words. A MemoryError becomes Refused("too large"). Interrupts pass, and so do errors without descriptors."""
    disabled = logging.root.manager.disable
    if disabled < logging.CRITICAL:  # Each change empties the caches of all loggers
        logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Refused, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except MemoryError:
        raise Refused("too large", f"{subject}: not enough memory") from None
    except BaseException as error:  # A panic of a decoder written in Rust is not an Exception
        if faults.is_exhausted(error):
            raise
        raise Refused("unreadable", f"{subject}: {faults.described(error)}") from None
    finally:
        if disabled < logging.CRITICAL:
            logging.disable(disabled)


def quietly(subject: str) -> Callable[[Callable[..., Iterator]], Callable[..., Iterator]]:
    """A decorator that makes every step of a generator function ``quiet``, but not the code that uses its items."""

    def wrap(function: Callable[..., Iterator]) -> Callable[..., Iterator]:
        @functools.wraps(function)
        def steps(*arguments, **keywords) -> Iterator:
            items = function(*arguments, **keywords)
            while True:
                with quiet(subject):
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                yield item
                del item

        return steps

    return wrap


def only(files: list[Path] | tuple[Path, ...]) -> Path:
    """The only file of a unit. Raises ValueError if there are more."""
    if len(files) != 1:
        raise ValueError(f"files: expected one, got {len(files)}")
    return files[0]
