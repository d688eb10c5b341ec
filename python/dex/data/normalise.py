"""The published corpus' intensity rules, and what decides whether a slice is kept; numpy only.

Shape letters: H, W of a slice. "Unit" images are float within [0, 1].
"""

from __future__ import annotations

import numpy as np
from PIL import Image

CT_WINDOW = (-200.0, 400.0)
MR_PERCENTILES = (1.0, 99.0)
MIN_FOREGROUND = 0.05
FOREGROUND_STEP = 0.02
NEAR_DUPLICATE_BITS = 10


def ct_window(hounsfield: np.ndarray) -> np.ndarray:
    """HU of any shape -> unit float32: clipped to [-200, 400], then (x + 200) / 600."""
    low, high = CT_WINDOW
    return ((np.clip(hounsfield, low, high) - low) / (high - low)).astype(np.float32)


def percentile_range(values: np.ndarray, percentiles: tuple[float, float] = MR_PERCENTILES) -> np.ndarray:
    """One whole volume (or image) of any shape -> unit float32: clipped to its percentiles, then min-max.

    ValueError when the two percentiles coincide or a value is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("values: expected finite numbers")
    low, high = np.percentile(values, percentiles)
    if not high > low:
        raise ValueError(f"values: the percentiles {percentiles} are both {low}: nothing to scale")
    return ((np.clip(values, low, high) - low) / (high - low)).astype(np.float32)


def to_uint8(unit: np.ndarray) -> np.ndarray:
    """Unit image of any shape -> uint8, nearest of 256 levels."""
    return np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)


def background(image: np.ndarray) -> int:
    """The background level of a uint8 image [H, W] or [H, W, 3]: the commonest grey value (the
    lowest of several) in its outermost ring of pixels."""
    grey = _grey(image)
    return int(np.bincount(np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])).argmax())


def foreground_share(image: np.ndarray) -> float:
    """The share of pixels of a uint8 image [H, W] or [H, W, 3] that are foreground, in [0, 1].

    Foreground is what differs from the background level by more than 0.02 of full scale. "Brighter than black" would
    call the whole of a slice foreground whose air is grey after the CT window.
    """
    grey = _grey(image).astype(np.int16)
    return float((np.abs(grey - background(image)) > FOREGROUND_STEP * 255).mean())


def difference_hash(image: np.ndarray) -> int:
    """256 bits that near-duplicates share: the sign of each horizontal step of the uint8 image shrunk to 16 x 17."""
    small = np.asarray(Image.fromarray(_grey(image)).resize((17, 16), Image.Resampling.BOX)).astype(np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def _grey(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 2 else (image.sum(axis=2, dtype=np.uint16) // 3).astype(np.uint8)
