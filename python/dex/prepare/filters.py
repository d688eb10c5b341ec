"""What makes a slice unfit for the corpus, and what makes it suspect of burned-in text. numpy only.

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

_BLOCK = 16  # pixels a side of the blocks whose means decide on "blank": noise is averaged out
_WINDOW, _STRIDE = 24, 8  # text is looked for in strips: their width, and the step between them, in columns
_LINE = (4, 12)  # rows of a line of text
_GROUNDS = ((0.06, 0.2), (0.18, 0.6))
"""Of full scale: the contrast that a row may have and still be background, and what letters differ from it by at least.
The second is for grain and speckle, which only plain letters rise above."""
_STROKES = 1.5  # strokes that the mean row of a line crosses within a window
_WINDOWS = 2  # windows of text that make an image suspect


def verdict(image: np.ndarray, share: float, small: bool, source: Source) -> str | None:
    """Why a slice is dropped: "too small", "blank" or "foreground" (the first that holds), or None: it is kept.

    image: uint8 or uint16 [S, S] or [S, S, 3], as it would be stored. share: of foreground in its content
    (`normalise.foreground_share`), dropped when below source.min_foreground; small: its content had too few pixels
    before it was resized. Blank is an image whose 16 x 16 block means differ by at most 0.02 of full scale.
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
    """Whether burned-in text is suspected in an image: uint8 or uint16 [S, S] or [S, S, 3], S about 256.

    Text is a band of 4 to 12 rows between quiet rows, crossed by strokes. In windows 24 columns wide, each such band
    is measured by its total variation along the rows over its contrast: a blob crossed once by every row has 2. Two
    windows of 3 and more make an image suspect.

    It is made for overlays in empty margins, as on ultrasound screens. Text that lies upon anatomy is not found, nor
    are letters lower than 4 or higher than 12 pixels, nor faint ones on grain; a single letter (the side marker of a
    radiograph) only on black: no finding is no proof.
    """
    bright = _brightest(image)
    if min(bright.shape) < _WINDOW:
        return False
    count = (bright.shape[1] - _WINDOW) // _STRIDE + 1
    # along the first axis, over which numpy reduces many rows at a time: each window is three strips of eight columns
    columns = np.ascontiguousarray(bright.T[: (count + 2) * _STRIDE])
    strips = columns.reshape(count + 2, _STRIDE, -1)
    high = _over_three(np.maximum, strips.max(axis=1))
    low = _over_three(np.minimum, strips.min(axis=1))
    steps = np.zeros(columns.shape, np.uint16)
    np.subtract(np.maximum(columns[1:], columns[:-1]), np.minimum(columns[1:], columns[:-1]), out=steps[:-1])
    total = np.add.reduce(steps.reshape(strips.shape), axis=1, dtype=np.int32)
    variation = _over_three(np.add, total) - steps[_WINDOW - 1 :: _STRIDE]  # the step out of the window

    rows = np.zeros((3, count, columns.shape[1] + 2), np.int32)  # and one beyond either border
    rows[0, :, 1:-1], rows[1, :, 1:-1], rows[2, :, 1:-1] = high, low, variation
    np.negative(rows[1], out=rows[1])
    full = int(np.iinfo(image.dtype).max)
    return any(_lines(rows, quiet * full, least * full) >= _WINDOWS for quiet, least in _GROUNDS)


def _over_three(join: np.ufunc, strips: np.ndarray) -> np.ndarray:
    """[N, S] of N + 2 strips: each with the next two."""
    return join(join(strips[:-2], strips[1:-1]), strips[2:])


def _lines(rows: np.ndarray, quiet: float, least: float) -> int:
    """How many windows show a line of text. rows: int32 [3, N, S + 2], of each row of a window its highest value, its
    lowest one negated, its variation; quiet, least: as in `_GROUNDS`, in levels."""
    busy = rows[0] + rows[1] > quiet
    busy[:, [0, -1]] = True  # no quiet row is seen beyond the border
    edge = np.flatnonzero(busy.ravel()[1:] != busy.ravel()[:-1]) + 1
    if len(edge) < 2:
        return 0
    # alternating edges, the first ends the busy rows of the border: runs lie between the 2nd and 3rd, 4th and 5th ...
    begin, end = edge[1:-1:2], edge[2::2]
    inside = (end - begin >= _LINE[0]) & (end - begin <= _LINE[1]) & (begin // busy.shape[1] == end // busy.shape[1])
    begin, end = begin[inside], end[inside]
    if not len(begin):
        return 0
    flat = rows.reshape(3, -1)
    bounds = np.stack([begin, end], axis=1).ravel()  # reduceat: every second one is the gap between two runs
    contrast = np.maximum.reduceat(flat[0], bounds)[::2] + np.maximum.reduceat(flat[1], bounds)[::2]
    strokes = np.add.reduceat(flat[2], bounds)[::2] / (contrast * (end - begin)) / 2
    return int(((contrast >= least) & (strokes >= _STROKES)).sum())


def _brightest(image: np.ndarray) -> np.ndarray:
    """[S, S] of the image's dtype: the brightest channel."""
    if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3):
        raise ValueError(f"image: expected uint8 or uint16 [S, S] or [S, S, 3], got {image.dtype} {list(image.shape)}")
    if image.ndim == 2:
        return image
    return np.maximum(np.maximum(image[:, :, 0], image[:, :, 1]), image[:, :, 2])
