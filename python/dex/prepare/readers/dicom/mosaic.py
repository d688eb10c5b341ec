"""Siemens mosaics: the slices of a volume side by side in one image, row by row in a square grid.

Only private elements give the number of slices and the direction from one to the next. The position in the header is
that of an image as large as the mosaic and centred on its slices.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..stack import Refused
from .file import SIEMENS_CSA, SIEMENS_MR, listed, private
from .file import number as number_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "highly experimental": about its DICOM readers; this one reads private headers
    from nibabel.nicom import csareader

MAX_SLICES = 1024


class Mosaic(NamedTuple):
    """normal: unit vector from each slice to the next, None if unknown."""

    count: int
    normal: np.ndarray | None


def mosaic(head: Any) -> Mosaic | None:
    """The mosaic that a header describes; None for any other image. Raises Refused if the header lacks the number of
    slices."""
    if "MOSAIC" not in (str(value).strip().upper() for value in listed(head.get("ImageType"))):
        return None
    csa = _csa(head)
    count = number_of(private(head, 0x0019, SIEMENS_MR, 0x0A)) or number_of(_read(csareader.get_n_mosaic, csa))
    if count is None or count != int(count) or count < 1:
        raise Refused(
            "unsupported", "a mosaic without the number of slices in its header; convert it, to NIfTI for instance"
        )
    if count > MAX_SLICES:
        raise Refused("too large", f"a mosaic of more than {MAX_SLICES} slices; convert it, to NIfTI for instance")
    normal = _read(csareader.get_slice_normal, csa)
    length = 0.0 if normal is None else float(np.linalg.norm(normal))
    return Mosaic(int(count), np.asarray(normal, float) / length if 0.9 < length < 1.1 else None)


def tiles(sides: tuple[int, int], count: int) -> int:
    """The number of slices per row in a mosaic of ``sides`` pixels."""
    beside = math.isqrt(count - 1) + 1
    if sides[0] % beside or sides[1] % beside or min(sides) < beside:
        raise Refused(
            "inconsistent", f"a mosaic of {sides} pixels with {count} slices; convert it, to NIfTI for instance"
        )
    return beside


def first_position(
    position: np.ndarray,
    orientation: Sequence[float],
    spacing: Sequence[float],
    sides: Sequence[int],
    beside: int,
) -> np.ndarray:
    """The position of the first pixel of the first slice. spacing: mm between rows and between columns."""
    down, right = ((side - side // beside) / 2 * mm for side, mm in zip(sides, spacing, strict=True))
    return position + right * np.array(orientation[:3]) + down * np.array(orientation[3:])


def _csa(head) -> dict | None:
    data = private(head, 0x0029, SIEMENS_CSA, 0x10)
    try:
        return csareader.read(data) if isinstance(data, bytes) else None
    except Exception:  # An unreadable header says nothing
        return None


def _read(get, csa: dict | None):
    try:
        return None if csa is None else get(csa)
    except Exception:
        return None
