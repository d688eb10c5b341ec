"""The device code of the aligned path of `grouped_mlp` from hidden activations to slots: the K results of an image lie
beside one another. Letters, and where rows lie: see `aligned_kernels`.
"""

import triton
import triton.language as tl

from ...triton_common import cut_in_groups
from .aligned_kernels import BLOCK, expert_block, find_rows_or_director

ROWS = tl.constexpr(2 * BLOCK.value)
"""Rows of a tile: those that `find_rows` counts."""


@triton.jit
def to_slots_blocks_kernel(
    rows_in,
    slot_order,
    offsets,
    gates,
    weight,
    bias,
    out,
    director_out,
    num_experts,
    num_slots,
    director_images,
    blocks,
    first_token,
    depth,
    width,
    TRANSPOSED: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``out[slot, n] = g (rows_in[m] @ W_e + bias_e)``, ``[S*N, depth] -> [S, N, width]``, slots in their own order.

    Without gates g is 1. rows_in: descriptor, box ``[128, DEPTH]``. weight: see `expert_block`.
    An expert's rows follow one another: a tile is whatever 128 of them come next, of one image or more. So do the
    director's, behind all others, which go without a gate to ``director_out [B*N, width]``; director_images: B, or 0.
    """
    tile, col = cut_in_groups(tl.program_id(0), tl.cdiv(width, COLS), GROUP)
    expert, packed, of_director, row, end = find_rows_or_director(
        offsets, tile, num_experts, director_images, blocks, first_token, EXPERTS
    )
    if row >= end:
        return
    j0 = col * COLS
    tokens = blocks * BLOCK + first_token
    start = row + num_slots * tl.where(packed, blocks * BLOCK, tl.where(of_director, tokens, 0))
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, depth, DEPTH):
        w = expert_block(weight, expert, k, j0, TRANSPOSED, COLS, DEPTH)
        acc = tl.dot(rows_in.load([start, k]), w, acc, input_precision="ieee")
    rows = row + tl.arange(0, ROWS)
    valid = rows < end
    of_slot = tl.where(packed, first_token, blocks * BLOCK)
    routed = valid & (of_director == 0)
    slots = tl.load(slot_order + rows // of_slot, mask=routed, other=0)
    j = j0 + tl.arange(0, COLS)
    if bias is not None:
        acc += tl.load(bias + expert.to(tl.int64) * width + j, mask=j < width, other=0.0).to(tl.float32)[None, :]
    if gates is not None:
        acc *= tl.load(gates + slots, mask=routed, other=1.0).to(tl.float32)[:, None]
    token = rows % of_slot + tl.where(packed, 0, first_token)
    to = (slots * tokens + token)[:, None] * width + j[None, :]
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=routed[:, None] & (j < width)[None, :])
    if director_out is not None:
        to = rows.to(tl.int64)[:, None] * width + j[None, :]
        mine = valid & of_director
        tl.store(director_out + to, acc.to(out.dtype.element_ty), mask=mine[:, None] & (j < width)[None, :])
