"""What all Triton kernels share: tiles, the device guard, and the arithmetic from tile to expert to rows.

Letters: B images, N tokens, E experts, K chosen, S = B*K slots.
The S*N rows of a grouped product are numbered in slot order: row ``m`` is token ``m % N`` of slot
``slot_order[m // N]``, and expert ``e`` owns the rows ``group_offsets[e] * N`` up to ``group_offsets[e + 1] * N``.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 2**31 - 2**16
"""Rows are counted in int32 (offsets in bytes and elements are 64-bit); a tile may reach past the last row."""


class Tile(NamedTuple):
    """One compiled configuration of a matrix product: the block of output, the step along the sum, the resources."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    halves: bool = False
    """Whether a heavy epilogue goes through the columns in two halves."""


def architecture(device: torch.device) -> int:
    """The row of the tile tables that serves ``device``: 90 for compute capability 9 to 11, else 80 (interpreter too).

    Capability 12 loads by descriptors too, but has the shared memory of 8.9, half of what the tiles of 90 need.
    """
    if device.type != "cuda":
        return 80
    return 90 if 9 <= torch.cuda.get_device_capability(device)[0] < 12 else 80


def on_device(t: Tensor) -> AbstractContextManager[None]:
    """Makes the device of ``t`` current, so that the launch goes to its current stream."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else nullcontext()


def check_dtype(name: str, t: Tensor) -> None:
    if t.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"{name}: the Triton kernels take float16, bfloat16 or float32, got {t.dtype}")


def precision(dtype: torch.dtype) -> str:
    """The column of the tile tables: float32 products are true float32 and need smaller tiles than half precision."""
    return "float" if dtype == torch.float32 else "half"


def unit_rows(t: Tensor) -> Tensor:
    """``t``, or a copy of it, whose last dimension has stride 1; the other strides are free."""
    return t if t.stride(-1) == 1 else t.contiguous()


def experts_block(num_experts: int) -> int:
    """The power of two that holds one lane per expert."""
    return max(triton.next_power_of_2(num_experts), 16)


@triton.jit
def find_tile(offsets, tile, num_experts, tokens, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """``(expert, first row, end row)`` of a tile when every expert's rows are cut into tiles of ``ROWS``.

    Tiles are numbered expert by expert; an expert without rows has none. Past the last tile: first row = end row = 0.
    """
    e = tl.arange(0, EXPERTS)
    start = tl.load(offsets + e, mask=e < num_experts, other=0) * tokens
    stop = tl.load(offsets + e + 1, mask=e < num_experts, other=0) * tokens
    tiles = ((stop - start + ROWS - 1) // ROWS).to(tl.int32)
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, start + (tile - ends + tiles) * ROWS, 0), 0)
    return expert, first.to(tl.int32), tl.sum(tl.where(mine, stop, 0), 0).to(tl.int32)


@triton.jit
def find_tile_or_director(
    offsets, tile, num_experts, num_slots, images, tokens, ROWS: tl.constexpr, EXPERTS: tl.constexpr
):
    """`find_tile` with the director as expert number num_experts: the rows of one more slot an image, tiles come first.

    images: 0 where there is no director. Its slots are numbered from num_slots on.
    """
    of_director = tl.cdiv(images * tokens, ROWS)
    expert, first, stop = find_tile(offsets, tile - of_director, num_experts, tokens, ROWS, EXPERTS)
    start = num_slots * tokens
    is_director = tile < of_director
    expert = tl.where(is_director, num_experts, expert)
    first = tl.where(is_director, start + tile * ROWS, first)
    return expert, first, tl.where(is_director, start + images * tokens, stop)


@triton.jit
def expert_tiles(offsets, expert, num_experts, tokens, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """``(first, end)`` of the tiles of one expert, in the numbering of `find_tile`."""
    e = tl.arange(0, EXPERTS)
    start = tl.load(offsets + e, mask=e < num_experts, other=0) * tokens
    stop = tl.load(offsets + e + 1, mask=e < num_experts, other=0) * tokens
    tiles = ((stop - start + ROWS - 1) // ROWS).to(tl.int32)
    return tl.sum(tl.where(e < expert, tiles, 0), 0), tl.sum(tl.where(e <= expert, tiles, 0), 0)


@triton.jit
def find_expert(offsets, position, num_experts, EXPERTS: tl.constexpr):
    """The expert that owns a position of ``slot_order``."""
    e = tl.arange(0, EXPERTS)
    stop = tl.load(offsets + e + 1, mask=e < num_experts, other=9223372036854775807)
    return tl.sum((stop <= position).to(tl.int32), 0)


@triton.jit
def locate(slot_order, rows, valid, tokens, top_k):
    """``(slot, image, token)`` of each row, 64-bit; 0 where not ``valid``, so that addresses stay in their tensors."""
    slots = tl.load(slot_order + rows // tokens, mask=valid, other=0)
    # Slots are fewer than rows, so the division may be the cheap 32-bit one.
    images = slots.to(tl.int32) // top_k
    return slots, images.to(tl.int64), tl.where(valid, rows % tokens, 0).to(tl.int64)


@triton.jit
def locate_or_director(slot_order, rows, valid, num_slots, tokens, top_k):
    """``(image, token)`` as of `locate`, of rows that may be the director's: its slots begin at num_slots."""
    position = tl.where(valid, rows // tokens, 0)
    routed = position < num_slots
    slots = tl.load(slot_order + position, mask=routed, other=0).to(tl.int32)
    images = tl.where(routed, slots // top_k, position - num_slots)
    return images.to(tl.int64), (rows % tokens).to(tl.int64)


@triton.jit
def cut_in_groups(pid, num_cols, GROUP: tl.constexpr):
    """``(tile, column)`` of a program: ``GROUP`` row tiles walk the columns together and share what L2 holds."""
    num_tiles = tl.num_programs(0) // num_cols
    first = pid // (GROUP * num_cols) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = pid % (GROUP * num_cols)
    return first + within % size, within // size


@triton.jit
def gelu_cdf(z):
    """``(1 + erf(z / sqrt(2))) / 2``: ``gelu(z) = z * gelu_cdf(z)``."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def gelu_pdf(z):
    """``exp(-z^2 / 2) / sqrt(2 pi)``: ``gelu'(z) = gelu_cdf(z) + z * gelu_pdf(z)``."""
    return tl.exp(-0.5 * z * z) * 0.3989422804014327


def max_tiles(num_rows: int, num_groups: int, rows: int) -> int:
    """Tiles that any split of ``num_rows`` over ``num_groups`` experts fits in: the host never learns the split."""
    return num_rows // rows + min(num_groups, num_rows)
