"""The device code of the small sums of `grouped_mlp`: combined choices, and the gradients of gates and biases.

Letters: B images, N tokens, D width, H hidden, E experts, K chosen, S = B*K slots. Rows: see `triton_common`.
"""

import triton
import triton.language as tl

from ...triton_common import expert_tiles, find_expert


@triton.jit
def combine_kernel(by_slot, gates, out, size, stride_ob, top_k, HAS_GATES: tl.constexpr, BLOCK: tl.constexpr):
    """``out[b] = sum_k gates[b, k] * by_slot[b, k]`` (no gates: plain sum), ``size`` elements an image, k rising."""
    image = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in range(top_k):
        y = tl.load(by_slot + (image * top_k + k) * size + i, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATES:
            y *= tl.load(gates + image * top_k + k).to(tl.float32)
        acc += y
    tl.store(out + image * stride_ob + i, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def image_sum_kernel(grad_out, sums, tokens, dim, stride_gb, stride_gn, SUM_ROWS: tl.constexpr, SUM_COLS: tl.constexpr):
    """``sums[b] = sum_n grad_out[b, n]``, float32 ``[B, D]``."""
    image = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * SUM_COLS + tl.arange(0, SUM_COLS)
    acc = tl.zeros((SUM_COLS,), tl.float32)
    for n0 in range(0, tokens, SUM_ROWS):
        n = n0 + tl.arange(0, SUM_ROWS)
        at = image * stride_gb + n.to(tl.int64)[:, None] * stride_gn + d[None, :]
        block = tl.load(grad_out + at, mask=(n < tokens)[:, None] & (d < dim)[None, :], other=0.0)
        acc += tl.sum(block.to(tl.float32), 0)
    tl.store(sums + image * dim + d, acc, mask=d < dim)


@triton.jit
def gate_grad_kernel(
    gate_parts,
    sums,
    slot_order,
    offsets,
    bias,
    dgates,
    num_experts,
    num_parts,
    top_k,
    dim,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``dg = sum_{n, h} da a + (sum_n dout[b, n]) . b2_e`` of one slot: its parts, then the bias's share."""
    position = tl.program_id(0)
    slot = tl.load(slot_order + position)
    expert = find_expert(offsets, position, num_experts, EXPERTS)
    acc = tl.zeros((BLOCK,), tl.float32)
    gate_parts += position.to(tl.int64) * num_parts
    for i0 in range(0, num_parts, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        acc += tl.load(gate_parts + i, mask=i < num_parts, other=0.0)
    for d0 in range(0, dim, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        s = tl.load(sums + slot // top_k * dim + d, mask=d < dim, other=0.0)
        acc += s * tl.load(bias + expert.to(tl.int64) * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    tl.store(dgates + slot, tl.sum(acc, 0).to(dgates.dtype.element_ty))


@triton.jit
def sum_parts(acc, parts, first, end, h, hidden, SUM_ROWS: tl.constexpr):
    """``acc + `` the sum of the rows first up to end of ``parts [., H]``, at the columns h."""
    for t0 in range(first, end, SUM_ROWS):
        t = t0 + tl.arange(0, SUM_ROWS)
        at = t.to(tl.int64)[:, None] * hidden + h[None, :]
        acc += tl.sum(tl.load(parts + at, mask=(t < end)[:, None] & (h < hidden)[None, :], other=0.0), 0)
    return acc


@triton.jit
def bias1_grad_kernel(
    block_parts,
    tile_parts,
    offsets,
    out,
    num_experts,
    blocks,
    tokens,
    hidden,
    TILE_ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    SUM_COLS: tl.constexpr,
):
    """``out[e] = `` the sum of block_parts over the blocks of e, and of tile_parts over its tiles, ``[E, H]``.

    Every slot has ``blocks`` blocks, and ``tokens`` rows that are cut into tiles as in `to_hidden_grad_kernel`.
    """
    expert = tl.program_id(0)
    h = tl.program_id(1) * SUM_COLS + tl.arange(0, SUM_COLS)
    acc = tl.zeros((SUM_COLS,), tl.float32)
    first = (tl.load(offsets + expert) * blocks).to(tl.int32)
    end = (tl.load(offsets + expert + 1) * blocks).to(tl.int32)
    acc = sum_parts(acc, block_parts, first, end, h, hidden, SUM_ROWS)
    first, end = expert_tiles(offsets, expert, num_experts, tokens, TILE_ROWS, EXPERTS)
    acc = sum_parts(acc, tile_parts, first, end, h, hidden, SUM_ROWS)
    tl.store(out + expert.to(tl.int64) * hidden + h, acc.to(out.dtype.element_ty), mask=h < hidden)


@triton.jit
def bias2_grad_kernel(
    sums, gates, slot_order, offsets, out, top_k, dim, SUM_ROWS: tl.constexpr, SUM_COLS: tl.constexpr
):
    """``out[e] = sum over the slots of e of gate * sums[image]``, ``[E, D]``."""
    expert = tl.program_id(0)
    d = tl.program_id(1) * SUM_COLS + tl.arange(0, SUM_COLS)
    start = tl.load(offsets + expert).to(tl.int32)
    stop = tl.load(offsets + expert + 1).to(tl.int32)
    acc = tl.zeros((SUM_COLS,), tl.float32)
    for p0 in range(start, stop, SUM_ROWS):
        p = p0 + tl.arange(0, SUM_ROWS)
        slots = tl.load(slot_order + p, mask=p < stop, other=0)
        g = tl.load(gates + slots, mask=p < stop, other=0.0).to(tl.float32)
        at = (slots // top_k)[:, None] * dim + d[None, :]
        acc += tl.sum(g[:, None] * tl.load(sums + at, mask=(p < stop)[:, None] & (d < dim)[None, :], other=0.0), 0)
    tl.store(out + expert.to(tl.int64) * dim + d, acc.to(out.dtype.element_ty), mask=d < dim)
