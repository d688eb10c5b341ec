"""MHA and NRRD through SimpleITK. Of a series of volumes the first is taken.

SimpleITK is told which format to use, so that no other can be chosen by content, and only files that hold their own
data get that far: another file, a pattern or a list of files in the header is refused.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import SimpleITK

from .files import BoundedFile, Limits, only, opened, quiet
from .stack import Geometry, Refused, Stack

HEADER_BYTES = 2**16
MAX_AXES = 10  # MetaIO has room for so many
_SKIP = re.compile(rb"(?i)(line|byte)skip:(?!0$)")
_TO_RAS = np.diag([-1.0, -1.0, 1.0])  # SimpleITK's axes are left, posterior, superior
_LINE = re.compile(rb"[ \t]*([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*([^\r\n]*)\r?")

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def read(files: list[Path], limits: Limits) -> Iterator[Stack]:
    path = only(files)
    with quiet("MHA or NRRD"), opened(path) as file:
        reader = SimpleITK.ImageFileReader()
        kind, packed = _format(file)
        reader.SetImageIO(kind)
        reader.SetFileName(os.fspath(path))
        reader.ReadImageInformation()
        sizes, channels = reader.GetSize(), reader.GetNumberOfComponents()
        if not 2 <= len(sizes) <= 4 or min(sizes) < 1:
            raise Refused("unsupported", f"{len(sizes)} axes, or one of no length")
        itemsize = _itemsize(reader.GetPixelID())
        if channels not in (1, 3, 4) or (channels > 1 and itemsize != 1):
            raise Refused("unsupported", f"{channels} components of {itemsize} bytes")
        width, height = int(sizes[0]), int(sizes[1])
        frames, volumes = (int(v) for v in (*sizes[2:], 1, 1)[:2])
        limits.check_frame(height, width)
        needed = int(np.prod(sizes, dtype=object)) * channels * itemsize
        # a compressed file and what is unpacked from it are in memory together
        if not limits.holds(needed + min(file.size, needed), height, width, channels * itemsize):
            raise Refused("too large", f"{needed} bytes declared")
        if packed is not None:
            _check_packed(file, *packed, needed)
        _same(path, file)
        image = reader.Execute()
        whole = SimpleITK.GetArrayViewFromImage(image)
        geometry = _geometry(image) if len(sizes) > 2 else None
    whole = whole.reshape((volumes, frames, height, width) + ((channels,) if channels > 1 else ()))[0]
    eight = whole.dtype == np.uint8
    spacing = image.GetSpacing()
    stack = Stack(
        quantity="display8" if eight else "raw",
        length=frames,
        shape=(height, width),
        dtype=whole.dtype,
        load=_nothing(image),
        holds=lambda stored: True,
        channels=min(channels, 3),
        spacing=(float(spacing[1]), float(spacing[0])) if min(spacing[:2]) > 0 else (1.0, 1.0),
        geometry=geometry,
        volume=frames > 1,
        described=True,
        whole=whole[..., :3] if channels > 1 else whole,
    )
    if volumes > 1:
        stack.refused.append(Refused("inconsistent", f"{volumes - 1} volumes after the first"))
    yield stack


def _nothing(image):
    """Never called, since the stack holds all its frames; keeps alive the image whose memory they are."""
    return lambda wanted: iter((image,)[1:])


def _same(path: Path, file: BoundedFile) -> None:
    """SimpleITK opens by name: refuse a name that no longer is the file whose header was checked."""
    now, then = os.lstat(path), os.fstat(file.fileno())
    if (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino):
        raise Refused("unreadable", "the file changed while it was read")


def _itemsize(pixel: int) -> int:
    scalar = {
        1: (SimpleITK.sitkUInt8, SimpleITK.sitkInt8, SimpleITK.sitkVectorUInt8),
        2: (SimpleITK.sitkUInt16, SimpleITK.sitkInt16),
        4: (SimpleITK.sitkUInt32, SimpleITK.sitkInt32, SimpleITK.sitkFloat32),
        8: (SimpleITK.sitkUInt64, SimpleITK.sitkInt64, SimpleITK.sitkFloat64),
    }
    for size, kinds in scalar.items():
        if pixel in kinds:
            return size
    raise Refused("unsupported", "its pixel type")


def _geometry(image) -> Geometry:
    count = image.GetDimension()
    direction = np.array(image.GetDirection()).reshape(count, count)[:3, :3]
    spacing = np.array(image.GetSpacing())[:3]
    return Geometry.from_affine(_TO_RAS @ (direction * spacing), spacing)


def _check_packed(file: BoundedFile, start: int, size: int, needed: int) -> None:
    """MetaIO takes what is lacking of compressed data for what its memory holds: unpack them here, keeping nothing."""
    file.seek(start)
    inflate, left, done = zlib.decompressobj(), min(size, file.size - start), 0
    while not inflate.eof and done <= needed:
        block = inflate.unconsumed_tail
        if not block and left:
            block = file.read(min(left, 2**16))
            left -= len(block)
        if not block:
            break
        done += len(inflate.decompress(block, 2**22))
    if done < needed or (done == needed and not inflate.eof):
        raise Refused("unreadable", f"{needed} bytes declared, {done} there once unpacked")


def _format(file: BoundedFile) -> tuple[str, tuple[int, int] | None]:
    """SimpleITK's name of the format, by the header's own text; offset and size of a compressed MHA's data."""
    head = file.read(HEADER_BYTES)
    if head[:7] == b"NRRD000":
        end = re.search(rb"\r?\n\r?\n", head)
        if b"datafile" in re.sub(rb"\s", b"", head[: end.start()] if end else head).lower():
            raise Refused("unsupported", "its data are in another file")
        if end is None:
            raise Refused("unreadable", "no end of the header")
        if any(_SKIP.match(re.sub(rb"[ \t]", b"", line)) for line in head[: end.start()].splitlines()):
            raise Refused("unsupported", "its data do not follow the header")  # and are looked for byte by byte
        if not re.search(rb"(?im)^encoding:[ \t]*(raw|gz|gzip)[ \t]*\r?$", head[: end.end()]):
            raise Refused(
                "unsupported", "its data are written as text"
            )  # the parser of numbers reads beyond its memory
        return "NrrdImageIO", None
    place, packed, size = 0, False, file.size
    while True:
        line = _LINE.match(head, place)
        if line is None or head[line.end() : line.end() + 1] != b"\n":
            raise Refused("unreadable", "not the header of an MHA or NRRD file")
        place = line.end() + 1
        name, value = line.group(1).lower(), line.group(2).strip()
        if name == b"ndims" and not (value.isdigit() and len(value) < 3 and int(value) <= MAX_AXES):
            raise Refused("unsupported", f"not between 1 and {MAX_AXES} axes")
        if name == b"headersize" and value not in (b"0", b"-1"):
            raise Refused("unsupported", "its data do not follow the header")
        if name == b"compresseddata":
            packed |= value[:1] in (b"T", b"t", b"1")
        if name == b"compresseddatasize" and value.isdigit():
            size = min(size, int(value[:20]))
        if line.group(1).lower() == b"elementdatafile":
            if line.group(1) != b"ElementDataFile" or line.group(2).strip() != b"LOCAL":
                raise Refused("unsupported", "its data are in another file")
            return "MetaImageIO", (place, size) if packed else None
        if b"elementdatafile" in line.group(2).lower():
            raise Refused("unreadable", "not the header of an MHA or NRRD file")
