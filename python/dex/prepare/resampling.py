"""Antialiased bicubic resampling of 8-bit images, as products with banded matrices.

The filter is Pillow's: a = -0.5, widened by the ratio when an image shrinks, with weights divided by their sum. Weights
are multiples of 2**-15 down the rows and of 2**-24 along the columns, so that all products and sums are exact in
float32, then float64: the result is the same on every processor, whatever the order of the sums. Before rounding it is
within 0.1 levels of the exact result, and therefore within one level after.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

_BITS = (15, 24)  # 255 * 1.3 * 2**15 < 2**24, and with the second weights < 2**53
_REACH = 2.0  # Of the filter, in output pixels
_A = -0.5
_BLOCK = 16  # Output pixels at a time: their inputs overlap


class _Band(NamedTuple):
    """Outputs out .. out + n - 1 as weighted sums of inputs first .. first + m - 1. weights: [n, m], whole numbers."""

    out: int
    first: int
    weights: np.ndarray


def bicubic(pixels: np.ndarray, box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """Resize the box (left, top, right, bottom) of uint8 [H, W] or [H, W, C] to uint8 [height, width] or
    [height, width, C]."""
    left, top, right, bottom = box
    rows, columns = pixels.shape[:2]
    channels = pixels.size // max(1, rows * columns)
    flat = pixels.reshape(rows, -1)
    narrow = np.empty((height, flat.shape[1]), np.float32)
    for band in _bands(rows, top, bottom, height, _BITS[0], np.float32):
        count, taken = band.weights.shape
        part = flat[band.first : band.first + taken].astype(np.float32)
        np.matmul(band.weights, part, out=narrow[band.out : band.out + count])
    planes = narrow.reshape(height, columns, channels).transpose(0, 2, 1).astype(np.float64, order="C")
    planes = planes.reshape(-1, columns)
    out = np.empty((len(planes), width), np.float64)
    for band in _bands(columns, left, right, width, _BITS[1], np.float64):
        count, taken = band.weights.shape
        np.matmul(planes[:, band.first : band.first + taken], band.weights.T, out=out[:, band.out : band.out + count])
    out *= 2.0 ** -sum(_BITS)
    np.rint(out, out=out)
    levels = np.clip(out, 0, 255, out=out).astype(np.uint8)
    if pixels.ndim == 2:
        return levels
    return np.ascontiguousarray(levels.reshape(height, channels, width).transpose(0, 2, 1))


@functools.lru_cache(64)
def _bands(length: int, start: float, end: float, wanted: int, bits: int, dtype: type) -> tuple[_Band, ...]:
    """The weights that turn the part from ``start`` to ``end`` of ``length`` pixels into ``wanted`` pixels."""
    scale = (end - start) / wanted
    widened = max(scale, 1.0)
    centres = start + (np.arange(wanted) + 0.5) * scale
    first = np.maximum((centres - _REACH * widened + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + _REACH * widened + 0.5).astype(np.int64), length)
    bands = []
    for out in range(0, wanted, _BLOCK):
        here = slice(out, min(out + _BLOCK, wanted))
        begin, stop = int(first[here].min()), int(last[here].max())
        place = np.arange(begin, stop)
        weights = _filter((place - centres[here, None] + 0.5) / widened)
        weights *= (place >= first[here, None]) & (place < last[here, None])
        weights /= weights.sum(axis=1, keepdims=True)
        whole = np.rint(weights * 2**bits)
        # The greatest weight takes the rounding error, so that a constant level stays the same.
        rows = np.arange(len(whole))
        whole[rows, whole.argmax(axis=1)] += 2**bits - whole.sum(axis=1)
        bands.append(_Band(out, begin, np.ascontiguousarray(whole, dtype)))
    return tuple(bands)


def _filter(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
