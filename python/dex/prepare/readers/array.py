"""NPY and NPZ without pickle: [H, W] or [F, H, W]; 3 or 4 channels come last and are 8 bits or floats in 0..1.

Headers are checked against the file's size before anything is allocated. Each member of an NPZ is a stack.
"""

from __future__ import annotations

import functools
import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dex.common import formats

from .files import BoundedFile, Limits, fill, native, only, opened, quiet, quietly
from .reader import Beat, Reader
from .stack import Refused, Stack
from .volume import Volumes, is_kept

MAX_MEMBERS = 1000
MAX_DIRECTORY = 2**20
_END = 22
_ENCRYPTED = 1


@quietly("array")
def read(files: Sequence[Path], limits: Limits, beat: Beat, headers: bool = False) -> Iterator[Stack]:
    path = only(files)
    with opened(path) as file:
        start = file.read(4)
        file.seek(0)
        if start != b"PK\x03\x04":
            layout = _layout(file, file.size, file.size, False, limits)
            members = [(functools.partial(opened, path), layout, "")]
            refused = []
        else:
            _check_directory(file)
            file.seek(0)
            members, refused = _members(path, file, limits)
            if not members:
                raise refused[0] if refused else Refused("no image", "no array")
    for open_, layout, name in members:
        image = Volumes(
            open=open_,
            start=layout.start,
            frame=layout.frame,
            frames=layout.frames,
            dtype=layout.dtype,
            limits=limits,
            kept=layout.kept,
            title="array",
            seen=functools.partial(_eight, channels=layout.channels),
            fields={"series": name},
        )
        if layout.fortran and not headers:
            with open_() as stream:
                stack = image.stack(image.seen(_transposed(stream, layout)), 0)
        else:
            (stack,) = image.stacks("first", beat, headers)
        stack.refused, refused = refused, []
        yield stack
        del stack


def _members(path: Path, file: BoundedFile, limits: Limits) -> tuple[list[Any], list[Refused]]:
    """For each valid array of an archive: how to open it, its layout and its name; and the refusals of the others."""
    sound, refused, total = [], [], 0
    with zipfile.ZipFile(file) as archive:
        for member in sorted(archive.infolist(), key=lambda member: member.filename.encode("utf-8", "replace")):
            if not member.filename.endswith(".npy"):
                continue
            try:
                if member.flag_bits & _ENCRYPTED:
                    raise Refused("unsupported", "it is encrypted; save it without a password")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise Refused(
                        "unsupported", "a compression other than deflate; save it with numpy.savez_compressed"
                    )
                with quiet("array"), archive.open(member) as stream:
                    layout = _layout(stream, member.file_size, file.size, True, limits)
                limits.check_all(total + member.file_size, file.size)
                total += member.file_size
                sound.append((functools.partial(_member, path, member), layout, member.filename[:-4]))
            except Refused as error:
                refused.append(error)
    return sound, refused


@contextmanager
def _member(path: Path, member: zipfile.ZipInfo) -> Iterator[Any]:
    with opened(path) as file, zipfile.ZipFile(file) as archive, archive.open(member) as stream:
        yield stream


def _check_directory(file: BoundedFile) -> None:
    """NPZ archives have no comment and no 64-bit directory. zipfile creates an object for every declared entry, so
    their number is checked before."""
    file.seek(max(0, file.size - _END - 20))
    tail = file.read(_END + 20)
    end = tail[-_END:]
    if end[:4] != b"PK\x05\x06" or tail[:4] == b"PK\x06\x07":
        raise Refused("unreadable", "truncated, or not a plain zip archive; copy it again")
    count, size = int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little")
    if count > MAX_MEMBERS or size > MAX_DIRECTORY:
        raise Refused("too large", f"{count} arrays in one archive, at most {MAX_MEMBERS}")


class _Layout(NamedTuple):
    """shape: as declared. start: first byte of the values. frame: H, W and the channels, if the array has an axis of
    them. kept: whether the whole array may be in memory."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    start: int
    frames: int
    frame: tuple[int, ...]
    kept: bool

    @property
    def channels(self) -> int:
        return self.frame[2] if len(self.frame) > 2 else 0


def _layout(stream: io.BufferedIOBase, size: int, file: int, packed: bool, limits: Limits) -> _Layout:
    """The layout in the header of an array with ``size`` bytes, stored in a file with ``file`` bytes."""
    counted = _Counted(stream)
    version = np.lib.format.read_magic(counted)
    if version not in ((1, 0), (2, 0)):
        raise Refused("unsupported", "an NPY version other than 1 and 2; save plain numbers with numpy.save")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(counted)
    if dtype.hasobject or dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise Refused("unsupported", "not an array of plain numbers; save integers or floats")
    if not 2 <= len(shape) <= 4 or min(shape) < 1:
        raise Refused("unsupported", f"{len(shape)} axes, or one of no length; save [slices, height, width]")
    needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if needed != size - counted.count:
        raise Refused("unreadable", f"{needed} bytes declared, {size - counted.count} there: truncated; copy it again")
    channels = shape[-1] if len(shape) > 2 and shape[-1] in (1, 3, 4) else 0
    if len(shape) == 4 and not channels:
        raise Refused("unsupported", "4 axes without channels last; save [slices, height, width, 3]")
    frame = tuple(int(side) for side in (shape[-3:] if channels else shape[-2:]))
    frames = int(shape[0]) if len(shape) == (4 if channels else 3) else 1
    kept = is_kept(limits, frame, frames, dtype.itemsize, file=file, packing="deflate" if packed else "")
    if fortran and not kept:
        raise Refused("too large", f"{needed:,} bytes in Fortran order; save it in C order, or {limits.remedy}")
    return _Layout(shape, fortran, dtype, counted.count, frames, frame, kept)


def _transposed(stream: io.BufferedIOBase, layout: _Layout) -> np.ndarray:
    """[F, H, W] or [F, H, W, C] of an array in Fortran order."""
    array = np.empty(int(np.prod(layout.shape)), layout.dtype)
    stream.seek(layout.start)
    fill(stream, array)
    return native(array).reshape(layout.shape, order="F").reshape(layout.frames, *layout.frame)


def _eight(array: np.ndarray, channels: int) -> np.ndarray:
    """Colour as uint8 [F, H, W, 3], bool as 0 and 255, everything else unchanged; an axis of one channel is removed."""
    if array.dtype == bool:
        array = array.view(np.uint8) * np.uint8(255)
    if channels == 1:
        return array[..., 0]
    if channels < 2:
        return array
    array = array[..., :3]
    if array.dtype == np.uint8:
        return array
    if array.dtype not in (np.uint16, np.float16, np.float32, np.float64):
        raise Refused("unsupported", f"colour of type {array.dtype}; save uint8")
    if array.dtype != np.uint16 and not (array.min() >= 0 and array.max() <= 1):  # NaN fails both
        raise Refused("unsupported", "colour outside 0 to 1; scale it, or save uint8")
    out = np.empty(array.shape, np.uint8)
    for target, frame in zip(out, array, strict=True):
        for row, values in zip(target, frame, strict=True):
            row[:] = (values.astype(np.uint32) + 128) // 257 if array.dtype == np.uint16 else np.rint(values * 255)
    return out


class _Counted:
    """A stream that counts the bytes of a header."""

    def __init__(self, stream: io.BufferedIOBase):
        self.stream, self.count = stream, 0

    def read(self, size: int) -> bytes:
        data = self.stream.read(min(size, 2**16))
        self.count += len(data)
        return data


READER = Reader(suffixes=formats.of("array").suffixes, read=read, choices=("headers",))
