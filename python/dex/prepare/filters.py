"""What makes a slice unfit for the corpus, and what makes it suspect of burned-in text. numpy only.

Shape letters: S side of a stored image in pixels, N columns of windows, R runs of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .normalise import FOREGROUND_STEP

if TYPE_CHECKING:
    from .sources import Source

DROPPED = ("foreground", "blank", "too small", "exact duplicate", "near duplicate")

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
    means = _unit(image)[: len(image) // _BLOCK * _BLOCK, : image.shape[1] // _BLOCK * _BLOCK]
    means = means.reshape(len(means) // _BLOCK, _BLOCK, means.shape[1] // _BLOCK, _BLOCK).mean(axis=(1, 3))
    if means.max() - means.min() <= FOREGROUND_STEP:
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
    unit = _unit(image)
    if min(unit.shape) < _WINDOW:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(unit, _WINDOW, axis=1)[:, ::_STRIDE]  # [S, N, 24]
    high, low = windows.max(axis=2).T, windows.min(axis=2).T  # [N, S]
    variation = np.abs(np.diff(windows, axis=2)).sum(axis=2).T

    return any(_lines(high, low, variation, *ground) >= _WINDOWS for ground in _GROUNDS)


def _lines(high: np.ndarray, low: np.ndarray, variation: np.ndarray, quiet: float, least: float) -> int:
    """How many windows show a line of text, of [N, S] each: a row's highest and lowest value and its variation."""
    busy = np.ones((high.shape[0], high.shape[1] + 2), bool)  # no quiet row is seen beyond the border
    busy[:, 1:-1] = high - low > quiet
    edge = np.flatnonzero(busy.ravel()[1:] != busy.ravel()[:-1]) + 1
    if len(edge) < 2:
        return 0
    # alternating edges, the first ends the busy rows of the border: runs lie between the 2nd and 3rd, 4th and 5th ...
    begin, end = edge[1:-1:2], edge[2::2]
    inside = (end - begin >= _LINE[0]) & (end - begin <= _LINE[1]) & (begin // busy.shape[1] == end // busy.shape[1])
    begin, end = begin[inside], end[inside]
    if not len(begin):
        return 0
    flat = np.pad(np.stack([high, -low, variation]), ((0, 0), (0, 0), (1, 1))).reshape(3, -1)
    bounds = np.stack([begin, end], axis=1).ravel()  # reduceat: every second one is the gap between two runs
    contrast = np.maximum.reduceat(flat[0], bounds)[::2] + np.maximum.reduceat(flat[1], bounds)[::2]
    strokes = np.add.reduceat(flat[2], bounds)[::2] / (contrast * (end - begin)) / 2
    return int(((contrast >= least) & (strokes >= _STROKES)).sum())


def _unit(image: np.ndarray) -> np.ndarray:
    """float32 [S, S] within [0, 1]: the brightest channel."""
    if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3):
        raise ValueError(f"image: expected uint8 or uint16 [S, S] or [S, S, 3], got {image.dtype} {list(image.shape)}")
    grey = image if image.ndim == 2 else image.max(axis=2)
    return grey.astype(np.float32) / np.iinfo(image.dtype).max
