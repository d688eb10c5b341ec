"""The device code of `grouped_mlp`: products over gathered rows with their epilogues, and the small sums around them.

Letters: B images, N tokens, D width, H hidden, E experts, K chosen, S = B*K slots. Rows: see `common`.
"""

import triton
import triton.language as tl

from .common import (
    cut_in_groups,
    expert_tiles,
    find_expert,
    find_tile,
    find_tile_or_director,
    gelu_cdf,
    gelu_pdf,
    locate,
    locate_or_director,
)


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
    tl.store(a + start + at, (acc * gelu_cdf(acc)).to(a.dtype.element_ty), mask=inside)


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
    ROWS: tl.constexpr,
):
    """`through_gelu` of the columns h."""
    # Within a tile 32 bits are enough, and 64-bit offsets of every element would take registers from the sums.
    at = tl.arange(0, ROWS)[:, None] * hidden + h[None, :]
    inside = valid[:, None] & (h < hidden)[None, :]
    z_block = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    cdf = gelu_cdf(z_block)
    dg = tl.zeros((ROWS,), tl.float32)
    if NEED_GATES:
        dg = tl.sum(da * z_block * cdf, 1)
    if NEED_WEIGHTS:
        tl.store(gated + at, (g[:, None] * z_block * cdf).to(gated.dtype.element_ty), mask=inside)
    if NEED_DZ:
        dz_block = g[:, None] * da * (cdf + z_block * gelu_pdf(z_block))
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
                low, g, z, dz, gated, bias_parts, h, valid, hidden, NEED_DZ, NEED_GATES, NEED_WEIGHTS, ROWS
            )  # fmt: skip
            low = high
    else:
        h = first + tl.arange(0, COLS)
        dg = gelu_columns(da, g, z, dz, gated, bias_parts, h, valid, hidden, NEED_DZ, NEED_GATES, NEED_WEIGHTS, ROWS)
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
        HALVES,
        ROWS,
        COLS,
    )
    if NEED_GATES:
        at = (rows // tokens).to(tl.int64) * num_parts + col * tokens + rows % tokens
        tl.store(gate_parts + at, dg, mask=valid)


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
