"""MGH and MGZ, the volumes of FreeSurfer. Of several volumes no more is read than is taken."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dex.common import formats

from .files import RATIO, Limits, Unpacked, fill, native, only, opened, quietly
from .reader import Beat, Reader, chosen, left_out, mean_of, no_numbers
from .stack import Geometry, Refused, Stack

DATA_AT = 284
_HEADER = struct.Struct(">7ih15f")
_TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2"}
_WITHOUT_GEOMETRY = (1.0, 1.0, 1.0), ((-1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0))  # coronal, as FreeSurfer's


class _Header(NamedTuple):
    """width, height, depth and volumes of `dtype`; spacing: mm along these; axes: their directions, right, anterior,
    superior."""

    sizes: tuple[int, int, int, int]
    dtype: np.dtype
    spacing: tuple[float, ...]
    axes: tuple[tuple[float, ...], ...]


@quietly("MGH")
def read(
    files: Sequence[Path], limits: Limits, beat: Beat, volumes: str = "first", headers: bool = False
) -> Iterator[Stack]:
    with opened(only(files)) as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file = Unpacked(raw) if packed else raw
        header = _header(file.read(DATA_AT))
        width, height, depth, count = header.sizes
        limits.check_frame(height, width)
        needed = width * height * depth * header.dtype.itemsize
        if not limits.holds(needed, height, width, header.dtype.itemsize) or (packed and needed > RATIO * raw.size):
            raise Refused("too large", f"{needed} bytes declared")
        if not packed and DATA_AT + needed > raw.size:
            raise Refused("unreadable", f"{DATA_AT + needed} bytes declared, the file has {raw.size}")

        def whole(number: int) -> np.ndarray:
            if headers:
                return no_numbers((depth, height, width), header.dtype.newbyteorder("="))
            out = np.empty((depth, height, width), header.dtype)
            file.seek(DATA_AT + number * needed)
            fill(file, out, beat)
            return native(out)

        numbers, refused = chosen(volumes, count), left_out(volumes, count)
        if volumes == "mean" and count > 1:
            yield _stack(header, mean_of(map(whole, numbers)))
            return
        for number in numbers:
            stack = _stack(header, whole(number))
            stack.refused, refused = refused, []
            yield stack
            del stack


def _stack(header: _Header, whole: np.ndarray) -> Stack:
    return Stack(
        quantity="display8" if whole.dtype == np.uint8 else "raw",
        length=len(whole),
        shape=whole.shape[1:],
        dtype=whole.dtype,
        load=lambda wanted: iter(()),  # never called, since the stack holds all its frames
        holds=lambda stored: True,
        geometry=Geometry.from_affine(np.array(header.axes).T * header.spacing, header.spacing),
        volume=len(whole) > 1,
        described=True,
        whole=whole,
    )


def _header(data: bytes) -> _Header:
    if len(data) < DATA_AT:
        raise Refused("unreadable", "no MGH header")
    version, *values = _HEADER.unpack_from(data)
    sizes, kind, placed = tuple(values[:4]), values[4], values[6]
    if version != 1 or min(sizes) < 1:
        raise Refused("unreadable", "no MGH header")
    if kind not in _TYPES:
        raise Refused("unsupported", f"numbers of type {kind}")
    spacing, axes = _WITHOUT_GEOMETRY
    if placed == 1:
        spacing, axes = tuple(values[7:10]), tuple(tuple(values[i : i + 3]) for i in (10, 13, 16))
    return _Header(sizes, np.dtype(_TYPES[kind]), spacing, axes)


READER = Reader(suffixes=formats.of("mgh").suffixes, read=read, choices=("volumes", "headers"))
