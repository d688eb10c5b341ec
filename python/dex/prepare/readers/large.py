"""Pictures with more pixels than a frame may have: cut into pieces at full resolution, or shrunk by a whole number.

    stack(path, picture, limits, beat, side=256)     # pieces of 256 x 256 pixels, one per frame
    stack(path, picture, limits, beat, side=None)    # one frame of means over neighbours

A TIFF is decoded by its own tiles or strips: those of an area are joined into a small TIFF. Pictures in other formats
can only be decoded whole, if they fit into memory.
"""

from __future__ import annotations

import io
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from dex.common import bombs

from .files import BoundedFile, Limits, opened, quietly
from .reader import Beat
from .stack import Refused, Stack

if TYPE_CHECKING:
    from PIL import Image

MAX_TILES = 2**18
_WORKING = 6  # Working memory, in bytes per channel of a pixel, of decoders that keep the whole picture
_SPARE = 2**26  # Bytes of memory needed beside a picture that is decoded whole
_AREA = 2**22  # Pixels of a picture that are processed at once
_CELL, _STRIPS = 2**23, 2**20  # Pixels decoded at once: of the largest tile; of several strips together
_SMALL = {"1": 1, "L": 1, "P": 1}  # Bytes per pixel in Pillow's memory, for modes other than four bytes

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_OFFSETS, _SAMPLES, _ROWS, _COUNTS, _PLANAR = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_COUNTS, _TABLES = 322, 323, 324, 325, 347
_COPIED = (_BITS, _COMPRESSION, _PHOTOMETRIC, 266, _SAMPLES, _PLANAR, 317, 320, 338, 339, _TABLES, 530, 531)
"""Tags that describe the encoding of pixels; 266 fill order, 317 predictor, 320 palette, 338 extra samples, 339 sample
format, 530 and 531 chroma subsampling and positions."""
_AS_THEY_ARE, _OLD_JPEG, _APART = 1, 6, 2
_SHORT, _LONG, _BYTES = 3, 4, 7


class Source(Protocol):
    def area(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Its pixels as stored, before the orientation is applied."""


class Picture(NamedTuple):
    """What is known of a picture before it is decoded.

    open: maps a file and the number of a page to that page. convert: maps a part of it to pixels [H, W] or [H, W, 3] of
    ``dtype``. orientation: of EXIF, 1 to 8. divisor: the largest power of two by which the decoder can divide the
    sides. fields: all other fields of its stack.
    """

    page: int
    channels: int
    dtype: np.dtype
    orientation: int
    divisor: int
    open: Callable[[BoundedFile, int], Image.Image]
    convert: Callable[[Image.Image], np.ndarray]
    fields: dict[str, Any]

    @property
    def pixel(self) -> int:
        """Bytes per pixel."""
        return self.channels * self.dtype.itemsize


def stack(path: Path, picture: Picture, limits: Limits, beat: Beat, side: int | None) -> Stack:
    """The stack of a large picture. side: of the pieces, which start at the upper left; the remainder on the right and
    at the bottom is not shown. None: one frame, with its sides divided by the least whole number that suffices. With 0,
    Refused is raised."""
    with opened(path) as file:
        image = picture.open(file, picture.page)
        height, width = _sides(image)
        if side == 0:
            limits.check_frame(height, width)
        by = math.ceil(math.sqrt(height * width / limits.pixels)) if side is None else 1
        drafted = side is None and 2 ** math.ceil(math.log2(by)) <= picture.divisor
        by = 2 ** math.ceil(math.log2(by)) if drafted else by
        if min(height, width) < max(by, side or 1):
            raise Refused("too large", f"{height} x {width} pixels; {limits.remedy}")
        by_parts = _tiling(image) is not None
        if not by_parts:
            _check_whole(image, picture, limits, by, drafted)
        limits.check_all(height * width * picture.pixel, file.size)
    if image.format == "TIFF" and not by_parts and picture.orientation != 1:  # Pillow turns it
        picture, (height, width) = picture._replace(orientation=1), image.size[::-1]
    if side is not None:
        fields = _in_pieces(path, picture, limits, (height, width), side)
    elif drafted:
        fields = _drafted(path, picture, (height, width), by)
    else:
        fields = _shrunk(path, picture, limits, beat, (height, width), by)
    tall, wide = fields["shape"]
    return Stack(
        sides=(width, height) if picture.orientation >= 5 else (height, width),
        dtype=picture.dtype,
        channels=picture.channels,
        holds=lambda stored: limits.holds(stored, tall, wide, 4),
        origins=(("", picture.page),) * fields["length"],
        **fields,
        **picture.fields,
    )


def _in_pieces(path: Path, picture: Picture, limits: Limits, sides: tuple[int, int], side: int) -> dict[str, Any]:
    down, across = (length // side for length in sides)

    @quietly("picture")
    def load(wanted: Callable[[int], bool]) -> Iterator[tuple[int, np.ndarray]]:
        with opened(path) as file:
            source = _source(picture, file, limits)
            for number in filter(wanted, range(down * across)):
                top, left = number // across * side, number % across * side
                yield number, _turned(source.area(left, top, left + side, top + side), picture.orientation)

    labels = (f"image-x{number % across * side}-y{number // across * side}-s{side}" for number in range(down * across))
    return {"length": down * across, "shape": (side, side), "load": load, "labels": tuple(labels)}


def _shrunk(
    path: Path, picture: Picture, limits: Limits, beat: Beat, sides: tuple[int, int], by: int
) -> dict[str, Any]:
    """One frame of means over ``by`` x ``by`` neighbours."""
    height, width = (length // by for length in sides)
    depth = () if picture.channels == 1 else (picture.channels,)

    def bands() -> Iterator[tuple[int, np.ndarray]]:
        rows = max(1, _AREA // (by * width * by))
        with opened(path) as file:
            source = _source(picture, file, limits)
            for top in range(0, height, rows):
                bottom = min(height, top + rows)
                beat()
                yield top, source.area(0, top * by, width * by, bottom * by)

    @quietly("picture")
    def load(wanted: Callable[[int], bool]) -> Iterator[tuple[int, np.ndarray]]:
        if not wanted(0):
            return
        out = np.empty((height, width, *depth), picture.dtype)
        for top, band in bands():
            out[top : top + len(band) // by] = _means(band, by)
        yield 0, _turned(out, picture.orientation)

    shape = (width, height) if picture.orientation >= 5 else (height, width)
    return {
        "length": 1,
        "shape": shape,
        "load": load,
        "peek": quietly("picture")(lambda: (band for _, band in bands())),
    }


def _means(band: np.ndarray, by: int) -> np.ndarray:
    """The means over ``by`` x ``by`` neighbours in [by * H, by * W] or [by * H, by * W, 3], in the same dtype."""
    if band.dtype == np.uint8:
        from PIL import Image

        return np.asarray(Image.fromarray(band).reduce(by))
    total = np.zeros((len(band) // by, band.shape[1] // by, *band.shape[2:]))
    for y in range(by):
        for x in range(by):
            total += band[y::by, x::by]
    total /= by**2
    return (total if band.dtype.kind == "f" else np.rint(total)).astype(band.dtype)


def _drafted(path: Path, picture: Picture, sides: tuple[int, int], by: int) -> dict[str, Any]:
    """One frame at a smaller size from the decoder of JPEG or JPEG 2000, which omits the finer detail."""
    height, width = (-(-length // by) for length in sides)
    depth = () if picture.channels == 1 else (picture.channels,)

    @quietly("picture")
    def load(wanted: Callable[[int], bool]) -> Iterator[tuple[int, np.ndarray]]:
        if not wanted(0):
            return
        out = np.empty((height, width, *depth), picture.dtype)
        with opened(path) as file:
            image = picture.open(file, picture.page)
            if image.format == "JPEG2000":
                image.reduce = by.bit_length() - 1
                image.load()
            else:
                image.draft(None, (sides[1] // by, sides[0] // by))
            rows = max(1, _AREA // width)
            for top in range(0, height, rows):
                out[top : top + rows] = picture.convert(image.crop((0, top, width, min(height, top + rows))))
        yield 0, _turned(out, picture.orientation)

    shape, extent = (height, width), (sides[0] / by, sides[1] / by)
    if picture.orientation >= 5:
        shape, extent = shape[::-1], extent[::-1]
    return {"length": 1, "shape": shape, "load": load, "extent": extent}


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels upright, according to the EXIF orientation."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    flip = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
    down, across = flip[orientation]
    return np.ascontiguousarray(pixels[::down, ::across])


def _sides(image: Image.Image) -> tuple[int, int]:
    """Height and width as stored; for a TIFF, Pillow's size is after the orientation."""
    if image.format == "TIFF":
        return int(image.tag_v2[_LENGTH]), int(image.tag_v2[_WIDTH])
    return image.size[1], image.size[0]


def _check_whole(image: Image.Image, picture: Picture, limits: Limits, by: int, drafted: bool) -> None:
    """Raise Refused if a picture that can only be decoded whole does not fit into memory. by: divisor of its sides;
    drafted: whether the decoder divides them."""
    height, width = _sides(image)
    mode = image.mode
    pixel = 2 if mode.startswith("I;16") else _SMALL.get(mode, 4)
    turned = 2 if image.format == "TIFF" and picture.orientation != 1 else 1
    working = 0  # Additional bytes per pixel
    if image.format == "TIFF":
        working = pixel
    elif image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        working = 2 * len(image.getbands())  # Coefficients of the whole image
    elif image.format in ("JPEG2000", "WEBP"):
        working = _WORKING * len(image.getbands()) / (by**2 if drafted else 1)
    if reason := image.format == "TIFF" and bombs.too_much_of_tiff(image, limits.pixels):
        raise Refused("too large", reason)
    frame = picture.pixel / by**2 if by > 1 else 0
    needed = math.ceil(height * width * (pixel * turned / (by**2 if drafted else 1) + working + frame)) + _SPARE
    if needed > limits.memory:
        raise Refused(
            "too large",
            f"{height} x {width} pixels, which can only be decoded as a whole, take {math.ceil(needed / 2**20)} MB; "
            f"give --memory {math.ceil(needed / 2**20)}, or save it as a tiled TIFF, which needs no more memory",
        )


def _source(picture: Picture, file: BoundedFile, limits: Limits) -> Source:
    image = picture.open(file, picture.page)
    tiling = _tiling(image)
    return _Whole(image, picture) if tiling is None else _Tiles(file, tiling, picture, limits.memory // 4)


class _Whole:
    """A picture that is decoded completely when its first area is requested."""

    def __init__(self, image: Image.Image, picture: Picture):
        self._image, self._picture = image, picture

    def area(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        self._image.load()
        return self._picture.convert(self._image.crop((left, top, right, bottom)))


@dataclass(frozen=True)
class _Tiling:
    """Tiles, or strips of the full width, of ``tall`` x ``wide`` pixels. offsets, counts: first byte and number of
    bytes of each, row by row, for each of ``planes``. tags: encoding of the pixels, as type and values."""

    height: int
    width: int
    tall: int
    wide: int
    tiles: bool
    planes: int
    offsets: tuple[int, ...] = field(repr=False)
    counts: tuple[int, ...] = field(repr=False)
    order: str
    tags: dict[int, tuple[int, tuple[int, ...] | bytes]] = field(repr=False)

    @property
    def across(self) -> int:
        return -(-self.width // self.wide)

    @property
    def together(self) -> int:
        """Number of rows of tiles or strips that are decoded at once."""
        return 1 if self.tiles else max(1, _STRIPS // (self.tall * self.wide))


def _tiling(image: Image.Image) -> _Tiling | None:
    """The tiling of a TIFF; None for a TIFF that cannot be decoded in parts, and for other formats. Raises Refused if
    tiles are missing."""
    if image.format != "TIFF":
        return None
    tags = image.tag_v2
    height, width = _sides(image)
    tiles = _TILE_OFFSETS in tags
    offsets, counts = (
        tuple(int(v) for v in _listed(tags.get(tag, ())))
        for tag in ((_TILE_OFFSETS, _TILE_COUNTS) if tiles else (_OFFSETS, _COUNTS))
    )
    if len(offsets) > MAX_TILES:
        raise Refused("too large", f"{len(offsets):,} strips or tiles, at most {MAX_TILES:,}; save it with larger ones")
    compression, samples = int(tags.get(_COMPRESSION, _AS_THEY_ARE)), int(tags.get(_SAMPLES, 1))
    planes = samples if int(tags.get(_PLANAR, 1)) == _APART else 1
    bits = [int(v) for v in _listed(tags.get(_BITS, 1))]
    pixel = sum(bits) if len(bits) == samples else bits[0] * samples
    if tiles:
        tall, wide = int(tags[_TILE_LENGTH]), int(tags[_TILE_WIDTH])
    else:
        tall, wide = min(int(tags.get(_ROWS, height)), height), width
    if min(tall, wide) < 1 or compression == _OLD_JPEG:
        return None
    if compression == _AS_THEY_ARE and not tiles and planes == 1 and pixel % 8 == 0 and tall * wide > _STRIPS:
        if len(offsets) == -(-height // tall):  # Treat each row as a separate strip
            offsets = tuple(offsets[y // tall] + y % tall * width * pixel // 8 for y in range(height))
            counts, tall = (width * pixel // 8,) * height, 1
    expected = -(-height // tall) * -(-width // wide) * planes
    if len(offsets) != expected or len(counts) != expected or tall * wide > _CELL:
        return None
    if not all(counts):
        raise Refused("unsupported", "a TIFF with missing tiles; save it with all of them")
    copied = {tag: (tags.tagtype.get(tag, _SHORT), _values(tags[tag])) for tag in _COPIED if tag in tags}
    order = "<" if tags.prefix[:2] == b"II" else ">"
    return _Tiling(height, width, tall, wide, tiles, planes, offsets, counts, order, copied)


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _values(value: Any) -> tuple[int, ...] | bytes:
    if isinstance(value, bytes):
        return value
    return tuple(int(v) for v in _listed(value))


class _Tiles:
    """A TIFF of which only the tiles of an area are decoded; the last ones are kept, up to ``kept`` bytes."""

    def __init__(self, file: BoundedFile, tiling: _Tiling, picture: Picture, kept: int):
        self._file, self._tiling, self._picture, self._left = file, tiling, picture, kept
        self._cells: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def area(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        tall, wide = self._tiling.tall * self._tiling.together, self._tiling.wide
        depth = () if self._picture.channels == 1 else (self._picture.channels,)
        out = np.empty((bottom - top, right - left, *depth), self._picture.dtype)
        for row in range(top // tall, (bottom - 1) // tall + 1):
            for column in range(left // wide, (right - 1) // wide + 1):
                x, y = column * wide, row * tall
                cell = self._cell(row, column)[max(0, top - y) : bottom - y, max(0, left - x) : right - x]
                begin, start = max(0, y - top), max(0, x - left)
                out[begin : begin + len(cell), start : start + cell.shape[1]] = cell
        return out

    def _cell(self, row: int, column: int) -> np.ndarray:
        """A tile, or some strips; they may reach beyond the picture."""
        if (row, column) in self._cells:
            self._cells.move_to_end((row, column))
            return self._cells[row, column]
        tiling = self._tiling
        down = -(-tiling.height // tiling.tall)
        rows = range(row * tiling.together, min(down, (row + 1) * tiling.together))
        numbers = [(plane * down + y) * tiling.across + column for plane in range(tiling.planes) for y in rows]
        height = len(rows) * tiling.tall
        if not tiling.tiles:
            height = min(height, tiling.height - rows.start * tiling.tall)
        cell = self._picture.convert(self._picture.open(self._small(numbers, tiling.wide, height), 0))
        self._cells[row, column] = cell
        self._left -= cell.nbytes
        while self._left < 0 and len(self._cells) > 1:
            self._left += self._cells.popitem(last=False)[1].nbytes
        return cell

    def _small(self, numbers: list[int], width: int, height: int) -> BoundedFile:
        """A TIFF with only these tiles."""
        tiling = self._tiling
        parts = []
        for number in numbers:
            self._file.seek(tiling.offsets[number])
            parts.append(self._file.read(tiling.counts[number]))
            if len(parts[-1]) != tiling.counts[number]:
                raise Refused("unreadable", "the file ends within a tile")
        offsets = np.cumsum([8, *(len(part) + len(part) % 2 for part in parts)]).tolist()
        tags: dict[int, tuple[int, tuple[int, ...] | bytes]] = tiling.tags | {
            _WIDTH: (_LONG, (width,)),
            _LENGTH: (_LONG, (height,)),
            (_TILE_OFFSETS if tiling.tiles else _OFFSETS): (_LONG, tuple(offsets[:-1])),
            (_TILE_COUNTS if tiling.tiles else _COUNTS): (_LONG, tuple(map(len, parts))),
        }
        if tiling.tiles:
            tags |= {_TILE_WIDTH: (_LONG, (tiling.wide,)), _TILE_LENGTH: (_LONG, (tiling.tall,))}
        else:
            tags[_ROWS] = (_LONG, (tiling.tall,))
        body = b"".join(part + b"\0" * (len(part) % 2) for part in parts)
        data = _header(tiling.order, offsets[-1]) + body + _directory(tiling.order, offsets[-1], tags)
        return BoundedFile(_InMemory(data), len(data))


class _InMemory(io.BytesIO):
    """A buffer with a name, like a file."""

    name = ""


def _header(order: str, directory: int) -> bytes:
    return (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HL", 42, directory)


def _directory(order: str, place: int, tags: dict[int, tuple[int, tuple[int, ...] | bytes]]) -> bytes:
    """The directory of a TIFF at byte ``place``, followed by its values."""
    entries, values = b"", b""
    behind = place + 2 + 12 * len(tags) + 4
    for tag, (kind, value) in sorted(tags.items()):
        if isinstance(value, bytes):
            kind, count, data = _BYTES, len(value), value
        else:
            kind = _SHORT if kind == _SHORT and max(value) < 2**16 else _LONG
            count, data = len(value), struct.pack(f"{order}{len(value)}{'H' if kind == _SHORT else 'L'}", *value)
        if len(data) <= 4:
            entries += struct.pack(f"{order}HHL", tag, kind, count) + data.ljust(4, b"\0")
        else:
            entries += struct.pack(f"{order}HHLL", tag, kind, count, behind + len(values))
            values += data + b"\0" * (len(data) % 2)
    return struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + values
