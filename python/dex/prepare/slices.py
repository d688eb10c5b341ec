"""From a decoded stack to the square images that are stored.

Shape letters: H, W of a frame; S of a stored image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from . import normalise
from .readers import Frame, Refused, Stack

if TYPE_CHECKING:
    from .sources import Source, Tile

MIN_SIDE = 32

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
    grey. The stride is for stacks that are no volume.

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
        height, width = frame.pixels.shape[:2]
        if source.whole:
            box, (tall, wide) = (
                (_centre(frame), (size, size))
                if source.crop
                else ((0.0, 0.0, width, height), _square_pixels(frame, size))
            )
            content = resize(frame.pixels, rule, box, tall, wide)
            yield _finished(frame.label, content, size, bits, min(height, width))._replace(number=frame.number)
        for tile in source.tiles:
            for left, top in places(tile, height, width):
                box = (left, top, left + tile.size, top + tile.size)
                content = resize(frame.pixels, rule, box, size, size)
                label = f"{frame.label}-x{left}-y{top}-s{tile.size}"
                yield _finished(label, content, size, bits, tile.size)._replace(number=frame.number)


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
                self._stack.refused.append(error)
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
    first, last = int(np.floor(top)), int(np.ceil(bottom))
    rows = max(1, _STRIP // (pixels.shape[1] * (3 if pixels.ndim == 3 else 1)))
    narrow = []
    for start in range(first, last, rows):
        unit = rule(pixels[start : min(start + rows, last)])
        narrow.append(_each(unit, width, len(unit), (left, 0, right, len(unit))))
    columns = np.concatenate(narrow) if len(narrow) > 1 else narrow[0]
    return np.clip(_each(columns, width, height, (0, top - first, width, bottom - first)), 0, 1)


def _each(unit: np.ndarray, width: int, height: int, box: tuple[float, float, float, float]) -> np.ndarray:
    if unit.ndim == 3:
        return np.stack([_each(unit[:, :, c], width, height, box) for c in range(unit.shape[2])], axis=2)
    if box == (0, 0, unit.shape[1], unit.shape[0]) and unit.shape == (height, width):
        return unit
    image = Image.fromarray(np.ascontiguousarray(unit))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _inverse(rule: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: 1 - rule(values)


def _square_pixels(frame: Frame, size: int) -> tuple[int, int]:
    """Height and width that show the frame with square pixels, the longer of them `size`."""
    extent = np.array(frame.pixels.shape[:2]) * np.array(frame.spacing)
    tall, wide = (max(1, round(float(v))) for v in extent * (size / extent.max()))
    return tall, wide


def _centre(frame: Frame) -> tuple[float, float, float, float]:
    """The largest centre square, in mm, as a box in pixels."""
    height, width = frame.pixels.shape[:2]
    rows, columns = frame.spacing
    side = min(height * rows, width * columns)
    tall, wide = side / rows, side / columns
    left, top = (width - wide) / 2, (height - tall) / 2
    return max(0.0, left), max(0.0, top), min(width, left + wide), min(height, top + tall)


def _finished(label: str, content: np.ndarray, size: int, bits: int, shorter: int) -> Slice:
    if content.ndim == 3 and (content == content[:, :, :1]).all():
        content = content[:, :, 0]
    eight = normalise.to_uint8(content)
    share = normalise.foreground_share(eight)
    whole = np.rint(content * 65535).astype(np.uint16) if bits == 16 and content.ndim == 2 else eight
    return Slice(label, _padded(whole, eight, size), share, shorter < MIN_SIDE)


def _padded(content: np.ndarray, eight: np.ndarray, size: int) -> np.ndarray:
    """The content in the middle of its background: the mean of those pixels of its outermost ring whose grey value is
    the background level of its 8-bit form."""
    height, width = content.shape[:2]
    if (height, width) == (size, size):
        return content
    grey = eight if eight.ndim == 2 else (eight.sum(axis=2, dtype=np.uint16) // 3).astype(np.uint8)
    ring = np.zeros((height, width), bool)
    ring[[0, -1], :] = ring[:, [0, -1]] = True
    level = np.rint(content[ring & (grey == normalise.background(eight))].mean(axis=0)).astype(content.dtype)
    out = np.full((size, size, *content.shape[2:]), level, content.dtype)
    top, left = (size - height) // 2, (size - width) // 2
    out[top : top + height, left : left + width] = content
    return out
