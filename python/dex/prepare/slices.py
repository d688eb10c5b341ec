"""From a decoded stack to the square images that are stored.

Shape letters: H, W of a frame; S of a stored image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from . import modalities, normalise
from .readers import Refused, Stack
from .resampling import bicubic

if TYPE_CHECKING:
    from .sources import Source, Tile

MIN_SIDE = 32
PIXELS = 4
"""Version of the rules that turn pixels into images: never mix images of two versions."""

OVERSAMPLING = 2
"""Frame pixels per stored pixel along a side. Means of neighbours may shrink an 8-bit display frame down to this many
before it is resized."""
_REACH = 2  # Of the bicubic filter, in output pixels
_LACKING = 0.25  # Largest share of the neighbours that may be missing from the last mean
_STRIP = 2**21  # Numbers processed at a time: a whole picture as float32 would be its largest copy


class Slice(NamedTuple):
    """``image``: uint8 or uint16 [S, S], or uint8 [S, S, 3]. ``share``: foreground share of its content, without the
    padding. ``small``: the content's shorter side had fewer than MIN_SIDE pixels before it was resized. ``number``: of
    the stored frame that it shows, None if it is cut across several."""

    label: str
    image: np.ndarray
    share: float
    small: bool
    number: int | None = None


def slices(stack: Stack, source: Source, size: int, bits: int) -> Iterator[Slice]:
    """Every image that ``source`` (normalisation, planes, strides, fit, whole, tiles) makes of ``stack``.

    Pixels are float32 in 0..1 until they are rounded once to 8 or 16 bits. Colour always has 8 bits, and becomes grey
    where all channels agree. An 8-bit display frame that becomes an 8-bit image stays uint8 (``resize_eight``).
    ``slice_stride`` applies to volumes, ``frame_stride`` to other stacks.

    Padded images have square pixels by the spacing, a longer side of ``size``, and the content's own background level
    around it. Cropped images are the centre square. Tiles are cut at their size in pixels, in addition to the whole
    and without regard to the spacing. If the reader or the rule raises Refused, use nothing of this stack.
    """
    if bits not in (8, 16):
        raise ValueError(f"bits: expected 8 or 16, got {bits}")
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    rules = _Rules(stack, source.normalisation)
    for frame in stack.frames(source.planes, source.slice_stride if stack.volume else source.frame_stride):
        rule = rules.of(frame.part)
        if rule is None:
            continue
        resized = functools.partial(resize, rule=rule)
        if bits == 8 and rule is normalise.display:
            resized = resize_eight
        height, width = stack.extent or frame.pixels.shape[:2]
        if source.whole:
            box, (tall, wide) = (
                (_centre(height, width, frame.spacing), (size, size))
                if source.crop
                else ((0.0, 0.0, width, height), _square_pixels(height, width, frame.spacing, size))
            )
            content = resized(frame.pixels, box=box, height=tall, width=wide)
            yield _finished(frame.label, content, size, bits, min(height, width))._replace(number=frame.number)
        for tile in source.tiles:
            for left, top in places(tile, height, width):
                box = (left, top, left + tile.size, top + tile.size)
                content = resized(frame.pixels, box=box, height=size, width=size)
                label = f"{frame.label}-x{left}-y{top}-s{tile.size}"
                yield _finished(label, content, size, bits, tile.size)._replace(number=frame.number)


class Whole(NamedTuple):
    """A frame at its own size. ``image``: uint8 [H, W] or [H, W, 3]. ``spacing``: mm between rows and between columns.
    ``number``: see ``Slice``."""

    label: str
    image: np.ndarray
    spacing: tuple[float, float]
    number: int | None


def unscaled(stack: Stack, source: Source) -> Iterator[Whole]:
    """Every frame of the planes of ``source``, normalised as in ``slices`` but not resized. Raises Refused as there,
    and also for a frame of a part that cannot be scaled."""
    rules = _Rules(stack, source.normalisation)
    for frame in stack.frames(source.planes, 1):
        rule = rules.of(frame.part)
        if rule is None:
            raise Refused("constant", f"{frame.label}: nearly all of it is one value")
        as_it_is = rule is normalise.display and frame.pixels.dtype == np.uint8
        image = frame.pixels if as_it_is else normalise.to_uint8(rule(frame.pixels))
        yield Whole(frame.label, np.ascontiguousarray(image), frame.spacing, frame.number)


def enough(source: Source, size: int, bits: int) -> int | None:
    """How many pixels along the shorter side of a picture of ``source`` suffice, as ``resize_eight`` leaves them (see
    ``readers.read``). None if the whole picture is needed: for tiles, for other values than bytes, or for an unknown
    normalisation."""
    by_bytes = source.normalisation in ("display", "ct", "suv") and (source.slope, source.intercept) == (1, 0)
    if source.tiles or not source.whole or bits != 8 or not by_bytes:
        return None
    return OVERSAMPLING * size


def pieces(source: Source, size: int) -> int | None:
    """The side of the pieces into which a picture of ``source`` is cut if it is too large for one frame (see
    ``readers.read``): that of the stored images, so that each piece keeps its resolution. None: the picture is shrunk.
    0: it is refused, because the description's own tiles need the whole picture."""
    if source.tiles:
        return 0
    modality = modalities.known(source.modality)
    return size if modality is not None and modality.pieces else None


class _Rules:
    """The normalisation rule of each part of a stack. Raises Refused if a stack without parts has no rule."""

    def __init__(self, stack: Stack, name: str):
        self._stack, self._name = stack, name
        self._of_parts: dict[int, Callable[[np.ndarray], np.ndarray] | None] = {}
        if not stack.parts:
            self._of_parts[0] = self._rule(0)

    def of(self, part: int) -> Callable[[np.ndarray], np.ndarray] | None:
        """None for a part that cannot be scaled; it is then added to the stack's refused parts."""
        if part not in self._of_parts:
            self._of_parts[part] = None
            try:
                self._of_parts[part] = self._rule(part)
            except Refused as error:
                if error.reason != "constant":
                    raise
                origins = self._stack.origins
                self._stack.refused.append(error.about([origins[self._stack.parts.index(part)][0]] if origins else []))
        return self._of_parts[part]

    def _rule(self, part: int) -> Callable[[np.ndarray], np.ndarray]:
        rule = normalise.normaliser(self._name, self._stack, part)
        return _inverse(rule) if self._stack.inverted else rule


def places(tile: Tile, height: int, width: int) -> Iterator[tuple[int, int]]:
    """Left and top of each cut-out within both the tile's box and the frame."""
    left, top, right, bottom = tile.box or (0, 0, width, height)
    for y in range(max(0, top), min(bottom, height) - tile.size + 1, tile.stride):
        for x in range(max(0, left), min(right, width) - tile.size + 1, tile.stride):
            yield x, y


def resize(
    pixels: np.ndarray,
    rule: Callable[[np.ndarray], np.ndarray],
    box: tuple[float, float, float, float],
    height: int,
    width: int,
) -> np.ndarray:
    """Apply ``rule`` to the box (left, top, right, bottom) of a frame [H, W] or [H, W, 3] and resize it to float32
    [height, width] or [height, width, 3] in 0..1. Antialiased bicubic, first along the rows, strip by strip, then
    along the columns."""
    left, top, right, bottom = box
    first, last = _reached(top, bottom, height, len(pixels))
    rows = max(1, _STRIP // (pixels.shape[1] * (3 if pixels.ndim == 3 else 1)))
    narrow = []
    for start in range(first, last, rows):
        unit = rule(pixels[start : min(start + rows, last)])
        narrow.append(_each(unit, width, len(unit), (left, 0, right, len(unit))))
    columns = np.concatenate(narrow) if len(narrow) > 1 else narrow[0]
    return np.clip(_each(columns, width, height, (0, top - first, width, bottom - first)), 0, 1)


def resize_eight(pixels: np.ndarray, box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """Resize the box (left, top, right, bottom) of a uint8 frame [H, W] or [H, W, 3] to uint8 [height, width] or
    [height, width, 3].

    Where the box is less than 2 x OVERSAMPLING times as long as the result, this agrees within one level with the
    rounded result of ``resize`` and the rule / 255. A longer box is first divided by a whole number: each pixel becomes
    the mean of that many neighbours.
    """
    rows, columns = (
        _span(*side) for side in ((box[1], box[3], height, pixels.shape[0]), (box[0], box[2], width, pixels.shape[1]))
    )
    part = pixels[rows.first : rows.last, columns.first : columns.last]
    if rows.by * columns.by > 1:
        tall = max(1, _STRIP // (part[0].size * rows.by)) * rows.by
        strips = (np.ascontiguousarray(part[y : y + tall]) for y in range(0, len(part), tall))
        part = np.concatenate([np.asarray(Image.fromarray(strip).reduce((columns.by, rows.by))) for strip in strips])
    box = (columns.start, rows.start, columns.end, rows.end)
    if box == (0, 0, part.shape[1], part.shape[0]) and part.shape[:2] == (height, width):
        return part
    return bicubic(np.ascontiguousarray(part), box, height, width)


class _Span(NamedTuple):
    """Pixels first .. last - 1 along a side of a frame, divided by ``by``. start, end: of the box, in pixels after the
    division."""

    first: int
    last: int
    by: int
    start: float
    end: float


def _span(start: float, end: float, wanted: int, length: int) -> _Span:
    """The pixels of a side of ``length`` pixels that are needed to make ``wanted`` pixels of its part from ``start``
    to ``end``."""
    most = max(1, int((end - start) / wanted / OVERSAMPLING))
    first, last = _reached(start, end, wanted, length, most)
    # A last mean over few pixels would weigh as much as the others.
    by = min(range(most // 2 + 1, most + 1), key=lambda by: (-(last - first) % by > _LACKING * by, -by))
    return _Span(first, last, by, (start - first) / by, (end - first) / by)


def _reached(start: float, end: float, wanted: int, length: int, more: int = 0) -> tuple[int, int]:
    """First and last + 1 of the pixels that the filter reads for the part from ``start`` to ``end``, widened by
    ``more`` on both sides."""
    reach = int(np.ceil(_REACH * max(1.0, (end - start) / wanted))) + more
    return max(0, int(start) - reach), min(length, int(np.ceil(end)) + reach)


def _each(unit: np.ndarray, width: int, height: int, box: tuple[float, float, float, float]) -> np.ndarray:
    if unit.ndim == 3:
        return np.stack([_each(unit[:, :, c], width, height, box) for c in range(unit.shape[2])], axis=2)
    if box == (0, 0, unit.shape[1], unit.shape[0]) and unit.shape == (height, width):
        return unit
    image = Image.fromarray(np.ascontiguousarray(unit))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _inverse(rule: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: 1 - rule(values)


def _square_pixels(height: float, width: float, spacing: tuple[float, float], size: int) -> tuple[int, int]:
    """Height and width of a frame with square pixels and a longer side of ``size``."""
    extent = np.array((height, width)) * np.array(spacing)
    tall, wide = (max(1, round(float(v))) for v in extent * (size / extent.max()))
    return tall, wide


def _centre(height: float, width: float, spacing: tuple[float, float]) -> tuple[float, float, float, float]:
    """The box, in pixels, of the largest centred square in mm."""
    rows, columns = spacing
    side = min(height * rows, width * columns)
    tall, wide = side / rows, side / columns
    left, top = (width - wide) / 2, (height - tall) / 2
    return max(0.0, left), max(0.0, top), min(width, left + wide), min(height, top + tall)


def _finished(label: str, content: np.ndarray, size: int, bits: int, shorter: float) -> Slice:
    if content.ndim == 3 and all(np.array_equal(content[:, :, 0], content[:, :, c]) for c in (1, 2)):
        content = np.ascontiguousarray(content[:, :, 0])
    eight = content if content.dtype == np.uint8 else normalise.to_uint8(content)
    grey = normalise.grey(eight)
    share = normalise.foreground_share(grey)
    whole = np.rint(content * 65535).astype(np.uint16) if bits == 16 and content.ndim == 2 else eight
    return Slice(label, _padded(whole, grey, size), share, shorter < MIN_SIDE)


def _padded(content: np.ndarray, grey: np.ndarray, size: int) -> np.ndarray:
    """Pad the content to [size, size] with its background: the mean of those pixels of its outermost ring whose 8-bit
    grey value is the background level."""
    height, width = content.shape[:2]
    if (height, width) == (size, size):
        return content
    ring = np.zeros((height, width), bool)
    ring[[0, -1], :] = ring[:, [0, -1]] = True
    level = np.rint(content[ring & (grey == normalise.background(grey))].mean(axis=0)).astype(content.dtype)
    out = np.full((size, size, *content.shape[2:]), level, content.dtype)
    top, left = (size - height) // 2, (size - width) // 2
    out[top : top + height, left : left + width] = content
    return out
