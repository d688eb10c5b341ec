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
"""The number of the rules by which the pixels of an image come about: images of two of them are not to be mixed."""

OVERSAMPLING = 2
"""Pixels of a frame for each that is stored, along a side: down to this many, means of neighbours may stand for a
frame of 8 bits for display."""
_REACH = 2  # of the bicubic filter, in pixels that come out
_LACKING = 0.25  # of the neighbours that a mean is of
_STRIP = 2**21  # numbers worked on at a time: float32 of a whole picture would be its largest copy


class Slice(NamedTuple):
    """`image`: uint8 or uint16 [S, S], or uint8 [S, S, 3]. `share`: of its content, padding apart, that is foreground.
    `small`: the content's shorter side had fewer than MIN_SIDE pixels before it was resized. `number`: of the stored
    frame that it shows, None where it is cut across several."""

    label: str
    image: np.ndarray
    share: float
    small: bool
    number: int | None = None


def slices(stack: Stack, source: Source, size: int, bits: int) -> Iterator[Slice]:
    """Every image that `source` (normalisation, planes, frame_stride, fit, whole, tiles) makes of `stack`, as unit
    float32 until one last rounding to 8 or 16 bits; colour always has 8, and where all channels agree it is given as
    grey. What is 8 bits for display already, and becomes 8 bits, stays so (`resize_eight`). The stride is for stacks
    that are no volume.

    Padded: square pixels by the spacing, the longer side `size`, the content's own background level around it. Cropped:
    the centre square. Tiles are cut at their size in pixels beside the whole, the spacing
    aside. Refused, from the reader or the rule, means that nothing of this stack is to be used.
    """
    if bits not in (8, 16):
        raise ValueError(f"bits: expected 8 or 16, got {bits}")
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    rules = _Rules(stack, source.normalisation)
    for frame in stack.frames(source.planes, 1 if stack.volume else source.frame_stride):
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
    """A frame at its own size. `image`: uint8 [H, W] or [H, W, 3]. `spacing`: mm of rows and of columns. `number`: as
    of `Slice`."""

    label: str
    image: np.ndarray
    spacing: tuple[float, float]
    number: int | None


def unscaled(stack: Stack, source: Source) -> Iterator[Whole]:
    """Every frame of the planes of `source` by its normalisation, as `slices` gives them before they are resized.
    Refused as there; a frame of a part that cannot be scaled is refused too."""
    rules = _Rules(stack, source.normalisation)
    for frame in stack.frames(source.planes, 1):
        rule = rules.of(frame.part)
        if rule is None:
            raise Refused("constant", f"{frame.label}: nearly all of it is one value")
        as_it_is = rule is normalise.display and frame.pixels.dtype == np.uint8
        image = frame.pixels if as_it_is else normalise.to_uint8(rule(frame.pixels))
        yield Whole(frame.label, np.ascontiguousarray(image), frame.spacing, frame.number)


def enough(source: Source, size: int, bits: int) -> int | None:
    """The pixels of the shorter side that suffice of a picture of `source` (`readers.read`): as `resize_eight` leaves
    them. None: the whole is needed, for tiles, for numbers, or since nothing says what becomes of it."""
    by_bytes = source.normalisation in ("display", "ct", "suv") and (source.slope, source.intercept) == (1, 0)
    if source.tiles or not source.whole or bits != 8 or not by_bytes:
        return None
    return OVERSAMPLING * size


def pieces(source: Source, size: int) -> int | None:
    """The sides of the pieces that a picture of `source` is cut into where it has too many pixels for one frame
    (`readers.read`): those of the images that are stored, so that each keeps its resolution. None: it is shrunk. 0: it
    is refused, since the description's own tiles are of the whole picture."""
    if source.tiles:
        return 0
    modality = modalities.known(source.modality)
    return size if modality is not None and modality.pieces else None


class _Rules:
    """The rule of each part of a stack. Refused where a stack that has no parts has none."""

    def __init__(self, stack: Stack, name: str):
        self._stack, self._name = stack, name
        self._of_parts: dict[int, Callable[[np.ndarray], np.ndarray] | None] = {}
        if not stack.parts:
            self._of_parts[0] = self._rule(0)

    def of(self, part: int) -> Callable[[np.ndarray], np.ndarray] | None:
        """None for a part that cannot be scaled, which is then among the stack's refused ones."""
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
    """Left and top of each cut-out that lies within the tile's box and the frame."""
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
    """Unit float32 [height, width] or [height, width, 3] of `rule` over the box (left, top, right, bottom) of a frame
    [H, W] or [H, W, 3]: antialiased bicubic, first along the rows, strip by strip, then along the columns."""
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
    """uint8 [height, width] or [height, width, 3] of the box (left, top, right, bottom) of a uint8 frame [H, W] or
    [H, W, 3]: what `resize` makes of it by / 255, rounded, within one level, where its sides are less than
    2 x OVERSAMPLING times too long. Longer ones are first divided by a whole number, by means of as many neighbours.
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
    """Pixels first .. last - 1 along a side of a frame, divided by `by`; start, end: of the box, in what comes out."""

    first: int
    last: int
    by: int
    start: float
    end: float


def _span(start: float, end: float, wanted: int, length: int) -> _Span:
    """What of a side of `length` pixels it takes to make `wanted` ones of its part from `start` to `end`."""
    most = max(1, int((end - start) / wanted / OVERSAMPLING))
    first, last = _reached(start, end, wanted, length, most)
    # a last mean of few pixels would weigh as much as the others
    by = min(range(most // 2 + 1, most + 1), key=lambda by: (-(last - first) % by > _LACKING * by, -by))
    return _Span(first, last, by, (start - first) / by, (end - first) / by)


def _reached(start: float, end: float, wanted: int, length: int, more: int = 0) -> tuple[int, int]:
    """First and last + 1 of a side's pixels that the filter takes for its part from `start` to `end`, and `more`."""
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
    """Height and width that show a frame with square pixels, the longer of them `size`."""
    extent = np.array((height, width)) * np.array(spacing)
    tall, wide = (max(1, round(float(v))) for v in extent * (size / extent.max()))
    return tall, wide


def _centre(height: float, width: float, spacing: tuple[float, float]) -> tuple[float, float, float, float]:
    """The largest centre square, in mm, as a box in pixels."""
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
    """The content in the middle of its background: the mean of those pixels of its outermost ring whose grey value, of
    8 bits, is the background level."""
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
