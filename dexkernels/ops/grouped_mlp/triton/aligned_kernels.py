"""The device code of the aligned path of `grouped_mlp`: products over blocks of tokens, loaded by TMA descriptors.

Letters: B images, N tokens, D width, H hidden, E experts, K chosen, S = B*K slots; q = N // 64, r = N % 64.
The last 64 q tokens of an image are its q blocks. The S*q blocks are numbered in slot order: block ``i`` is block
``i % q`` of slot ``slot_order[i // q]``, and its 64 rows of hidden activations are the rows ``64 i`` up to
``64 i + 64`` of ``[S*N, H]``. The first r tokens of an image (CLS among them) are packed: row ``m`` of ``[S*r, .]`` is
token ``m % r`` of slot ``slot_order[m // r]``, and its hidden activations are row ``S * 64 q + m``. Packed rows make
tiles of their own, launched beside those of the blocks; one that reaches past its expert's rows multiplies what lies
there and writes none of it.
A block belongs to one image, and to one expert: a box of a descriptor of all tokens ``[B*N, .]`` holds it. Descriptors
read zeros past the ends of their tensors: a width need not be a multiple of the box's.
"""

import triton
import triton.language as tl

from ...triton_common import cut_in_groups, expert_tiles
from .gather_kernels import through_gelu
from .gelu_kernels import gelu_factor

BLOCK = tl.constexpr(64)
"""Tokens of a block: the rows of one wgmma."""


@triton.jit
def locate_block(slot_order, block, blocks, first_token, top_k):
    """``(image, token)`` of a block: the token that it begins with."""
    slot = tl.load(slot_order + block // blocks)
    return (slot // top_k).to(tl.int32), first_token + block % blocks * BLOCK


@triton.jit
def pack_rows_kernel(x, slot_order, packed, rest, top_k, dim, stride_b, stride_n, COLS: tl.constexpr):
    """``packed [S*r, D]``: row m is token ``m % r`` of slot ``slot_order[m // r]``."""
    row = tl.program_id(0)
    image = tl.load(slot_order + row // rest) // top_k
    x += image * stride_b + (row % rest).to(tl.int64) * stride_n
    for d0 in range(0, dim, COLS):
        d = d0 + tl.arange(0, COLS)
        tl.store(packed + row.to(tl.int64) * dim + d, tl.load(x + d, mask=d < dim, other=0.0), mask=d < dim)


@triton.jit
def find_rows(offsets, tile, num_experts, blocks, rest, EXPERTS: tl.constexpr):
    """``(expert, packed, first, end)`` of a tile of two blocks; an expert's packed rows come after its blocks.

    Rows are counted among those of the blocks, or among the packed ones. Past the last tile first >= end.
    """
    e = tl.arange(0, EXPERTS)
    start = tl.load(offsets + e, mask=e < num_experts, other=0).to(tl.int32)
    slots = tl.load(offsets + e + 1, mask=e < num_experts, other=0).to(tl.int32) - start
    of_blocks = (slots * blocks + 1) // 2
    tiles = of_blocks + (slots * rest + 2 * BLOCK - 1) // (2 * BLOCK)
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    mine = e == expert
    within = tile - tl.sum(tl.where(mine, ends - tiles, 0), 0)
    before = tl.sum(tl.where(mine, of_blocks, 0), 0)
    begin = tl.sum(tl.where(mine, start, 0), 0)
    end = begin + tl.sum(tl.where(mine, slots, 0), 0)
    packed = within >= before
    of_slot = tl.where(packed, rest, blocks * BLOCK)
    within -= tl.where(packed, before, 0)
    return expert, packed, begin * of_slot + within * (2 * BLOCK), end * of_slot


@triton.jit
def find_rows_or_director(offsets, tile, num_experts, images, blocks, rest, EXPERTS: tl.constexpr):
    """``(expert, packed, of_director, first, end)``: `find_rows`, but the first tiles are the director's.

    It is expert number num_experts, and its rows are counted among the ``images * N`` of its own; no images: none.
    """
    rows = images * (blocks * BLOCK + rest)
    director_tiles = tl.cdiv(rows, 2 * BLOCK)
    expert, packed, first, end = find_rows(offsets, tile - director_tiles, num_experts, blocks, rest, EXPERTS)
    of_director = tile < director_tiles
    expert = tl.where(of_director, num_experts, expert)
    first = tl.where(of_director, tile * (2 * BLOCK), first)
    return expert, packed, of_director, first, tl.where(of_director, rows, end)


@triton.jit
def expert_block(weight, expert, depth, col, TRANSPOSED: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    """``[DEPTH, COLS]`` of ``weight [E, depth, cols]``, or TRANSPOSED of ``[E, cols, depth]``."""
    if TRANSPOSED:
        return weight.load([expert, col, depth]).reshape(COLS, DEPTH).T
    return weight.load([expert, depth, col]).reshape(DEPTH, COLS)


@triton.jit
def add_products(
    acc0,
    acc1,
    rows,
    row0,
    row1,
    weight,
    expert,
    col,
    depth,
    TRANSPOSED: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The products of 64 ``rows [., depth]`` from row0, and from row1, with the same columns of an expert, added."""
    for k in range(0, depth, DEPTH):
        w = expert_block(weight, expert, k, col, TRANSPOSED, COLS, DEPTH)
        acc0 = tl.dot(rows.load([row0, k]), w, acc0, input_precision="ieee")
        acc1 = tl.dot(rows.load([row1, k]), w, acc1, input_precision="ieee")
    return acc0, acc1


@triton.jit
def multiply_rows(
    x,
    packed_x,
    packed,
    of_director,
    row,
    end,
    slot_order,
    weight,
    expert,
    col,
    blocks,
    first_token,
    top_k,
    depth,
    TRANSPOSED: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The products of the 128 rows from row on: of ``packed_x [S*r, depth]``, or in ``x [B*N, depth]`` two blocks.

    The director's rows are those of x, one after the other.
    """
    acc0 = tl.zeros((BLOCK, COLS), tl.float32)
    acc1 = tl.zeros((BLOCK, COLS), tl.float32)
    # A loop over nothing for the other kind: loops in two branches would each have buffers of their own.
    if packed_x is not None:
        acc0, acc1 = add_products(
            acc0, acc1, packed_x, row, row + BLOCK, weight, expert, col, tl.where(packed, depth, 0),
            TRANSPOSED, COLS, DEPTH,
        )  # fmt: skip
    # An odd block is multiplied twice and written once.
    other = packed | of_director
    first = tl.where(other, 0, row // BLOCK)
    second = tl.where(other, 0, tl.minimum(first + 1, end // BLOCK - 1))
    image0, token0 = locate_block(slot_order, first, blocks, first_token, top_k)
    image1, token1 = locate_block(slot_order, second, blocks, first_token, top_k)
    tokens = blocks * BLOCK + first_token
    row0 = tl.where(of_director, row, image0 * tokens + token0)
    row1 = tl.where(of_director, row + BLOCK, image1 * tokens + token1)
    return add_products(
        acc0, acc1, x, row0, row1, weight, expert, col, tl.where(packed, 0, depth), TRANSPOSED, COLS, DEPTH
    )


@triton.jit
def activate_columns(acc, g, valid, of_director, bias, z, a, h, hidden, TANH: tl.constexpr):
    """`store_activations` of the columns h."""
    acc += tl.load(bias + h, mask=h < hidden, other=0.0).to(tl.float32)[None, :]
    # Within a block 32 bits are enough, and 64-bit offsets of every element would take registers from the sums.
    at = tl.arange(0, BLOCK)[:, None] * hidden + h[None, :]
    inside = valid[:, None] & (h < hidden)[None, :]
    if z is not None:
        tl.store(z + at, acc.to(z.dtype.element_ty), mask=inside & (of_director == 0))
    if g is not None:
        acc = g[:, None] * acc * gelu_factor(acc, TANH)
    else:
        acc = acc * gelu_factor(acc, TANH)
    tl.store(a + at, acc.to(a.dtype.element_ty), mask=inside)


@triton.jit
def store_activations(
    acc, row, end, start, of_slot, of_director, slot_order, gates, bias, z, a, first, hidden, TANH: tl.constexpr,
    HALVES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What `fc1_blocks_kernel` writes of 64 rows, whose columns begin at first; their kind begins at row start."""
    rows = row + tl.arange(0, BLOCK)
    valid = rows < end
    to = (start + row).to(tl.int64) * hidden
    if z is not None:
        z += to
    g = None
    if gates is not None:
        routed = valid & (of_director == 0)
        slots = tl.load(slot_order + rows // of_slot, mask=routed, other=0)
        g = tl.load(gates + slots, mask=routed, other=1.0).to(tl.float32)
    if HALVES:
        HALF: tl.constexpr = COLS // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, (BLOCK, 2, HALF)), (0, 2, 1)))
        h = first + tl.arange(0, HALF)
        activate_columns(low, g, valid, of_director, bias, z, a + to, h, hidden, TANH)
        activate_columns(high, g, valid, of_director, bias, z, a + to, h + HALF, hidden, TANH)
    else:
        activate_columns(acc, g, valid, of_director, bias, z, a + to, first + tl.arange(0, COLS), hidden, TANH)


@triton.jit
def fc1_blocks_kernel(
    x,
    packed_x,
    slot_order,
    offsets,
    gates,
    weight,
    bias,
    z,
    a,
    num_experts,
    num_slots,
    director_images,
    blocks,
    first_token,
    top_k,
    dim,
    hidden,
    TANH: tl.constexpr,
    HALVES: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``z = W1_e x + b1_e`` (unless None) and ``a = g gelu(z)`` (no gates: ``gelu(z)``) of two blocks, ``[S*N, H]``.

    x: descriptor of ``[B*N, D]``, box ``[64, DEPTH]``; packed_x: of ``[S*r, D]``, or None.
    weight: of ``[E, H, D]``, box ``[1, COLS, DEPTH]``.
    Two blocks that follow one another, of one image or two, share the blocks of an expert's weights.
    With a director its rows ``[B*N, H]``, gelu(z) without a gate, are behind those of a. director_images: B, or 0.
    """
    tile, col = cut_in_groups(tl.program_id(0), tl.cdiv(hidden, COLS), GROUP)
    expert, packed, of_director, row, end = find_rows_or_director(
        offsets, tile, num_experts, director_images, blocks, first_token, EXPERTS
    )
    if row >= end:
        return
    h0 = col * COLS
    acc0, acc1 = multiply_rows(
        x, packed_x, packed, of_director, row, end, slot_order, weight, expert, h0, blocks, first_token, top_k, dim,
        True, COLS, DEPTH,
    )  # fmt: skip
    bias += expert.to(tl.int64) * hidden
    tokens = blocks * BLOCK + first_token
    start = tl.where(packed, num_slots * blocks * BLOCK, tl.where(of_director, num_slots * tokens, 0))
    of_slot = tl.where(packed, first_token, blocks * BLOCK)
    store_activations(
        acc0, row, end, start, of_slot, of_director, slot_order, gates, bias, z, a, h0, hidden, TANH, HALVES, COLS
    )  # fmt: skip
    if row + BLOCK < end:
        store_activations(
            acc1, row + BLOCK, end, start, of_slot, of_director, slot_order, gates, bias, z, a, h0, hidden, TANH,
            HALVES, COLS,
        )  # fmt: skip


@triton.jit
def store_hidden_grad(
    da,
    row,
    end,
    packed,
    expert,
    slot_order,
    offsets,
    col,
    gates,
    z,
    dz,
    gated,
    gate_parts,
    bias_parts,
    num_experts,
    num_slots,
    blocks,
    first_token,
    num_parts,
    hidden,
    NEED_DZ: tl.constexpr,
    NEED_GATES: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    TANH: tl.constexpr,
    HALVES: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLS: tl.constexpr,
):
    """What `hidden_grad_blocks_kernel` writes of 64 rows."""
    start = (tl.where(packed, num_slots * blocks * BLOCK, 0) + row).to(tl.int64) * hidden
    z += start
    if NEED_DZ:
        dz += start
    if NEED_WEIGHTS:
        gated += start
        first, _ = expert_tiles(offsets, expert, num_experts, first_token, BLOCK, EXPERTS)
        within = row - tl.load(offsets + expert).to(tl.int32) * first_token
        part = tl.where(packed, num_slots * blocks + first + within // BLOCK, row // BLOCK)
        bias_parts += part.to(tl.int64) * hidden
    # Looked up anew: carried through the main loop it would take registers from the sums.
    rows = row + tl.arange(0, BLOCK)
    valid = rows < end
    of_slot = tl.where(packed, first_token, blocks * BLOCK)
    position = rows // of_slot
    slots = tl.load(slot_order + position, mask=valid, other=0)
    g = tl.load(gates + slots, mask=valid, other=0.0).to(tl.float32)
    # A packed row that is not valid may be another expert's: its gate is 0 here, but 0 times a NaN would be NaN.
    dg = through_gelu(
        tl.where(valid[:, None], da, 0.0),
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
        BLOCK,
        COLS,
    )
    if NEED_GATES:
        if packed:
            of_blocks = tl.cdiv(hidden, COLS) * blocks
            to_rows = position.to(tl.int64) * num_parts + of_blocks + col * first_token + rows % of_slot
            tl.store(gate_parts + to_rows, dg, mask=valid)
        else:
            at = (row // of_slot).to(tl.int64) * num_parts + col * blocks + row // BLOCK % blocks
            tl.store(gate_parts + at, tl.sum(dg, 0))


@triton.jit
def hidden_grad_blocks_kernel(
    grad_out,
    packed_grad,
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
    num_slots,
    num_parts,
    blocks,
    first_token,
    top_k,
    dim,
    hidden,
    NEED_DZ: tl.constexpr,
    NEED_GATES: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    TANH: tl.constexpr,
    HALVES: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`to_hidden_grad_kernel` of two blocks: dz, gated, and a part of every sum for each block.

    grad_out, packed_grad: as x and packed_x of `fc1_blocks_kernel`. weight: of ``[E, D, H]``, box ``[1, DEPTH, COLS]``.
    ``bias_parts``: ``[S q, H]`` of the blocks, then of the packed rows of every expert, cut into 64.
    ``gate_parts [S, num_parts]``: of each slot ``column blocks * q``, then ``column blocks * r``.
    """
    tile, col = cut_in_groups(tl.program_id(0), tl.cdiv(hidden, COLS), GROUP)
    expert, packed, row, end = find_rows(offsets, tile, num_experts, blocks, first_token, EXPERTS)
    if row >= end:
        return
    da0, da1 = multiply_rows(
        grad_out, packed_grad, packed, False, row, end, slot_order, weight, expert, col * COLS, blocks, first_token,
        top_k, dim, False, COLS, DEPTH,
    )  # fmt: skip
    store_hidden_grad(
        da0, row, end, packed, expert, slot_order, offsets, col, gates, z, dz, gated, gate_parts, bias_parts,
        num_experts, num_slots, blocks, first_token, num_parts, hidden,
        NEED_DZ, NEED_GATES, NEED_WEIGHTS, TANH, HALVES, EXPERTS, COLS,
    )  # fmt: skip
    if row + BLOCK < end:
        store_hidden_grad(
            da1, row + BLOCK, end, packed, expert, slot_order, offsets, col, gates, z, dz, gated, gate_parts,
            bias_parts, num_experts, num_slots, blocks, first_token, num_parts, hidden,
            NEED_DZ, NEED_GATES, NEED_WEIGHTS, TANH, HALVES, EXPERTS, COLS,
        )  # fmt: skip
