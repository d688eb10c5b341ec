"""NPY and NPZ without pickle: [H, W] or [F, H, W]; channels, 3 or 4, come last and are 8 bits or unit floats.

Headers are checked against the file's size before anything is allocated. Each member of an NPZ is a stack.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dex.common import formats

from .files import BoundedFile, Limits, fill, native, only, opened, quiet, quietly
from .reader import Beat, Reader, no_numbers
from .stack import Refused, Stack

MAX_MEMBERS = 1000
MAX_DIRECTORY = 2**20
_END = 22


@quietly("array")
def read(files: Sequence[Path], limits: Limits, beat: Beat, headers: bool = False) -> Iterator[Stack]:
    with opened(only(files)) as file:
        start = file.read(4)
        file.seek(0)
        if start != b"PK\x03\x04":
            yield _stack(file, file.size, limits, "", headers)
            return
        _check_directory(file)
        file.seek(0)
        refused, sound = [], []
        with zipfile.ZipFile(file) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename.encode("utf-8", "replace")):
                if member.filename.endswith(".npy"):
                    try:
                        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                            raise Refused("unsupported", "a compression other than deflate")
                        with quiet("array"), archive.open(member) as stream:
                            _layout(stream, member.file_size, limits)
                        limits.check_all(sum(one.file_size for one in [*sound, member]), file.size)
                        sound.append(member)
                    except Refused as error:
                        refused.append(error)
            if not sound:
                raise refused[0] if refused else Refused("no image", "no array")
            for member in sound:
                with archive.open(member) as stream:
                    stack = _stack(stream, member.file_size, limits, member.filename[:-4], headers)
                stack.refused, refused = refused, []
                yield stack
                del stack


def _check_directory(file: BoundedFile) -> None:
    """NPZ archives have no comment and no 64-bit directory; zipfile builds an object for every entry it is told of."""
    file.seek(max(0, file.size - _END - 20))
    tail = file.read(_END + 20)
    end = tail[-_END:]
    if end[:4] != b"PK\x05\x06" or tail[:4] == b"PK\x06\x07":
        raise Refused("unreadable", "not a plain zip archive")
    count, size = int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little")
    if count > MAX_MEMBERS or size > MAX_DIRECTORY:
        raise Refused("too large", f"{count} arrays in one archive, at most {MAX_MEMBERS}")


class _Layout(NamedTuple):
    """`channels`: 0 where there is no axis of them."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    frames: int
    height: int
    width: int
    channels: int


def _layout(stream: io.BufferedIOBase, size: int, limits: Limits) -> _Layout:
    """What the header of an array of `size` bytes in all says, with the stream left at its numbers."""
    counted = _Counted(stream)
    version = np.lib.format.read_magic(counted)
    if version not in ((1, 0), (2, 0)):
        raise Refused("unsupported", "an NPY version other than 1 and 2")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(counted)
    if dtype.hasobject or dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise Refused("unsupported", "no array of plain numbers")
    if not 2 <= len(shape) <= 4 or min(shape) < 1:
        raise Refused("unsupported", f"{len(shape)} axes, or one of no length")
    needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if needed != size - counted.count:
        raise Refused("unreadable", f"{needed} bytes declared, {size - counted.count} there")
    channels = shape[-1] if len(shape) > 2 and shape[-1] in (1, 3, 4) else 0
    if len(shape) == 4 and not channels:
        raise Refused("unsupported", "4 axes without channels last")
    height, width = shape[-3:-1] if channels else shape[-2:]
    frames = int(shape[0]) if len(shape) == (4 if channels else 3) else 1
    limits.check_frame(height, width)
    if not limits.holds(needed, height, width, max(1, channels) * dtype.itemsize):
        raise Refused("too large", f"{needed} bytes declared")
    return _Layout(shape, fortran, dtype, frames, height, width, channels)


def _stack(stream: io.BufferedIOBase, size: int, limits: Limits, series: str, headers: bool) -> Stack:
    layout = _layout(stream, size, limits)
    if headers:
        eight = layout.channels > 1 or layout.dtype == bool
        array = no_numbers(layout.shape, np.dtype(np.uint8) if eight else layout.dtype.newbyteorder("="))
    else:
        array = np.empty(int(np.prod(layout.shape)), layout.dtype)
        fill(stream, array)
        array = native(array).reshape(layout.shape, order="F" if layout.fortran else "C")
    if layout.channels == 1:
        array = array[..., 0]
    if array.ndim == (3 if layout.channels > 1 else 2):
        array = array[None]
    whole = _eight(array, layout.channels)
    return Stack(
        quantity="display8" if whole.dtype == np.uint8 else "raw",
        length=layout.frames,
        shape=(layout.height, layout.width),
        dtype=whole.dtype,
        load=lambda wanted: iter(()),
        holds=lambda stored: True,
        channels=3 if whole.ndim == 4 else 1,
        volume=layout.frames > 1,
        described=True,
        series=series,
        whole=whole,
    )


def _eight(array: np.ndarray, channels: int) -> np.ndarray:
    """Colour as uint8 [F, H, W, 3], bool as 0 and 255, all else as it is."""
    if array.dtype == bool:
        array = array.view(np.uint8) * np.uint8(255)
    if channels < 2:
        return array
    array = array[..., :3]
    if array.dtype == np.uint8:
        return array
    if array.dtype not in (np.uint16, np.float16, np.float32, np.float64):
        raise Refused("unsupported", f"colour of type {array.dtype}")
    if array.dtype != np.uint16 and not (array.min() >= 0 and array.max() <= 1):  # NaN fails both
        raise Refused("unsupported", "colour that is not within 0 and 1")
    out = np.empty(array.shape, np.uint8)
    for target, frame in zip(out, array, strict=True):
        for row, values in zip(target, frame, strict=True):
            row[:] = (values.astype(np.uint32) + 128) // 257 if array.dtype == np.uint16 else np.rint(values * 255)
    return out


class _Counted:
    """How many bytes a header took."""

    def __init__(self, stream: io.BufferedIOBase):
        self.stream, self.count = stream, 0

    def read(self, size: int) -> bytes:
        data = self.stream.read(min(size, 2**16))
        self.count += len(data)
        return data


READER = Reader(suffixes=formats.of("array").suffixes, read=read, choices=("headers",))
