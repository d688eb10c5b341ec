"""The device code of the gather path of `grouped_mlp`: products over gathered rows with their epilogues.

Letters: B images, N tokens, D width, H hidden, E experts, K chosen, S = B*K slots. Rows: see `triton_common`.
"""

import triton
import triton.language as tl

from ...triton_common import (
    cut_in_groups,
    find_tile,
    find_tile_or_director,
    locate,
    locate_or_director,
)
from .gelu_kernels import gelu_factor, gelu_factor_slope


@triton.jit
def multiply(a, a_valid, b, b_valid, depth, stride_b, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    """``sum_k A[i, k] B[k, j]`` in float32, ``[ROWS, COLS]``; rows and columns that are not valid are never read.

    a: ``[ROWS]`` pointers to ``A[i, 0]``, k contiguous. b: ``[COLS]`` pointers to ``B[0, j]``, k strided by stride_b.
    """
    k = tl.arange(0, DEPTH)
    a = a[:, None] + k[None, :]
    b = b[None, :] + k[:, None].to(tl.int64) * stride_b
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for k0 in range(0, depth, DEPTH):
        inside = k < depth - k0
        a_block = tl.load(a, mask=a_valid[:, None] & inside[None, :], other=0.0)
        b_block = tl.load(b, mask=inside[:, None] & b_valid[None, :], other=0.0)
        acc = tl.dot(a_block, b_block, acc, input_precision="ieee")
        a += DEPTH
        b += DEPTH * stride_b
    return acc


@triton.jit
def fc1_kernel(
    x,
    slot_order,
    offsets,
    weight,
    bias,
    z,
    a,
    num_experts,
    num_slots,
    director_images,
    tokens,
    top_k,
    dim,
    hidden,
    stride_xb,
    stride_xn,
    stride_we,
    stride_wh,
    TANH: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``z[m] = W1_e x[image, token] + b1_e`` (unless None), ``a[m] = gelu(z[m])``, both ``[S*N, H]``, of row m.

    With a director, a has its rows behind, ``[(S+B)*N, H]``; z has not. director_images: B, or 0 without one.
    """
    tile, col = cut_in_groups(tl.program_id(0), tl.cdiv(hidden, COLS), GROUP)
    expert, first, stop = find_tile_or_director(
        offsets, tile, num_experts, num_slots, director_images, tokens, ROWS, EXPERTS
    )
    if first >= stop:
        return
    rows = first + tl.arange(0, ROWS)
    valid = rows < stop
    images, token = locate_or_director(slot_order, rows, valid, num_slots, tokens, top_k)
    h = col * COLS + tl.arange(0, COLS)
    h_valid = h < hidden
    acc = multiply(
        x + images * stride_xb + token * stride_xn,
        valid,
        weight + expert.to(tl.int64) * stride_we + h.to(tl.int64) * stride_wh,
        h_valid,
        dim,
        1,
        ROWS,
        COLS,
        DEPTH,
    )
    acc += tl.load(bias + expert.to(tl.int64) * hidden + h, mask=h_valid, other=0.0).to(tl.float32)[None, :]
    # Within a tile 32 bits are enough, and 64-bit offsets of every element would take registers from the sums.
    start = first.to(tl.int64) * hidden
    at = tl.arange(0, ROWS)[:, None] * hidden + h[None, :]
    inside = valid[:, None] & h_valid[None, :]
    if z is not None:
        tl.store(z + start + at, acc.to(z.dtype.element_ty), mask=inside & (expert < num_experts))
    tl.store(a + start + at, (acc * gelu_factor(acc, TANH)).to(a.dtype.element_ty), mask=inside)


@triton.jit
def to_slots_kernel(
    rows_in,
    slot_order,
    offsets,
    weight,
    bias,
    out,
    director_out,
    num_experts,
    num_slots,
    director_images,
    tokens,
    depth,
    width,
    stride_we,
    stride_wk,
    stride_wj,
    HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``out[slot, token] = rows_in[m] @ W_e + bias_e``, ``[S*N, depth] -> [S, N, width]``, slots in their own order.

    Writing by slot puts the K results of an image next to each other for `combine_kernel`, whatever the grouping.
    The rows of a director come behind and go to ``director_out [B, N, width]``; director_images: B, or 0 without one.
    """
    tile, col = cut_in_groups(tl.program_id(0), tl.cdiv(width, COLS), GROUP)
    expert, first, stop = find_tile_or_director(
        offsets, tile, num_experts, num_slots, director_images, tokens, ROWS, EXPERTS
    )
    if first >= stop:
        return
    rows = first + tl.arange(0, ROWS)
    valid = rows < stop
    j = col * COLS + tl.arange(0, COLS)
    j_valid = j < width
    acc = multiply(
        rows_in + rows.to(tl.int64) * depth,
        valid,
        weight + expert.to(tl.int64) * stride_we + j.to(tl.int64) * stride_wj,
        j_valid,
        depth,
        stride_wk,
        ROWS,
        COLS,
        DEPTH,
    )
    if HAS_BIAS:
        acc += tl.load(bias + expert.to(tl.int64) * width + j, mask=j_valid, other=0.0).to(tl.float32)[None, :]
    slots, token = locate_or_director(slot_order, rows, valid, num_slots, tokens, 1)
    to = (slots * tokens + token)[:, None] * width + j[None, :]
    inside = valid[:, None] & j_valid[None, :]
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=inside & (expert < num_experts))
    if director_out is not None:
        tl.store(director_out + to, acc.to(out.dtype.element_ty), mask=inside & (expert == num_experts))


@triton.jit
def gelu_columns(
    da,
    g,
    z,
    dz,
    gated,
    bias_parts,
    h,
    valid,
    hidden,
    NEED_DZ: tl.constexpr,
    NEED_GATES: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`through_gelu` of the columns h."""
    # Within a tile 32 bits are enough, and 64-bit offsets of every element would take registers from the sums.
    at = tl.arange(0, ROWS)[:, None] * hidden + h[None, :]
    inside = valid[:, None] & (h < hidden)[None, :]
    z_block = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    factor = gelu_factor(z_block, TANH)
    dg = tl.zeros((ROWS,), tl.float32)
    if NEED_GATES:
        dg = tl.sum(da * z_block * factor, 1)
    if NEED_WEIGHTS:
        tl.store(gated + at, (g[:, None] * z_block * factor).to(gated.dtype.element_ty), mask=inside)
    if NEED_DZ:
        dz_block = g[:, None] * da * (factor + z_block * gelu_factor_slope(z_block, factor, TANH))
        tl.store(dz + at, dz_block.to(dz.dtype.element_ty), mask=inside)
        if NEED_WEIGHTS:
            tl.store(bias_parts + h, tl.sum(dz_block, 0), mask=h < hidden)
    return dg


@triton.jit
def through_gelu(
    da,
    g,
    z,
    dz,
    gated,
    bias_parts,
    first,
    valid,
    hidden,
    NEED_DZ: tl.constexpr,
    NEED_GATES: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    TANH: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """What `to_hidden_grad_kernel` writes of a tile, whose columns begin at first; returns ``da . a``, ``[ROWS]``."""
    if HALVES:
        HALF: tl.constexpr = COLS // 2
        low, high = tl.split(tl.permute(tl.reshape(da, (ROWS, 2, HALF)), (0, 2, 1)))
        dg = tl.zeros((ROWS,), tl.float32)
        # A loop: without it the compiler puts off the sums of the first half, whose blocks then stay in registers.
        for half in range(0, 2):
            h = first + half * HALF + tl.arange(0, HALF)
            dg += gelu_columns(
                low, g, z, dz, gated, bias_parts, h, valid, hidden, NEED_DZ, NEED_GATES, NEED_WEIGHTS, TANH, ROWS
            )  # fmt: skip
            low = high
    else:
        h = first + tl.arange(0, COLS)
        dg = gelu_columns(
            da, g, z, dz, gated, bias_parts, h, valid, hidden, NEED_DZ, NEED_GATES, NEED_WEIGHTS, TANH, ROWS
        )  # fmt: skip
    return dg


@triton.jit
def to_hidden_grad_kernel(
    grad_out,
    gates,
    slot_order,
    offsets,
    weight,
    z,
    dz,
    gated,
    gate_parts,
    bias_parts,
    num_experts,
    num_parts,
    tokens,
    top_k,
    dim,
    hidden,
    stride_gb,
    stride_gn,
    stride_we,
    stride_wd,
    NEED_DZ: tl.constexpr,
    NEED_GATES: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    TANH: tl.constexpr,
    HALVES: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Back through fc2 and the GELU. With ``da = dout W2_e`` and ``a = gelu(z)`` of a row of gate g:

    ``dz = g da gelu'(z)`` and ``gated = g a``, both ``[S*N, H]``; ``bias_parts [tiles, H]``: dz summed over each tile;
    ``gate_parts [S, num_parts]``: ``da . a`` of each token over each block of columns.
    HALVES: the GELU is gone through in two halves of the columns, which take half the registers.
    """
    tile, col = cut_in_groups(tl.program_id(0), tl.cdiv(hidden, COLS), GROUP)
    expert, first, stop = find_tile(offsets, tile, num_experts, tokens, ROWS, EXPERTS)
    if first >= stop:
        return
    rows = first + tl.arange(0, ROWS)
    valid = rows < stop
    slots, images, token = locate(slot_order, rows, valid, tokens, top_k)
    h = col * COLS + tl.arange(0, COLS)
    h_valid = h < hidden
    da = multiply(
        grad_out + images * stride_gb + token * stride_gn,
        valid,
        weight + expert.to(tl.int64) * stride_we + h,
        h_valid,
        dim,
        stride_wd,
        ROWS,
        COLS,
        DEPTH,
    )
    g = tl.load(gates + slots, mask=valid, other=0.0).to(tl.float32)
    start = first.to(tl.int64) * hidden
    z += start
    if NEED_DZ:
        dz += start
    if NEED_WEIGHTS:
        gated += start
        bias_parts += tile.to(tl.int64) * hidden
    dg = through_gelu(
        da,
        g,
        z,
        dz,
        gated,
        bias_parts,
        col * COLS,
        valid,
        hidden,
        NEED_DZ,
        NEED_GATES,
        NEED_WEIGHTS,
        TANH,
        HALVES,
        ROWS,
        COLS,
    )
    if NEED_GATES:
        at = (rows // tokens).to(tl.int64) * num_parts + col * tokens + rows % tokens
        tl.store(gate_parts + at, dg, mask=valid)
