"""Which element of a matrix lies in which register of which lane, and where in shared memory: pure functions.

Checked against CuTe's layouts in tests/emulator/test_layouts.py.
"""

import numpy as np

from .copies import SWIZZLE_BITS, swizzle
from .ptx import PTXError

# A warp's fragments of mma.m16n8k16: lane = 4 * group + t holds pairs of neighbours. Registers come first, then warps
# (n of them), then lanes, then the two halves of a register.


def left_fragment(registers: np.ndarray) -> np.ndarray:
    """``[n, 16, 16]`` of the four registers ``[4, n, 32, 2]`` of A."""
    n = registers.shape[1]
    parts = registers.reshape(2, 2, n, 8, 4, 2)  # columns + 8, rows + 8, warp, group, t, half
    return parts.transpose(2, 1, 3, 0, 4, 5).reshape(n, 16, 16)


def right_fragment(registers: np.ndarray) -> np.ndarray:
    """``[n, 16, 8]`` of the two registers ``[2, n, 32, 2]`` of B."""
    n = registers.shape[1]
    parts = registers.reshape(2, n, 8, 4, 2)  # rows + 8, warp, group, t, half
    return parts.transpose(1, 0, 3, 4, 2).reshape(n, 16, 8)


def sum_fragment(registers: np.ndarray) -> np.ndarray:
    """``[n, 16, N]`` of the registers ``[N / 2, n, 32]`` of C, float32."""
    count, n = registers.shape[:2]
    parts = registers.reshape(count // 4, 2, 2, n, 8, 4)  # columns + 8, rows + 8, column + 1, warp, group, t
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(n, 16, count * 2)


def sum_registers(sums: np.ndarray) -> np.ndarray:
    """The inverse of `sum_fragment`: registers ``[N / 2, n * 32]``."""
    n, _, columns = sums.shape
    parts = sums.reshape(n, 2, 8, columns // 8, 4, 2)
    return parts.transpose(3, 1, 5, 0, 2, 4).reshape(columns // 2, n * 32)


# Operands of wgmma in shared memory.

PATTERN = {0: 0, 1: 128, 2: 64, 3: 32}
"""The swizzle field of a descriptor -> bytes of a row of the pattern."""


def decode(descriptor: int) -> tuple[int, int, int, int]:
    """Start, leading and stride byte offset, and bytes of the swizzle pattern, of a matrix descriptor."""
    if descriptor >> 49 & 7:
        raise PTXError("a wgmma descriptor with a base offset is not known")
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    width = PATTERN[descriptor >> 62 & 3]
    if start >> 7 & SWIZZLE_BITS[width]:
        raise PTXError(f"misaligned: a wgmma operand at {start:#x}, within the {width}-byte pattern")
    return start, leading, stride, width


def operand_offsets(descriptor: int, rows: np.ndarray, depth: int, transposed: bool) -> np.ndarray:
    """Offsets ``[len(rows), depth]`` in bytes of 16-bit elements; rows of M or N, ``depth`` along K.

    Not transposed: K is contiguous. Rows of the pattern are ``width`` bytes, eight of them an atom, stride from one
    atom of eight rows to the next. Transposed: M or N is contiguous, a row of the pattern holds ``width / 2`` of them
    for one k; leading from one such block to the next, stride from eight k to the next eight.
    """
    start, leading, stride, width = decode(descriptor)
    r, k = rows[:, None], np.arange(depth)[None, :]
    if transposed:
        if width == 0:
            raise PTXError("a transposed wgmma operand without swizzle is not known")
        row = width // 2
        return swizzle(start + r % row * 2 + r // row * leading + k % 8 * width + k // 8 * stride, width)
    if width == 0:
        return start + r // 8 * stride + r % 8 * 16 + k // 8 * leading + k % 8 * 2
    return swizzle(start + r // 8 * stride + r % 8 * width + 2 * k, width)
