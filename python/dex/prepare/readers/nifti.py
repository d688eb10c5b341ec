"""NIfTI-1 and -2 in one file or two, packed by gzip or bzip2 or not. Of several volumes the first is taken; no more is
read.

A volume that does not fit into the memory is streamed along its slow axis, once for each pass; slices across that axis
are then refused.
"""

from __future__ import annotations

import bz2
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..label_maps import intent
from .files import BZIP2_BYTES, RATIO, BoundedFile, Limits, Unpacked, fill, native, opened, quiet, quietly
from .layout import images_of
from .reader import Beat, Reader
from .stack import Geometry, Refused, Stack

HEADER_BYTES = 540  # NIfTI-2; a NIfTI-1 file has as many wherever it has an image
LARGEST_OFFSET = 2**26
STREAMED = 4  # times the memory: the largest volume that is streamed
_BYTES, _RGB, _RGBA = 2, 128, 2304


def read(files: Sequence[Path], limits: Limits, beat: Beat) -> Iterator[Stack]:
    """files: the header's, then the one that holds the image where that is another."""
    with quiet("NIfTI"):
        with opened(files[0]) as raw:
            header, code, two = _header(_unpacked(raw, _packing(raw)).read(HEADER_BYTES))
        path = files[0]
        if two:
            names = images_of(path.name)
            path = next((other for other in files[1:] if other.name in names), None)
            if path is None:
                raise Refused("unreadable", "the file with its image is not beside it")
        shape, frames, volumes, planes = _shape(header, code)
        channels = {_RGB: 3, _RGBA: 4}.get(code, planes)
        stored = np.dtype(np.uint8) if channels > 1 else header.get_data_dtype()
        if stored.kind not in "iuf" or stored.itemsize > 8:
            raise Refused("unsupported", f"numbers of type {stored.kind}{stored.itemsize}")
        width, height = shape[:2]
        limits.check_frame(height, width)
        size = width * height * frames * channels * stored.itemsize
        kept = limits.holds(size * min(planes, 2), height, width, channels * stored.itemsize)
    with quiet("NIfTI"), opened(path) as raw:
        packed = ("gzip" if path.name.lower().endswith(".gz") else "") if two else _packing(raw)
        file = _unpacked(raw, packed)
        if not kept and (
            planes > 1
            or size > STREAMED * limits.memory
            or (packed and size > RATIO * raw.size)
            or packed == "bzip2"
            or not limits.holds(0, height, width, channels * stored.itemsize)
        ):
            raise Refused("too large", f"{size} bytes declared")
        if packed == "bzip2" and size > BZIP2_BYTES:
            raise Refused("too large", f"{size} bytes packed by bzip2, at most {BZIP2_BYTES}")
        offset = int(header.get_data_offset())
        least = 0 if two else HEADER_BYTES if header.sizeof_hdr == 540 else 348
        if not least <= offset <= LARGEST_OFFSET:
            raise Refused("unreadable", f"data at byte {offset}")
        if not packed and offset + size > raw.size:
            raise Refused("unreadable", f"{offset + size} bytes declared, the file has {raw.size}")
        frame = (height, width) + ((channels,) if channels > 1 else ())
        whole = None
        if kept:
            file.seek(offset)
            whole = np.empty((frames, *frame) if planes == 1 else (planes, frames, height, width), stored)
            fill(file, whole, beat)
            if packed and volumes == 1:
                file.read(1)  # at its end the checksum is compared
            whole = native(whole) if planes == 1 else np.ascontiguousarray(np.moveaxis(whole, 0, -1))
        slope, intercept = header.get_slope_inter() if channels == 1 else (None, None)
        slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
        eight = stored == np.uint8 and (slope, intercept) == (1.0, 0.0)
        geometry = Geometry.from_affine(header.get_best_affine(), header.get_zooms()[:3] if len(shape) > 2 else None)

    @quietly("NIfTI")
    def load(wanted: Callable[[int], bool]) -> Iterator[tuple[int, np.ndarray]]:
        with opened(path) as raw:
            file = _unpacked(raw, packed)
            length = int(np.prod(frame)) * stored.itemsize
            for number in range(frames):
                if wanted(number):
                    out = np.empty(frame, stored)
                    file.seek(offset + number * length)
                    fill(file, out)
                    yield number, native(out)[..., :3] if channels > 1 else native(out)

    stack = Stack(
        quantity="display8" if eight else "raw",
        length=frames,
        shape=(height, width),
        dtype=stored.newbyteorder("="),
        load=load,
        holds=lambda stored: False,  # what can be kept is kept from the start
        channels=min(channels, 3),
        slope=slope,
        intercept=intercept,
        geometry=geometry,
        volume=frames > 1,
        described=True,
        declared=intent(int(header["intent_code"])),
        whole=whole[..., :3] if kept and channels > 1 else whole,
    )
    if volumes > 1:
        stack.refused.append(Refused("inconsistent", f"{volumes - 1} volumes after the first"))
    yield stack


def _packing(raw: BoundedFile) -> str:
    """What a file is packed by, by its first bytes: "gzip", "bzip2" or ""."""
    start = raw.read(3)
    raw.seek(0)
    return "gzip" if start[:2] == b"\x1f\x8b" else "bzip2" if start == b"BZh" else ""


def _unpacked(raw: BoundedFile, packed: str) -> BoundedFile | Unpacked | bz2.BZ2File:
    if packed == "bzip2":
        return bz2.BZ2File(raw)
    return Unpacked(raw) if packed else raw


def _header(data: bytes):
    """The header, its data type's code, and whether the image is in another file."""
    import nibabel

    if len(data) < 348:
        raise Refused("unreadable", "no NIfTI header")
    first = data[:4]
    if first in ((348).to_bytes(4, "little"), (348).to_bytes(4, "big")):
        kind, magic = nibabel.Nifti1Header, data[344:348]
    elif first in ((540).to_bytes(4, "little"), (540).to_bytes(4, "big")) and len(data) >= 540:
        kind, magic = nibabel.Nifti2Header, data[4:8]
    else:
        raise Refused("unreadable", "no NIfTI header")
    if magic == bytes(4):
        raise Refused("unsupported", "an Analyze header, which does not say where left is")
    if magic[:3] not in (b"n+1", b"n+2", b"ni1", b"ni2"):
        raise Refused("unreadable", "no NIfTI header")
    header = kind(data[: 540 if kind is nibabel.Nifti2Header else 348], check=False)
    return header, int(header["datatype"]), magic[:2] == b"ni"


def _shape(header, code: int) -> tuple[tuple[int, ...], int, int, int]:
    """The first sides, frames of one volume, number of volumes, and of planes: bytes of colours that lie apart."""
    shape = tuple(int(v) for v in header.get_data_shape())
    if not 2 <= len(shape) <= 7 or min(shape) < 1:
        raise Refused("unreadable", f"{len(shape)} sides, or one of no length")
    more = int(np.prod(shape[4:], dtype=object))
    planes = 1
    if more in (3, 4) and more == shape[4] and shape[3] == 1 and code == _BYTES:
        planes = more
    elif more != 1:
        raise Refused("unsupported", f"{more} numbers at each place")
    return shape, shape[2] if len(shape) > 2 else 1, shape[3] if len(shape) > 3 else 1, planes


def beside(path: Path) -> list[str]:
    return images_of(path.name)


READER = Reader(
    suffixes=(".nii", ".nii.gz", ".nii.bz2", ".hdr", ".hdr.gz"),
    read=read,
    needs={"nibabel": "nibabel"},
    beside=beside,
)
