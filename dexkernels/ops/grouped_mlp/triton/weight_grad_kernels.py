"""The device code of the weight gradients: sums over the rows of an expert, cut into chunks where an expert has many.

Letters: B images, N tokens, D width, H hidden, E experts, K chosen, S = B*K slots; q = N // 64, r = N % 64.
The slots of an expert that has more than ``most`` are cut into chunks of nearly equal length. An expert of one chunk is
written as it is; of more, each chunk writes its sum in float32, a part, and `sum_chunks_kernel` adds the parts in the
order of their slots. So one expert that has most of the rows occupies the whole device, and the bits are the same in
every run.
"""

import triton
import triton.language as tl

from ...triton_common import locate
from .aligned_kernels import BLOCK, locate_block


@triton.jit
def cut_experts(offsets, num_experts, most, EXPERTS: tl.constexpr):
    """Of every expert: ``(first slot, slots, chunks, slots of a chunk)``; one chunk at least, none past num_experts."""
    e = tl.arange(0, EXPERTS)
    real = e < num_experts
    first = tl.load(offsets + e, mask=real, other=0).to(tl.int32)
    size = tl.load(offsets + e + 1, mask=real, other=0).to(tl.int32) - first
    chunks = tl.where(real, tl.maximum(tl.cdiv(size, most), 1), 0)
    return first, size, chunks, tl.cdiv(size, tl.maximum(chunks, 1))


@triton.jit
def find_chunk(offsets, number, num_experts, most, EXPERTS: tl.constexpr):
    """``(expert, first slot, end slot, part)`` of a chunk; they are numbered from the longest on.

    part: which of the parts it is, -1 where it is its expert's only chunk. Past the last chunk expert = num_experts.
    """
    e = tl.arange(0, EXPERTS)
    first, size, chunks, length = cut_experts(offsets, num_experts, most, EXPERTS)
    longer = (length[None, :] > length[:, None]) | ((length[None, :] == length[:, None]) & (e[None, :] < e[:, None]))
    begin = tl.sum(tl.where(longer, chunks[None, :], 0), 1)
    mine = (begin <= number) & (number < begin + chunks)
    expert = tl.sum(tl.where(mine, e, 0), 0)
    count = tl.sum(tl.where(mine, chunks, 0), 0)
    within = number - tl.sum(tl.where(mine, begin, 0), 0)
    step = tl.sum(tl.where(mine, length, 0), 0)
    start = tl.sum(tl.where(mine, first, 0), 0)
    stop = start + tl.sum(tl.where(mine, size, 0), 0)
    start += within * step
    before = tl.sum(tl.where((e < expert) & (chunks > 1), chunks, 0), 0)
    part = tl.where(count > 1, before + within, -1)
    return tl.where(count > 0, expert, num_experts), start, tl.minimum(start + step, stop), part


@triton.jit
def store_chunk(acc, expert, part, parts, out, i, j, height, width):
    """A chunk's sum: to the gradient itself when it is an expert's only one, else to its part."""
    inside = (i < height)[:, None] & (j < width)[None, :]
    at = i.to(tl.int64)[:, None] * width + j[None, :]
    if parts is None:
        tl.store(out + expert.to(tl.int64) * height * width + at, acc.to(out.dtype.element_ty), mask=inside)
    else:
        if part < 0:
            tl.store(out + expert.to(tl.int64) * height * width + at, acc.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(parts + part.to(tl.int64) * height * width + at, acc, mask=inside)


@triton.jit
def add_gathered(
    acc,
    left,
    right,
    slot_order,
    start,
    stop,
    tokens,
    top_k,
    i,
    j,
    height,
    width,
    stride_b,
    stride_n,
    GATHER_LEFT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``acc + left[start:stop, i].T @ right[start:stop, j]``; see `weight_grad_kernel`."""
    i_valid = i < height
    j_valid = j < width
    for row in range(start, stop, DEPTH):
        rows = row + tl.arange(0, DEPTH)
        valid = rows < stop
        _, images, token = locate(slot_order, rows, valid, tokens, top_k)
        gathered = images * stride_b + token * stride_n
        if GATHER_LEFT:
            left_at = gathered
            right_at = rows.to(tl.int64) * width
        else:
            left_at = rows.to(tl.int64) * height
            right_at = gathered
        # Both sides are masked: 0 times a NaN that lies past the end would be NaN.
        l_block = tl.load(left + left_at[:, None] + i[None, :], mask=valid[:, None] & i_valid[None, :], other=0.0)
        r_block = tl.load(right + right_at[:, None] + j[None, :], mask=valid[:, None] & j_valid[None, :], other=0.0)
        acc = tl.dot(tl.trans(l_block), r_block, acc, input_precision="ieee")
    return acc


@triton.jit
def weight_grad_kernel(
    left,
    right,
    slot_order,
    offsets,
    out,
    parts,
    num_experts,
    most,
    tokens,
    top_k,
    height,
    width,
    stride_b,
    stride_n,
    GATHER_LEFT: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``out[e] = left[rows of e].T @ right[rows of e]``, ``[E, height, width]``; zeros for an expert without rows.

    One side is gathered from ``[B, N, .]`` (left when GATHER_LEFT, else right), the other lies in row order.
    parts: ``[., height, width]``, float32; None where no expert can have more than ``most`` slots.
    """
    cols = tl.cdiv(width, COLS)
    per_chunk = tl.cdiv(height, ROWS) * cols
    expert, first, end, part = find_chunk(offsets, tl.program_id(0) // per_chunk, num_experts, most, EXPERTS)
    if expert >= num_experts:
        return
    within = tl.program_id(0) % per_chunk
    i = within // cols * ROWS + tl.arange(0, ROWS)
    j = within % cols * COLS + tl.arange(0, COLS)
    acc = add_gathered(
        tl.zeros((ROWS, COLS), tl.float32), left, right, slot_order, first * tokens, end * tokens, tokens, top_k, i, j,
        height, width, stride_b, stride_n, GATHER_LEFT, DEPTH,
    )  # fmt: skip
    store_chunk(acc, expert, part, parts, out, i, j, height, width)


@triton.jit
def weight_grad_blocks_kernel(
    left,
    right,
    slot_order,
    offsets,
    left_rest,
    right_rest,
    out,
    parts,
    num_experts,
    most,
    blocks,
    first_token,
    top_k,
    height,
    width,
    stride_b,
    stride_n,
    GATHER_LEFT: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`weight_grad_kernel` of an expert's blocks, then of its gathered rows.

    One side is read from ``[B, N, .]`` (left when GATHER_LEFT, else right): a descriptor with box ``[1, 64, .]``, and
    the same tensor by pointer for its first r tokens. The other lies in slot order: descriptor and rest.
    """
    cols = tl.cdiv(width, COLS)
    per_chunk = tl.cdiv(height, ROWS) * cols
    expert, first, end, part = find_chunk(offsets, tl.program_id(0) // per_chunk, num_experts, most, EXPERTS)
    if expert >= num_experts:
        return
    within = tl.program_id(0) % per_chunk
    i0 = within // cols * ROWS
    j0 = within % cols * COLS
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for block in range(first * blocks, end * blocks):
        image, token = locate_block(slot_order, block, blocks, first_token, top_k)
        if GATHER_LEFT:
            l_block = left.load([image, token, i0]).reshape(BLOCK, ROWS)
            r_block = right.load([block * BLOCK, j0])
        else:
            l_block = left.load([block * BLOCK, i0])
            r_block = right.load([image, token, j0]).reshape(BLOCK, COLS)
        acc = tl.dot(l_block.T, r_block, acc, input_precision="ieee")
    i = i0 + tl.arange(0, ROWS)
    j = j0 + tl.arange(0, COLS)
    acc = add_gathered(
        acc, left_rest, right_rest, slot_order, first * first_token, end * first_token, first_token, top_k, i, j,
        height, width, stride_b, stride_n, GATHER_LEFT, DEPTH,
    )  # fmt: skip
    store_chunk(acc, expert, part, parts, out, i, j, height, width)


@triton.jit
def sum_chunks_kernel(parts, offsets, out, num_experts, most, size, EXPERTS: tl.constexpr, CUT: tl.constexpr):
    """``out[e] = `` the sum of the parts of e, in their order, of ``size`` elements: for the experts that were cut.

    The programs of one first index are for one of those experts and take blocks of CUT elements in turns.
    """
    e = tl.arange(0, EXPERTS)
    _, _, chunks, _ = cut_experts(offsets, num_experts, most, EXPERTS)
    was_cut = chunks > 1
    mine = was_cut & (tl.cumsum(was_cut.to(tl.int32), 0) == tl.program_id(0) + 1)
    expert = tl.sum(tl.where(mine, e, 0), 0)
    count = tl.sum(tl.where(mine, chunks, 0), 0)
    if count == 0:
        return
    parts += tl.sum(tl.where(was_cut & (e < expert), chunks, 0), 0).to(tl.int64) * size
    out += expert.to(tl.int64) * size
    for i0 in range(tl.program_id(1) * CUT, size, tl.num_programs(1) * CUT):
        i = i0 + tl.arange(0, CUT)
        acc = tl.zeros((CUT,), tl.float32)
        at = parts + i
        for _part in range(0, count):
            acc += tl.load(at, mask=i < size, other=0.0)
            at += size
        tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < size)
