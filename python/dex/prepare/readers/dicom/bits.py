"""Pixels of 1 or 12 bits, packed without padding even between frames, the first in the lowest bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..stack import Refused

PACKED = (1, 12)
_STRIP = 2**20  # Pixels at a time: each bit is unpacked to a byte


def frame(
    read: Callable[[int, int], bytes], sides: tuple[int, int], bits: int, signed: bool, number: int
) -> np.ndarray:
    """[H, W]: uint8 for single bits, else uint16 or int16. read(start, count): ``count`` bytes of the pixels."""
    height, width = sides
    out = np.empty(sides, np.uint8 if bits == 1 else np.uint16)
    weights = 1 << np.arange(bits, dtype=out.dtype)
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        strip = out[top : top + rows]
        first, count = (number * height + top) * width * bits, strip.size * bits
        data = np.frombuffer(read(first // 8, (first % 8 + count + 7) // 8), np.uint8)
        unpacked = np.unpackbits(data, bitorder="little")[first % 8 : first % 8 + count]
        if len(unpacked) != count:
            raise Refused("unreadable", f"the file ends within frame {number}: truncated; copy it again")
        strip[:] = (unpacked.reshape(-1, bits) @ weights).reshape(strip.shape)
    if not signed or bits == 1:
        return out
    values = out.astype(np.int16)
    return np.where(values >= 2 ** (bits - 1), values - 2**bits, values)
