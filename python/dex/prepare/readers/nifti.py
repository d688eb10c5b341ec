"""NIfTI-1 and -2 in one file or two, packed by gzip, by bzip2 or not at all. Only the requested volumes are read.

A volume that does not fit into memory is streamed along its slow axis, once per pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dex.common import formats

from ..label_maps import intent
from .files import BZIP2_BYTES, OTHER, BoundedFile, Limits, opened, opened_unpacked, packing, quiet, quietly, unpacked
from .layout import images_of
from .reader import Beat, Reader
from .stack import Geometry, Refused, Stack
from .volume import Volumes, is_kept

HEADER_BYTES = 540  # Of NIfTI-2; a NIfTI-1 file with an image has at least as many
LARGEST_OFFSET = 2**26
_SIZES = {size: (size.to_bytes(4, "little"), size.to_bytes(4, "big")) for size in (348, 540)}
_BYTES, _RGB, _RGBA = 2, 128, 2304


def read(
    files: Sequence[Path], limits: Limits, beat: Beat, volumes: str = "first", headers: bool = False
) -> Iterator[Stack]:
    """files: the header's, followed by the separate file with the image if there is one."""
    with quiet("NIfTI"):
        image = _image(files, limits)
    return quietly("NIfTI")(image.stacks)(volumes, beat, headers)


def _image(files: Sequence[Path], limits: Limits) -> Volumes:
    with opened(files[0]) as raw:
        header, code, two = header_of(raw)
    path = files[0]
    if two:
        names = images_of(path.name)
        path = next((other for other in files[1:] if other.name in names), None)
        if path is None:
            raise Refused("unreadable", "the file with its image is missing; put the .img into the same folder")
    shape, frames, count, planes = _shape(header, code)
    channels = {_RGB: 3, _RGBA: 4}.get(code, planes)
    stored = np.dtype(np.uint8) if channels > 1 else header.get_data_dtype()
    if stored.kind not in "iuf" or stored.itemsize > 8:
        raise Refused("unsupported", f"numbers of type {stored.kind}{stored.itemsize}; save integers or floats")
    width, height = shape[:2]
    frame = (height, width) if channels == 1 else (height, width, channels)
    size = width * height * frames * channels * stored.itemsize
    with opened(path) as raw:
        packed = ("gzip" if path.name.lower().endswith(".gz") else "") if two else packing(raw)
        kept = is_kept(
            limits, frame, frames, stored.itemsize, file=raw.size, packing=packed, copies=1 if planes == 1 else 2
        )
        if packed == "bzip2" and size > BZIP2_BYTES:
            raise Refused("too large", f"{size} bytes packed by bzip2, at most {BZIP2_BYTES}")
        offset = int(header.get_data_offset())
        least = 0 if two else HEADER_BYTES if header.sizeof_hdr == 540 else 348
        if not least <= offset <= LARGEST_OFFSET:
            raise Refused("unreadable", f"data at byte {offset}")
        if not packed and offset + size > raw.size:
            declared = offset + size
            raise Refused("unreadable", f"{declared} bytes declared, the file has {raw.size}: truncated; copy it again")
    slope, intercept = header.get_slope_inter() if channels == 1 else (None, None)

    def colours(stack: np.ndarray) -> np.ndarray:
        if planes > 1:
            stack = np.ascontiguousarray(np.moveaxis(stack.reshape(planes, -1, height, width), 0, -1))
        return stack[..., :3]

    return Volumes(
        open=functools.partial(opened_unpacked, path, packed),
        start=offset,
        frame=frame if planes == 1 else (height, width),
        frames=frames * planes,
        dtype=stored,
        limits=limits,
        kept=kept,
        title="NIfTI",
        count=count,
        packed=bool(packed),
        planes=planes,
        seen=colours if channels > 1 else lambda stack: stack,
        fields={
            "slope": 1.0 if slope is None else float(slope),
            "intercept": 0.0 if intercept is None else float(intercept),
            "geometry": Geometry.from_affine(
                header.get_best_affine(), header.get_zooms()[:3] if len(shape) > 2 else None
            ),
            "declared": intent(int(header["intent_code"])),
        },
    )


class Header(NamedTuple):
    header: Any
    """nibabel's."""
    code: int
    """Of its data type."""
    two: bool
    """Whether the image is in a separate file."""


def header_of(raw: BoundedFile) -> Header:
    """The header of a NIfTI file, which may be packed. Raises Refused."""
    import nibabel

    data = unpacked(raw, packing(raw)).read(HEADER_BYTES)
    if len(data) < 348:
        raise Refused("unreadable", f"no NIfTI header: {OTHER}")
    first = data[:4]
    if first in _SIZES[348]:
        kind, magic = nibabel.Nifti1Header, data[344:348]
    elif first in _SIZES[540] and len(data) >= 540:
        kind, magic = nibabel.Nifti2Header, data[4:8]
    else:
        raise Refused("unreadable", f"no NIfTI header: {OTHER}")
    if magic == bytes(4):
        raise Refused("unsupported", "an Analyze header, which does not say where left is; convert it to NIfTI")
    if magic[:3] not in (b"n+1", b"n+2", b"ni1", b"ni2"):
        raise Refused("unreadable", f"no NIfTI header: {OTHER}")
    header = kind(data[: 540 if kind is nibabel.Nifti2Header else 348], check=False)
    return Header(header, int(header["datatype"]), magic[:2] == b"ni")


def _shape(header, code: int) -> tuple[tuple[int, ...], int, int, int]:
    """The declared shape, frames per volume, number of volumes, and number of planes (colour channels stored apart)."""
    shape = tuple(int(v) for v in header.get_data_shape())
    if not 2 <= len(shape) <= 7 or min(shape) < 1:
        raise Refused("unreadable", f"{len(shape)} sides, or one of no length; save a volume")
    more = int(np.prod(shape[4:], dtype=object))
    planes = 1
    if more in (3, 4) and more == shape[4] and shape[3] == 1 and code == _BYTES:
        planes = more
    elif more != 1:
        raise Refused("unsupported", f"{more} numbers at each place; save a volume of each")
    return shape, shape[2] if len(shape) > 2 else 1, shape[3] if len(shape) > 3 else 1, planes


def beside(path: Path) -> list[str]:
    return images_of(path.name)


def recognises(file: BoundedFile) -> bool:
    """By the magic of header and image in one file, whatever its name: ``.img`` is common."""
    try:
        data = unpacked(file, packing(file)).read(HEADER_BYTES)
    except Exception:  # Packed bytes of any kind
        return False
    first_version = data[:4] in _SIZES[348] and data[344:348] in (b"n+1\0", b"n+2\0")
    return first_version or (data[:4] in _SIZES[540] and data[4:8] == b"n+2\0")


READER = Reader(
    suffixes=formats.of("nifti").suffixes,
    read=read,
    needs=formats.of("nifti").needs,
    beside=beside,
    recognises=recognises,
    choices=("volumes", "headers"),
)
