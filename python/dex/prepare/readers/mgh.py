"""MGH and MGZ, the volumes of FreeSurfer. Only the requested volumes are read."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dex.common import formats

from .files import OTHER, Limits, only, opened, opened_unpacked, packing, quiet, quietly, unpacked
from .reader import Beat, Reader
from .stack import Geometry, Refused, Stack
from .volume import Volumes, is_kept

DATA_AT = 284
_HEADER = struct.Struct(">7ih15f")
_TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2"}
_WITHOUT_GEOMETRY = (1.0, 1.0, 1.0), ((-1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0))  # Coronal, as in FreeSurfer


class _Header(NamedTuple):
    """sizes: width, height, depth and number of volumes; spacing: mm along the first three; axes: their directions
    (right, anterior, superior); centre: of the volume, in mm."""

    sizes: tuple[int, int, int, int]
    dtype: np.dtype
    spacing: tuple[float, ...]
    axes: tuple[tuple[float, ...], ...]
    centre: tuple[float, ...]

    @property
    def affine(self) -> np.ndarray:
        out = np.eye(4)
        out[:3, :3] = np.array(self.axes).T * self.spacing
        out[:3, 3] = np.array(self.centre) - out[:3, :3] @ (np.array(self.sizes[:3]) / 2)
        return out


def read(
    files: Sequence[Path], limits: Limits, beat: Beat, volumes: str = "first", headers: bool = False
) -> Iterator[Stack]:
    path = only(files)
    with quiet("MGH"), opened(path) as raw:
        packed = "gzip" if packing(raw) == "gzip" else ""
        header = _header(unpacked(raw, packed).read(DATA_AT))
        width, height, depth, count = header.sizes
        kept = is_kept(limits, (height, width), depth, header.dtype.itemsize, file=raw.size, packing=packed)
        image = Volumes(
            open=functools.partial(opened_unpacked, path, packed),
            start=DATA_AT,
            frame=(height, width),
            frames=depth,
            dtype=header.dtype,
            limits=limits,
            kept=kept,
            title="MGH",
            count=count,
            fields={"geometry": Geometry.from_affine(header.affine, header.spacing)},
        )
        if not packed and DATA_AT + image.size > raw.size:
            declared = DATA_AT + image.size
            raise Refused("unreadable", f"{declared} bytes declared, the file has {raw.size}: truncated; copy it again")
    return quietly("MGH")(image.stacks)(volumes, beat, headers)


def _header(data: bytes) -> _Header:
    if len(data) < DATA_AT:
        raise Refused("unreadable", f"no MGH header: {OTHER}")
    version, *values = _HEADER.unpack_from(data)
    sizes, kind, placed = tuple(values[:4]), values[4], values[6]
    if version != 1 or min(sizes) < 1:
        raise Refused("unreadable", f"no MGH header: {OTHER}")
    if kind not in _TYPES:
        raise Refused("unsupported", f"numbers of type {kind}; convert it, to NIfTI for instance")
    spacing, axes, centre = *_WITHOUT_GEOMETRY, (0.0, 0.0, 0.0)
    if placed == 1:
        spacing, axes = tuple(values[7:10]), tuple(tuple(values[i : i + 3]) for i in (10, 13, 16))
        centre = tuple(values[19:22])
    return _Header(sizes, np.dtype(_TYPES[kind]), spacing, axes, centre)


READER = Reader(suffixes=formats.of("mgh").suffixes, read=read, choices=("volumes", "headers"))
