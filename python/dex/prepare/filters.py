"""Decide whether a slice is unfit for the corpus, and whether it may contain burned-in text. numpy only.

Shape letters: S side of a stored image in pixels, N columns of windows, R runs of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .normalise import FOREGROUND_STEP

if TYPE_CHECKING:
    from .sources import Source

WITHDRAWN = "withdrawn"
DROPPED = ("foreground", "blank", "too small", "exact duplicate", "near duplicate", WITHDRAWN)
MEANING = {
    "foreground": "less foreground than the rule requires",
    "blank": "nearly one level everywhere",
    "too small": "fewer than 32 pixels along a side",
}
"""The verdicts in words."""

_BLOCK = 16  # Side in pixels of the blocks whose means decide on "blank": averaging removes noise
_WINDOW, _STRIDE = 24, 8  # Windows for the search for text: width and step, in columns
_LINE = (4, 12)  # Rows of a line of text
_GROUNDS = ((0.06, 0.2), (0.18, 0.6))
"""Shares of full scale: the largest contrast of a background row, and the least contrast of letters on it. The second
pair is for grain and speckle, above which only clear letters rise."""
_STROKES = 1.5  # Least number of strokes that the mean row of a line crosses within a window
_WINDOWS = 2  # Least number of windows with text in a suspect image


def verdict(image: np.ndarray, share: float, small: bool, source: Source) -> str | None:
    """Why a slice is dropped: "too small", "blank" or "foreground", the first that holds; None if it is kept.

    image: uint8 or uint16 [S, S] or [S, S, 3], as it would be stored. share: foreground share of its content
    (``normalise.foreground_share``); the slice is dropped below source.min_foreground. small: its content had too few
    pixels before it was resized. An image is blank if the means of its 16 x 16 blocks differ by at most 0.02 of full
    scale.
    """
    if small:
        return "too small"
    bright = _brightest(image)
    tall, wide = (side // _BLOCK for side in bright.shape)
    bands = bright[: tall * _BLOCK, : wide * _BLOCK].reshape(tall, _BLOCK, wide * _BLOCK)
    sums = bands.sum(axis=1, dtype=np.uint32).reshape(tall, wide, _BLOCK).sum(axis=2)
    if int(sums.max()) - int(sums.min()) <= FOREGROUND_STEP * np.iinfo(image.dtype).max * _BLOCK**2:
        return "blank"
    return "foreground" if share < source.min_foreground else None


def suspect_text(image: np.ndarray) -> bool:
    """Whether an image, uint8 or uint16 [S, S] or [S, S, 3] with S about 256, may contain burned-in text.

    Text is a band of 4 to 12 rows between quiet rows, crossed by strokes. In windows of 24 columns, the measure of a
    band is its total variation along the rows divided by its contrast: a blob that every row crosses once has 2. An
    image with two windows of at least 3 is suspect.

    The test is for overlays in empty margins, as on ultrasound screens. It misses text over anatomy, letters lower than
    4 or higher than 12 pixels, and faint letters on grain; it detects a single letter (the side marker of a radiograph)
    only on black. A negative result proves nothing.
    """
    bright = _brightest(image)
    if min(bright.shape) < _WINDOW:
        return False
    count = (bright.shape[1] - _WINDOW) // _STRIDE + 1
    # Transposed, because numpy reduces over the first axis many rows at a time. A window is three strips of 8 columns.
    columns = np.ascontiguousarray(bright.T[: (count + 2) * _STRIDE])
    strips = columns.reshape(count + 2, _STRIDE, -1)
    high = _over_three(np.maximum, strips.max(axis=1))
    low = _over_three(np.minimum, strips.min(axis=1))
    steps = np.zeros(columns.shape, np.uint16)
    np.subtract(np.maximum(columns[1:], columns[:-1]), np.minimum(columns[1:], columns[:-1]), out=steps[:-1])
    total = np.add.reduce(steps.reshape(strips.shape), axis=1, dtype=np.int32)
    variation = _over_three(np.add, total) - steps[_WINDOW - 1 :: _STRIDE]  # Without the step out of the window

    rows = np.zeros((3, count, columns.shape[1] + 2), np.int32)  # With one row beyond either border
    rows[0, :, 1:-1], rows[1, :, 1:-1], rows[2, :, 1:-1] = high, low, variation
    np.negative(rows[1], out=rows[1])
    full = int(np.iinfo(image.dtype).max)
    return any(_lines(rows, quiet * full, least * full) >= _WINDOWS for quiet, least in _GROUNDS)


def _over_three(join: np.ufunc, strips: np.ndarray) -> np.ndarray:
    """Join each of N + 2 strips with the next two: [N, S]."""
    return join(join(strips[:-2], strips[1:-1]), strips[2:])


def _lines(rows: np.ndarray, quiet: float, least: float) -> int:
    """The number of windows with a line of text. rows: int32 [3, N, S + 2]: for each row of a window, its highest
    value, its negated lowest value and its variation; quiet, least: as in ``_GROUNDS``, in levels."""
    busy = rows[0] + rows[1] > quiet
    busy[:, [0, -1]] = True  # Rows beyond the border are not quiet
    edge = np.flatnonzero(busy.ravel()[1:] != busy.ravel()[:-1]) + 1
    if len(edge) < 2:
        return 0
    # Edges alternate, and the first ends the busy border: runs lie between the 2nd and 3rd edge, the 4th and 5th, ...
    begin, end = edge[1:-1:2], edge[2::2]
    inside = (end - begin >= _LINE[0]) & (end - begin <= _LINE[1]) & (begin // busy.shape[1] == end // busy.shape[1])
    begin, end = begin[inside], end[inside]
    if not len(begin):
        return 0
    flat = rows.reshape(3, -1)
    bounds = np.stack([begin, end], axis=1).ravel()  # Every second range of reduceat is the gap between two runs
    contrast = np.maximum.reduceat(flat[0], bounds)[::2] + np.maximum.reduceat(flat[1], bounds)[::2]
    strokes = np.add.reduceat(flat[2], bounds)[::2] / (contrast * (end - begin)) / 2
    return int(((contrast >= least) & (strokes >= _STROKES)).sum())


def _brightest(image: np.ndarray) -> np.ndarray:
    """[S, S] in the image's dtype: the maximum over the channels."""
    if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3):
        raise ValueError(f"image: expected uint8 or uint16 [S, S] or [S, S, 3], got {image.dtype} {list(image.shape)}")
    if image.ndim == 2:
        return image
    return np.maximum(np.maximum(image[:, :, 0], image[:, :, 1]), image[:, :, 2])
