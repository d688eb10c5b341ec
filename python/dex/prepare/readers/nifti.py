"""NIfTI-1 and -2 in one file or two, packed by gzip or bzip2 or not. Of several volumes no more is read than is taken.

A volume that does not fit into the memory is streamed along its slow axis, once for each pass; slices across that axis
are then refused.
"""

from __future__ import annotations

import bz2
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dex.common import formats

from ..label_maps import intent
from .files import BZIP2_BYTES, RATIO, BoundedFile, Limits, Unpacked, fill, native, opened, quiet, quietly
from .layout import images_of
from .reader import Beat, Reader, chosen, left_out, mean_of, no_numbers
from .stack import Geometry, Refused, Stack

HEADER_BYTES = 540  # NIfTI-2; a NIfTI-1 file has as many wherever it has an image
LARGEST_OFFSET = 2**26
STREAMED = 4  # times the memory: the largest volume that is streamed
_BYTES, _RGB, _RGBA = 2, 128, 2304


class _Image(NamedTuple):
    """What a file declares: `frame`, the shape of one; bytes of one volume, `kept` where these may be in memory;
    `planes` of colours that lie apart; `offset` of the first volume in the unpacked file."""

    path: Path
    packed: str
    frames: int
    frame: tuple[int, ...]
    volumes: int
    planes: int
    stored: np.dtype
    size: int
    kept: bool
    offset: int
    slope: float
    intercept: float
    geometry: Geometry
    declared: str

    @property
    def channels(self) -> int:
        return self.frame[2] if len(self.frame) > 2 else 1


def read(
    files: Sequence[Path], limits: Limits, beat: Beat, volumes: str = "first", headers: bool = False
) -> Iterator[Stack]:
    """files: the header's, then the one that holds the image where that is another."""
    with quiet("NIfTI"):
        image = _image(files, limits)
    return _stacks(image, volumes, beat, headers)


def _image(files: Sequence[Path], limits: Limits) -> _Image:
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
    with opened(path) as raw:
        packed = ("gzip" if path.name.lower().endswith(".gz") else "") if two else _packing(raw)
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
    slope, intercept = header.get_slope_inter() if channels == 1 else (None, None)
    return _Image(
        path=path,
        packed=packed,
        frames=frames,
        frame=(height, width) + ((channels,) if channels > 1 else ()),
        volumes=volumes,
        planes=planes,
        stored=stored,
        size=size,
        kept=kept,
        offset=offset,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        geometry=Geometry.from_affine(header.get_best_affine(), header.get_zooms()[:3] if len(shape) > 2 else None),
        declared=intent(int(header["intent_code"])),
    )


@quietly("NIfTI")
def _stacks(image: _Image, volumes: str, beat: Beat, headers: bool) -> Iterator[Stack]:
    """A stack for each volume that is taken, or one of their mean."""
    numbers = chosen(volumes, image.volumes)
    refused = left_out(volumes, image.volumes)
    if not image.kept:
        if volumes == "mean" and image.volumes > 1:
            raise Refused("too large", "a mean of volumes that do not fit into the memory")
        for number in numbers:
            stack = _stack(image, None, number)
            stack.refused, refused = refused, []
            yield stack
        return
    with opened(image.path) as raw:
        file = _unpacked(raw, image.packed)
        wholes = (_nothing(image) if headers else _whole(image, file, number, beat) for number in numbers)
        if volumes == "mean" and image.volumes > 1:
            yield _stack(image, mean_of(wholes), 0)
            return
        for number, whole in zip(numbers, wholes, strict=True):
            stack = _stack(image, whole, number)
            stack.refused, refused = refused, []
            yield stack
            del stack, whole


def _nothing(image: _Image) -> np.ndarray:
    return no_numbers((image.frames, *image.frame), image.stored.newbyteorder("="))


def _whole(image: _Image, file, number: int, beat: Beat) -> np.ndarray:
    """[F, H, W, ...] of one volume."""
    file.seek(image.offset + number * image.size)
    planes = (image.planes,) if image.planes > 1 else ()
    frame = image.frame[:2] if planes else image.frame
    whole = np.empty((*planes, image.frames, *frame), image.stored)
    fill(file, whole, beat)
    if image.packed and number == image.volumes - 1:
        file.read(1)  # at its end the checksum is compared
    return np.ascontiguousarray(np.moveaxis(whole, 0, -1)) if planes else native(whole)


def _stack(image: _Image, whole: np.ndarray | None, volume: int) -> Stack:
    """whole: None where frames are read one by one, again for each pass."""

    @quietly("NIfTI")
    def load(wanted: Callable[[int], bool]) -> Iterator[tuple[int, np.ndarray]]:
        with opened(image.path) as raw:
            file = _unpacked(raw, image.packed)
            length = int(np.prod(image.frame)) * image.stored.itemsize
            for number in range(image.frames):
                if wanted(number):
                    out = np.empty(image.frame, image.stored)
                    file.seek(image.offset + volume * image.size + number * length)
                    fill(file, out)
                    yield number, native(out)[..., :3] if image.channels > 1 else native(out)

    dtype = image.stored.newbyteorder("=") if whole is None else whole.dtype
    return Stack(
        quantity="display8" if dtype == np.uint8 and (image.slope, image.intercept) == (1.0, 0.0) else "raw",
        length=image.frames,
        shape=image.frame[:2],
        dtype=dtype,
        load=load,
        holds=lambda stored: False,  # what can be kept is kept from the start
        channels=min(image.channels, 3),
        slope=image.slope,
        intercept=image.intercept,
        geometry=image.geometry,
        volume=image.frames > 1,
        described=True,
        declared=image.declared,
        whole=whole[..., :3] if whole is not None and image.channels > 1 else whole,
    )


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
    suffixes=formats.of("nifti").suffixes,
    read=read,
    needs=formats.of("nifti").needs,
    beside=beside,
    choices=("volumes", "headers"),
)
