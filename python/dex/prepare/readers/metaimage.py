"""MHA, MHD and NRRD, in one file or two.

SimpleITK reads the header: sizes, data type, geometry. The format is fixed beforehand, so that the content cannot
select another one, and headers that lead to several files or to another folder are refused before. The values are read
here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dex.common import formats

from .files import BZIP2_BYTES, BoundedFile, Limits, opened, opened_unpacked, quiet, quietly
from .layout import Layout, layout
from .reader import Beat, Reader, chosen
from .stack import Geometry, Refused, Stack
from .volume import Volumes, is_kept

_TO_RAS = np.diag([-1.0, -1.0, 1.0])  # From SimpleITK's axes: left, posterior, superior
_NUMBERS = ("UInt8", "Int8", "UInt16", "Int16", "UInt32", "Int32", "UInt64", "Int64", "Float32", "Float64")


@functools.cache
def _numbers() -> dict[int, np.dtype]:
    """The supported data types by SimpleITK's names. From here on, SimpleITK is silent and uses one thread."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    numbers = {getattr(SimpleITK, f"sitk{name}"): np.dtype(name.lower()) for name in _NUMBERS}
    return numbers | {SimpleITK.sitkVectorUInt8: np.dtype(np.uint8)}


def read(
    files: Sequence[Path], limits: Limits, beat: Beat, volumes: str = "first", headers: bool = False
) -> Iterator[Stack]:
    """files: the header's, followed by the separate file with the data if there is one."""
    with quiet("MHA or NRRD"):
        image = _image(files, limits, volumes)
    return quietly("MHA or NRRD")(image.stacks)(volumes, beat, headers)


def _image(files: Sequence[Path], limits: Limits, volumes: str) -> Volumes:
    import SimpleITK

    path, types = files[0], _numbers()
    with opened(path) as file:
        place = layout(file)
        beside = next((other for other in files[1:] if other.name == place.name), None)
        if place.name and beside is None:
            raise Refused("unreadable", "the file with its data is missing; put it into the same folder")
        reader = SimpleITK.ImageFileReader()
        reader.SetImageIO(place.kind)
        reader.SetFileName(os.fspath(path))
        reader.ReadImageInformation()
        _same(path, file)
    sizes, channels = reader.GetSize(), reader.GetNumberOfComponents()
    if not 2 <= len(sizes) <= 4 or min(sizes) < 1:
        raise Refused("unsupported", f"{len(sizes)} axes, or one of no length; save 2 to 4 axes")
    if reader.GetPixelID() not in types:
        raise Refused("unsupported", "its pixel type; save integers or floats of one component")
    stored = types[reader.GetPixelID()]
    if channels not in (1, 3, 4) or (channels > 1 and (stored != np.uint8 or not place.interleaved)):
        raise Refused(
            "unsupported", f"{channels} components of {stored.itemsize} bytes; save one component, or three of uint8"
        )
    width, height = int(sizes[0]), int(sizes[1])
    frames, count = (int(v) for v in (*sizes[2:], 1, 1)[:2])
    frame = (height, width) if channels == 1 else (height, width, channels)
    source = beside or path
    with opened(source) as raw:
        kept = is_kept(limits, frame, frames, stored.itemsize, file=raw.size, packing=place.packing)
        size = height * width * frames * channels * stored.itemsize
        start = _start(raw.size, place, size * count, size * (chosen(volumes, count)[-1] + 1))
    spacing = reader.GetSpacing()
    return Volumes(
        open=functools.partial(opened_unpacked, source, place.packing, place.start or 0),
        start=start,
        frame=frame,
        frames=frames,
        dtype=stored.newbyteorder(place.order),
        limits=limits,
        kept=kept,
        title="MHA or NRRD",
        count=count,
        packed=bool(place.packing),
        seen=lambda stack: stack[..., :3] if channels > 1 else stack,
        fields={
            "spacing": (float(spacing[1]), float(spacing[0])) if min(spacing[:2]) > 0 else (1.0, 1.0),
            "geometry": _geometry(reader) if len(sizes) > 2 else None,
        },
    )


def _start(file: int, place: Layout, declared: int, wanted: int) -> int:
    """The first byte of the values in the unpacked data of a file with that many bytes. declared: bytes of all values;
    wanted: bytes up to the last value to read."""
    if place.packing:
        if place.packing == "bzip2" and wanted > BZIP2_BYTES:
            raise Refused("too large", f"{wanted} bytes packed by bzip2, at most {BZIP2_BYTES}")
        return 0
    start = file - declared if place.start is None else place.start
    if start < 0 or start + wanted > file:
        raise Refused("unreadable", f"{declared} bytes declared, the file has {file}")
    return start


def _same(path: Path, file: BoundedFile) -> None:
    """SimpleITK opens files by name: refuse a name that no longer leads to the file whose header was checked."""
    now, then = os.lstat(path), os.fstat(file.fileno())
    if (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino):
        raise Refused("unreadable", "the file changed while it was being read")


def _geometry(reader) -> Geometry:
    count = reader.GetDimension()
    direction = np.array(reader.GetDirection()).reshape(count, count)[:3, :3]
    spacing = np.array(reader.GetSpacing())[:3]
    affine = np.eye(4)
    affine[:3, :3] = _TO_RAS @ (direction * spacing)
    affine[:3, 3] = _TO_RAS @ np.array(reader.GetOrigin())[:3]
    return Geometry.from_affine(affine, spacing)


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
