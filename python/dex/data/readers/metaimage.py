"""MHA and NRRD through SimpleITK. Of a series of volumes the first is taken.

SimpleITK is told which format to use, so that no other can be chosen by content, and only files that hold their own
data get that far: another file, a pattern or a list of files in the header is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import SimpleITK

from .files import BoundedFile, Limits, only, opened, quiet
from .stack import Geometry, Refused, Stack

HEADER_BYTES = 2**16
_TO_RAS = np.diag([-1.0, -1.0, 1.0])  # SimpleITK's axes are left, posterior, superior
_LINE = re.compile(rb"[ \t]*([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*([^\r\n]*)\r?")

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def read(files: list[Path], limits: Limits) -> Iterator[Stack]:
    path = only(files)
    with quiet("MHA or NRRD"), opened(path) as file:
        reader = SimpleITK.ImageFileReader()
        reader.SetImageIO(_format(file))
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


def _format(file: BoundedFile) -> str:
    """SimpleITK's name of the format, by the header's own text."""
    head = file.read(HEADER_BYTES)
    if head[:7] == b"NRRD000":
        end = re.search(rb"\r?\n\r?\n", head)
        if b"datafile" in re.sub(rb"\s", b"", head[: end.start()] if end else head).lower():
            raise Refused("unsupported", "its data are in another file")
        if end is None:
            raise Refused("unreadable", "no end of the header")
        return "NrrdImageIO"
    place = 0
    while True:
        line = _LINE.match(head, place)
        if line is None or head[line.end() : line.end() + 1] != b"\n":
            raise Refused("unreadable", "not the header of an MHA or NRRD file")
        place = line.end() + 1
        if line.group(1).lower() == b"elementdatafile":
            if line.group(1) != b"ElementDataFile" or line.group(2).strip() != b"LOCAL":
                raise Refused("unsupported", "its data are in another file")
            return "MetaImageIO"
        if b"elementdatafile" in line.group(2).lower():
            raise Refused("unreadable", "not the header of an MHA or NRRD file")
