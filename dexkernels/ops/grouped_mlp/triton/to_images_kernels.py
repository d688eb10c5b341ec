"""The device code of the aligned path of `grouped_mlp` from hidden activations to images: the K results of an image are
one sum. Letters, and where rows lie: see `aligned_kernels`.
"""

import triton
import triton.language as tl

from ...triton_common import cut_in_groups, find_tile
from .aligned_kernels import BLOCK, expert_block


@triton.jit
def invert_slots_kernel(
    slot_order, offsets, position, expert, num_experts, num_slots, EXPERTS: tl.constexpr, SLOTS: tl.constexpr
):
    """Of every slot: its place in slot_order and its expert, int32 ``[S]``."""
    p = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    valid = p < num_slots
    slot = tl.load(slot_order + p, mask=valid, other=0)
    e = tl.arange(0, EXPERTS)
    stop = tl.load(offsets + e + 1, mask=e < num_experts, other=9223372036854775807)
    tl.store(position + slot, p, mask=valid)
    tl.store(expert + slot, tl.sum((stop[None, :] <= p[:, None]).to(tl.int32), 1), mask=valid)


@triton.jit
def store_image(
    acc, image, experts, place, gates, bias, out, j, n, tokens, top_k, width, CHOICES: tl.constexpr, ROWS: tl.constexpr
):
    """``acc + sum_k gates[k] bias_e`` to the tokens of an image from n on; the sum in the order of place."""
    if bias is not None:
        slots = image.to(tl.int64) * top_k + tl.arange(0, CHOICES)
        g = tl.load(gates + slots, mask=place < top_k, other=0.0).to(tl.float32)
        for k in range(0, top_k):
            e = tl.sum(tl.where(place == k, experts, 0), 0).to(tl.int64)
            b = tl.load(bias + e * width + j, mask=j < width, other=0.0).to(tl.float32)
            acc += tl.sum(tl.where(place == k, g, 0.0), 0) * b[None, :]
    out += (image.to(tl.int64) * tokens + n) * width
    at = tl.arange(0, ROWS)[:, None] * width + j[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(j < width)[None, :])


@triton.jit
def store_packed(
    acc, row, end, expert, slot_order, gates, bias, by_slot, j, rest, width, ROWS: tl.constexpr
):  # fmt: skip
    """``acc``, with a bias ``+ g bias_e``, of the packed rows from row on, to ``by_slot [S, r, width]``."""
    rows = row + tl.arange(0, ROWS)
    valid = rows < end
    slots = tl.load(slot_order + rows // rest, mask=valid, other=0)
    if bias is not None:
        g = tl.load(gates + slots, mask=valid, other=0.0).to(tl.float32)
        b = tl.load(bias + expert.to(tl.int64) * width + j, mask=j < width, other=0.0).to(tl.float32)
        acc += g[:, None] * b[None, :]
    at = (slots * rest + rows % rest)[:, None] * width + j[None, :]
    tl.store(by_slot + at, acc.to(by_slot.dtype.element_ty), mask=valid[:, None] & (j < width)[None, :])


@triton.jit
def store_director(acc, row, end, bias, out, j, width, ROWS: tl.constexpr):
    """``acc + bias`` to the director's rows from row on, of ``out [B*N, width]``; a gate has no part in it."""
    valid = row + tl.arange(0, ROWS) < end
    acc += tl.load(bias + j, mask=j < width, other=0.0).to(tl.float32)[None, :]
    out += row.to(tl.int64) * width
    at = tl.arange(0, ROWS)[:, None] * width + j[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=valid[:, None] & (j < width)[None, :])


@triton.jit
def find_single(
    offsets, tile, num_experts, num_slots, director_images, blocks, first_token, ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """``(single, of_director, expert, row, start, end)`` of a tile whose rows follow one another and are of one expert.

    Such come after the tiles of images, whose numbers are negative and which are not single: the director's, as expert
    num_experts, then those of the packed rows. Rows are counted in their kind, which begins at row ``start`` of all.
    """
    tokens = blocks * BLOCK + first_token
    director_tiles = tl.cdiv(director_images * tokens, ROWS)
    expert, row, end = find_tile(offsets, tile - director_tiles, num_experts, first_token, ROWS, EXPERTS)
    of_director = tile < director_tiles
    expert = tl.where(of_director, num_experts, expert)
    row = tl.where(of_director, tile * ROWS, row)
    end = tl.where(of_director, director_images * tokens, end)
    start = num_slots * tl.where(of_director, tokens, blocks * BLOCK)
    return tile >= 0, of_director, expert, row, start, end


@triton.jit
def to_images_kernel(
    rows_in,
    weight,
    position,
    expert,
    slot_order,
    offsets,
    gates,
    bias,
    out,
    by_slot,
    director_out,
    image_tiles,
    num_slots,
    director_images,
    num_experts,
    blocks,
    first_token,
    top_k,
    depth,
    width,
    TRANSPOSED: tl.constexpr,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``out[b, r + n] = sum_k rows_in[slot (b, k), n] @ W_e``, with a bias ``+ sum_k gates[b, k] bias_e``.

    One sum of length ``K * depth``: nothing is written by slot. ``[S*N, depth] -> [B, N, width]``; ROWS divides 64q.
    rows_in: descriptor, box ``[ROWS, DEPTH]``. weight: see `expert_block`. CHOICES: a power of two, at least K.
    After the ``image_tiles`` tiles of the blocks come those of the director, which write ``director_out [B, N, width]``
    (director_images: B, or 0 without one), and those of the packed rows. The images of these share no experts: they go
    ``by_slot [S, r, width]``, K terms of their tokens of out, gates included.
    """
    tile, col = cut_in_groups(tl.program_id(0), tl.cdiv(width, COLS), GROUP)
    single, of_director, its_expert, first, start, end = find_single(
        offsets, tile - image_tiles, num_experts, num_slots, director_images, blocks, first_token, ROWS, EXPERTS
    )
    if single & (first >= end):
        return
    per_image = blocks * BLOCK // ROWS
    image = tl.where(single, 0, tile // per_image)
    n = tile % per_image * ROWS
    j0 = col * COLS
    # Loaded here and picked by a masked sum: loads of indices inside the loop would take stages from its pipeline.
    choice = tl.arange(0, CHOICES)
    slots = image.to(tl.int64) * top_k + choice
    first_rows = tl.load(position + slots, mask=choice < top_k, other=0) * blocks * BLOCK + n
    experts = tl.load(expert + slots, mask=choice < top_k, other=0)
    first_rows = tl.where(single, start + first, first_rows)
    experts = tl.where(single, its_expert, experts)
    steps = tl.cdiv(depth, DEPTH)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(0, steps * tl.where(single, 1, top_k)):
        mine = choice == step // steps
        row = tl.sum(tl.where(mine, first_rows, 0), 0)
        e = tl.sum(tl.where(mine, experts, 0), 0)
        k = step % steps * DEPTH
        w = expert_block(weight, e, k, j0, TRANSPOSED, COLS, DEPTH)
        acc = tl.dot(rows_in.load([row, k]), w, acc, input_precision="ieee")
    j = j0 + tl.arange(0, COLS)
    if single:
        if of_director:
            if director_out is not None:
                to_bias = bias + its_expert.to(tl.int64) * width
                store_director(acc, first, end, to_bias, director_out, j, width, ROWS)
        else:
            if by_slot is not None:
                store_packed(
                    acc, first, end, its_expert, slot_order, gates, bias, by_slot, j, first_token, width, ROWS
                )  # fmt: skip
    else:
        tokens = blocks * BLOCK + first_token
        store_image(
            acc, image, experts, choice, gates, bias, out, j, first_token + n, tokens, top_k, width, CHOICES, ROWS
        )  # fmt: skip


@triton.jit
def sets_of_images(expert, images, valid, top_k):
    """The set of experts of each image, one bit an expert (at most 31 of them); more than any where not valid."""
    sets = tl.where(valid, 0, 2147483647)
    for k in range(0, top_k):
        e = tl.load(expert + images.to(tl.int64) * top_k + k, mask=valid, other=0)
        sets |= tl.where(valid, 1 << e, 0)
    return sets


@triton.jit
def order_images_kernel(expert, order, index, num_images, top_k, IMAGES: tl.constexpr):
    """``order [B]``: the images sorted by their sets of experts, stably; ``index [B]``: of each its number in its set.

    ``expert [S]``: see `invert_slots_kernel`. Every image counts those that come before it.
    """
    b = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    valid = b < num_images
    mine = sets_of_images(expert, b, valid, top_k)
    place = tl.zeros((IMAGES,), tl.int32)
    number = tl.zeros((IMAGES,), tl.int32)
    for b0 in range(0, num_images, IMAGES):
        other = b0 + tl.arange(0, IMAGES)
        theirs = sets_of_images(expert, other, other < num_images, top_k)
        place += tl.sum((theirs[None, :] < mine[:, None]).to(tl.int32), 1)
        number += tl.sum(((theirs[None, :] == mine[:, None]) & (other[None, :] < b[:, None])).to(tl.int32), 1)
    tl.store(order + place + number, b, mask=valid)
    tl.store(index + place + number, number, mask=valid)


@triton.jit
def choices_by_expert(position, expert, image, first_row, rows_of_slot, top_k, CHOICES: tl.constexpr):
    """Of the choices of an image: the first row, the expert, and the expert's place among the image's in rising order.

    Those past top_k have no place that is asked for.
    """
    choice = tl.arange(0, CHOICES)
    mine = choice < top_k
    slots = image.to(tl.int64) * top_k + choice
    rows = tl.load(position + slots, mask=mine, other=0) * rows_of_slot + first_row
    experts = tl.load(expert + slots, mask=mine, other=2147483647)
    place = tl.sum((experts[None, :] < experts[:, None]).to(tl.int32), 1)
    return rows, experts, tl.where(mine, place, CHOICES)


@triton.jit
def pairs_to_images_kernel(
    rows_in,
    weight,
    position,
    expert,
    slot_order,
    offsets,
    order,
    index,
    gates,
    bias,
    out,
    by_slot,
    director_out,
    num_images,
    num_slots,
    director_images,
    num_experts,
    blocks,
    first_token,
    top_k,
    depth,
    width,
    TRANSPOSED: tl.constexpr,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`to_images_kernel` of the same block of two images that chose the same experts: they share the weights.

    order, index: see `order_images_kernel`. An image whose number in its set is odd is the partner of the one before
    it. Sums go over the experts in rising order: the bits of an image don't depend on its partner, nor on having one.
    rows_in: descriptor, box ``[64, DEPTH]``.
    """
    tile, col = cut_in_groups(tl.program_id(0), tl.cdiv(width, COLS), GROUP)
    single, of_director, its_expert, first, start, end = find_single(
        offsets, tile - num_images * blocks, num_experts, num_slots, director_images, blocks, first_token, 2 * BLOCK,
        EXPERTS,
    )  # fmt: skip
    rank = tl.where(single, 0, tile // blocks)
    n = tile % blocks * BLOCK
    number = tl.load(index + rank)
    if tl.where(single, first >= end, number % 2 == 1):
        return
    has_partner = tl.load(index + tl.minimum(rank + 1, num_images - 1)) == number + 1
    image0 = tl.load(order + rank)
    # An image alone is multiplied twice and written once.
    image1 = tl.load(order + rank + has_partner.to(tl.int32))
    rows0, experts0, place0 = choices_by_expert(position, expert, image0, n, blocks * BLOCK, top_k, CHOICES)
    rows1, experts1, place1 = choices_by_expert(position, expert, image1, n, blocks * BLOCK, top_k, CHOICES)
    rows0 = tl.where(single, start + first, rows0)
    rows1 = tl.where(single, start + first + BLOCK, rows1)
    experts0 = tl.where(single, its_expert, experts0)
    j0 = col * COLS
    steps = tl.cdiv(depth, DEPTH)
    acc0 = tl.zeros((BLOCK, COLS), tl.float32)
    acc1 = tl.zeros((BLOCK, COLS), tl.float32)
    for step in range(0, steps * tl.where(single, 1, top_k)):
        mine0 = place0 == step // steps
        row0 = tl.sum(tl.where(mine0, rows0, 0), 0)
        row1 = tl.sum(tl.where(place1 == step // steps, rows1, 0), 0)
        e = tl.sum(tl.where(mine0, experts0, 0), 0)
        k = step % steps * DEPTH
        w = expert_block(weight, e, k, j0, TRANSPOSED, COLS, DEPTH)
        acc0 = tl.dot(rows_in.load([row0, k]), w, acc0, input_precision="ieee")
        acc1 = tl.dot(rows_in.load([row1, k]), w, acc1, input_precision="ieee")
    j = j0 + tl.arange(0, COLS)
    if single:
        if of_director:
            if director_out is not None:
                to_bias = bias + its_expert.to(tl.int64) * width
                store_director(acc0, first, end, to_bias, director_out, j, width, BLOCK)
                store_director(acc1, first + BLOCK, end, to_bias, director_out, j, width, BLOCK)
        else:
            if by_slot is not None:
                store_packed(
                    acc0, first, end, its_expert, slot_order, gates, bias, by_slot, j, first_token, width, BLOCK
                )  # fmt: skip
                store_packed(
                    acc1, first + BLOCK, end, its_expert, slot_order, gates, bias, by_slot, j, first_token, width,
                    BLOCK,
                )  # fmt: skip
    else:
        n += first_token
        tokens = blocks * BLOCK + first_token
        store_image(acc0, image0, experts0, place0, gates, bias, out, j, n, tokens, top_k, width, CHOICES, BLOCK)
        if has_partner:
            store_image(acc1, image1, experts1, place1, gates, bias, out, j, n, tokens, top_k, width, CHOICES, BLOCK)
