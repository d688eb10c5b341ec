"""The intensity rules of the published corpus, and the measures that decide whether a slice is kept; numpy only.

Shape letters: H, W of a slice. "Unit" images are float in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from .modalities import NORMALISATIONS
from .readers.stack import Refused, Stack

CT_WINDOW = (-200.0, 400.0)
SUV_WINDOW = (0.0, 20.0)
MR_PERCENTILES = (1.0, 99.0)
FOREGROUND_STEP = 0.02
NEAR_DUPLICATE_BITS = 10


def ct_window(hounsfield: np.ndarray) -> np.ndarray:
    """HU of any shape -> unit float32: clip to [-200, 400], then (x + 200) / 600."""
    low, high = CT_WINDOW
    return ((np.clip(hounsfield, low, high) - low) / (high - low)).astype(np.float32)


def normaliser(rule: str, stack: Stack, part: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The function that maps any part of a frame of ``stack`` to unit float32 of the same shape.

    ct: clip HU to [-200, 400], / 600. suv: clip SUV to [0, 20], / 20. mr: clip to the 1st and 99th percentile of the
    stack, or of its part ``part``, then min-max. pet: the same clip, z-score, min-max; the z-score is affine and the
    clipped minimum and maximum are the percentiles, so this equals mr. display: / 255 for an 8-bit display stack, else
    as mr. For 8-bit pictures and videos ct and suv mean display, because a window was applied when they were made.

    Raises Refused("inconsistent") if the stack's values are not what the rule needs: HU and SUV must be declared by the
    header or, for formats that cannot declare them, by the description. Raises Refused("constant") if the two
    percentiles coincide. MONOCHROME1 is not inverted here.
    """
    if rule not in NORMALISATIONS:
        raise ValueError(f"rule: expected one of {NORMALISATIONS}, got {rule!r}")
    if rule in ("ct", "suv") and stack.windowed:
        rule = "display"
    if rule in ("ct", "suv"):
        needed = "HU" if rule == "ct" else "SUV"
        if stack.quantity != needed and not (stack.quantity == "raw" and stack.described):
            raise Refused(
                "inconsistent",
                f"values are not {needed}: {rule} needs {needed}, got {stack.note or stack.quantity}; "
                "use --normalisation, or --slope and --intercept",
            )
        return ct_window if rule == "ct" else suv_window
    if rule == "display" and stack.quantity == "display8":
        return display
    low, high = stack.percentiles(*MR_PERCENTILES, part)
    if not high > low:
        raise Refused("constant", f"the percentiles {MR_PERCENTILES} coincide: nearly all of it is one value")

    def scaled(values: np.ndarray) -> np.ndarray:
        clipped = np.clip(values.astype(np.float32), np.float32(low), np.float32(high))
        return np.clip((clipped - np.float32(low)) / np.float32(high - low), 0, 1)

    return scaled


def display(values: np.ndarray) -> np.ndarray:
    """8-bit display values of any shape -> unit float32: / 255."""
    return values.astype(np.float32) / np.float32(255)


def suv_window(uptake: np.ndarray) -> np.ndarray:
    """SUV of any shape -> unit float32: clip to [0, 20], / 20."""
    low, high = SUV_WINDOW
    return ((np.clip(uptake, low, high) - low) / (high - low)).astype(np.float32)


def to_uint8(unit: np.ndarray) -> np.ndarray:
    """Unit image of any shape -> uint8, rounded to the nearest of 256 levels."""
    return np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)


def background(image: np.ndarray) -> int:
    """The background level of a uint8 image [H, W] or [H, W, 3]: the most common grey value in its outermost ring of
    pixels, the lowest if there are several."""
    return _commonest_of_ring(grey(image))


def foreground_share(image: np.ndarray) -> float:
    """The foreground share of a uint8 image [H, W] or [H, W, 3], in [0, 1].

    Foreground pixels differ from the background level by more than 0.02 of full scale. "Brighter than black" would not
    work: after the CT window, air may be grey and the whole slice would count.
    """
    levels = grey(image)
    level, step = _commonest_of_ring(levels), int(FOREGROUND_STEP * 255)
    below, above = levels < max(0, level - step), levels > min(255, level + step)
    return (np.count_nonzero(below) + np.count_nonzero(above)) / levels.size


def difference_hash(image: np.ndarray) -> int:
    """256 bits that near duplicates share: the sign of each horizontal step in the uint8 image shrunk to 16 x 17."""
    small = np.asarray(Image.fromarray(grey(image)).resize((17, 16), Image.Resampling.BOX)).astype(np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def grey(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W] of a uint8 image [H, W] or [H, W, 3]: the mean of its channels, rounded down."""
    if image.ndim == 2:
        return image
    total = image[:, :, 0].astype(np.uint16)
    total += image[:, :, 1]
    total += image[:, :, 2]
    total //= 3
    return total.astype(np.uint8)


def _commonest_of_ring(grey: np.ndarray) -> int:
    return int(np.bincount(np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])).argmax())
