"""MHA, MHD and NRRD, in one file or two.

SimpleITK reads the header: sizes, type of numbers, geometry. It is told which format to use, so that no other can be
chosen by content, and gets no header that leads to more than one file or to another folder. The numbers are read here.
"""

from __future__ import annotations

import bz2
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from dex.common import formats

from .files import BZIP2_BYTES, BoundedFile, Limits, Unpacked, fill, native, opened, quietly
from .layout import Layout, layout
from .reader import Beat, Reader, chosen, left_out, mean_of, no_numbers
from .stack import Geometry, Refused, Stack

_TO_RAS = np.diag([-1.0, -1.0, 1.0])  # SimpleITK's axes are left, posterior, superior
_NUMBERS = ("UInt8", "Int8", "UInt16", "Int16", "UInt32", "Int32", "UInt64", "Int64", "Float32", "Float64")


@functools.cache
def _numbers() -> dict[int, np.dtype]:
    """The types of numbers that are read, by SimpleITK's own names; SimpleITK is silent and on one thread from here."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    numbers = {getattr(SimpleITK, f"sitk{name}"): np.dtype(name.lower()) for name in _NUMBERS}
    return numbers | {SimpleITK.sitkVectorUInt8: np.dtype(np.uint8)}


@quietly("MHA or NRRD")
def read(
    files: Sequence[Path], limits: Limits, beat: Beat, volumes: str = "first", headers: bool = False
) -> Iterator[Stack]:
    """files: the header's, then the one that holds the data where that is another."""
    import SimpleITK

    path, types = files[0], _numbers()
    with opened(path) as file:
        place = layout(file)
        beside = next((other for other in files[1:] if other.name == place.name), None)
        if place.name and beside is None:
            raise Refused("unreadable", "the file with its data is not beside it")
        reader = SimpleITK.ImageFileReader()
        reader.SetImageIO(place.kind)
        reader.SetFileName(os.fspath(path))
        reader.ReadImageInformation()
        _same(path, file)
        sizes, channels = reader.GetSize(), reader.GetNumberOfComponents()
        if not 2 <= len(sizes) <= 4 or min(sizes) < 1:
            raise Refused("unsupported", f"{len(sizes)} axes, or one of no length")
        if reader.GetPixelID() not in types:
            raise Refused("unsupported", "its pixel type")
        stored = types[reader.GetPixelID()]
        if channels not in (1, 3, 4) or (channels > 1 and (stored != np.uint8 or not place.interleaved)):
            raise Refused("unsupported", f"{channels} components of {stored.itemsize} bytes")
        width, height = int(sizes[0]), int(sizes[1])
        frames, count = (int(v) for v in (*sizes[2:], 1, 1)[:2])
        limits.check_frame(height, width)
        needed = width * height * frames * channels * stored.itemsize
        if not limits.holds(needed, height, width, channels * stored.itemsize):
            raise Refused("too large", f"{needed} bytes declared")
        shape = (frames, height, width) + ((channels,) if channels > 1 else ())
        spacing = reader.GetSpacing()
        square = (float(spacing[1]), float(spacing[0])) if min(spacing[:2]) > 0 else (1.0, 1.0)
        geometry = _geometry(reader) if len(sizes) > 2 else None

        numbers, refused = chosen(volumes, count), left_out(volumes, count)
        with opened(beside) if beside else nullcontext(file) as raw:
            data, start = _data(raw, place, needed * count, needed * (numbers[-1] + 1))

            def whole(number: int) -> np.ndarray:
                if headers:
                    return no_numbers(shape, stored)
                out = np.empty(shape, stored.newbyteorder(place.order))
                data.seek(start + number * needed)
                fill(data, out, beat)
                if place.packing and number == count - 1:
                    data.read(1)  # at its end the checksum is compared
                return native(out)

            if volumes == "mean" and count > 1:
                yield _stack(mean_of(map(whole, numbers)), square, geometry)
                return
            for number in numbers:
                stack = _stack(whole(number), square, geometry)
                stack.refused, refused = refused, []
                yield stack
                del stack


def _stack(whole: np.ndarray, spacing: tuple[float, float], geometry: Geometry | None) -> Stack:
    colour = whole.ndim > 3
    return Stack(
        quantity="display8" if whole.dtype == np.uint8 else "raw",
        length=len(whole),
        shape=whole.shape[1:3],
        dtype=whole.dtype,
        load=lambda wanted: iter(()),  # never called, since the stack holds all its frames
        holds=lambda stored: True,
        channels=3 if colour else 1,
        spacing=spacing,
        geometry=geometry,
        volume=len(whole) > 1,
        described=True,
        whole=whole[..., :3] if colour else whole,
    )


def _data(file: BoundedFile, place: Layout, declared: int, wanted: int) -> tuple[Any, int]:
    """Where the numbers are read from, and where they begin there. declared: bytes of all; wanted: up to the last one
    that is read."""
    if not place.packing:
        start = file.size - declared if place.start is None else place.start
        if start < 0 or start + wanted > file.size:
            raise Refused("unreadable", f"{declared} bytes declared, the file has {file.size}")
        return file, start
    if place.packing == "bzip2":
        if wanted > BZIP2_BYTES:
            raise Refused("too large", f"{wanted} bytes packed by bzip2, at most {BZIP2_BYTES}")
        file.seek(place.start)
        return bz2.BZ2File(file), 0
    return Unpacked(file, place.start), 0


def _same(path: Path, file: BoundedFile) -> None:
    """SimpleITK opens by name: refuse a name that no longer is the file whose header was checked."""
    now, then = os.lstat(path), os.fstat(file.fileno())
    if (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino):
        raise Refused("unreadable", "the file changed while it was read")


def _geometry(reader) -> Geometry:
    count = reader.GetDimension()
    direction = np.array(reader.GetDirection()).reshape(count, count)[:3, :3]
    spacing = np.array(reader.GetSpacing())[:3]
    return Geometry.from_affine(_TO_RAS @ (direction * spacing), spacing)


def load() -> None:
    _numbers()


def beside(path: Path) -> list[str]:
    try:
        with opened(path) as file:
            name = layout(file).name
    except (Refused, OSError):
        return []
    return [name] if name not in ("", path.name) else []


READER = Reader(
    suffixes=formats.of("metaimage").suffixes,
    read=read,
    needs=formats.of("metaimage").needs,
    load=load,
    beside=beside,
    choices=("volumes", "headers"),
)
