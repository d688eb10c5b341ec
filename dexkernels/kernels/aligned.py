"""The aligned path of `grouped_mlp`: when it applies, and its launches. What is computed: see `aligned_kernels`.

Letters: B images, N tokens, D width, H hidden, E experts, K chosen, S = B*K slots, q blocks of an image.
"""

import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import aligned_kernels, to_images_kernels, to_slots_kernels, weight_grad_kernels
from .chunks import Cut
from .common import Tile, architecture, experts_block, max_tiles, precision

BLOCK = aligned_kernels.BLOCK.value

TILES = {
    ("fc1_blocks", "half", 90): Tile(128, 256, 64, 8, 4, halves=True),
    ("to_images", "half", 90): Tile(64, 256, 64, 4, 4),
    ("to_images_even", "half", 90): Tile(128, 256, 64, 8, 4),
    ("to_images_pairs", "half", 90): Tile(128, 256, 64, 8, 4),
    ("to_slots_blocks", "half", 90): Tile(128, 256, 64, 8, 4),
    ("hidden_grad_blocks", "half", 90): Tile(128, 256, 64, 8, 4, halves=True),
    ("weight_grad_blocks", "half", 90): Tile(128, 256, 32, 8, 5),
}
"""(kernel, precision, architecture) -> tile. ``to_images_even``: where an image's blocks are even in number;
``to_images_pairs``: see `in_pairs`; all but to_images and weight_grad_blocks are two blocks high. The depth of
weight_grad_blocks is that of its gathered rows, its blocks are 64 deep; it counts more stages than it has buffers:
the loads of slot numbers take stages of their own."""

GROUP = 8
"""Row tiles that walk the columns together, see `cut_in_groups`. A program computes one tile: in a loop over tiles the
loads of the next would run beside the epilogue of this one only if the loop were flattened, and of two sums in such a
loop Triton 3.6 and 3.9 wait for every wgmma."""

INVERT = 128
"""Slots that one program of `invert_slots_kernel` places."""

PACK = 1024
"""Columns that one program of `pack_rows_kernel` copies at a time."""

ORDER = 64
"""Images that one program of `order_images_kernel` places."""

PAIRED = 4
"""Images for every set of experts from which on those of the same set are paired: what is left over computes half a
tile in vain, which is at most half an image for every set. By reckoning, not measured."""


def has_tma(device: torch.device) -> bool:
    """Whether kernels on ``device`` load by descriptors into the blocks of TILES; Triton's interpreter does too."""
    return device.type != "cuda" or architecture(device) == 90


def why_not_aligned(tokens: int, dim: int, hidden: int, dtype: torch.dtype, tma: bool) -> str | None:
    """Why a call can't take the aligned path; None when it can. It depends on nothing that backward sees otherwise.

    Token-wise routing comes as images of one token, so it is among those with fewer than 64.
    """
    if not tma:
        return "descriptors, and the shared memory for its tiles, need compute capability 9 to 11"
    if tokens < BLOCK:
        return f"it needs {BLOCK} tokens an image, got {tokens}"
    for name, width in (("D", dim), ("H", hidden)):
        if width * dtype.itemsize % 16:
            return f"rows must be multiples of 16 bytes, got {name} = {width} of {dtype}"
    return None


def tma_ready(t: Tensor) -> Tensor:
    """``t``, or a contiguous copy of it where a descriptor can't have its address or strides."""
    steps = [stride * t.dtype.itemsize for stride in t.stride()[:-1]]
    right = t.stride(-1) == 1 and all(step > 0 and step % 16 == 0 for step in steps) and t.data_ptr() % 16 == 0
    # Not contiguous(): that keeps whatever strides dimensions of size 1 have.
    return t if right else t.clone(memory_format=torch.contiguous_format)


def pack_rest(t: Tensor, slot_order: Tensor, blocks: int, top_k: int) -> Tensor | None:
    """The first r tokens of ``t [B, N, W]`` in slot order, ``[S*r, W]``; None where r = 0. Few: not a copy of t."""
    B, N, W = t.shape
    rest = N - blocks * BLOCK
    if not rest:
        return None
    packed = t.new_empty((slot_order.shape[0] * rest, W))
    aligned_kernels.pack_rows_kernel[(packed.shape[0],)](
        t, slot_order, packed, rest, top_k, W, t.stride(0), t.stride(1), PACK
    )
    return packed


def fc1(x, slot_order, group_offsets, gates, weight, bias, z, a, blocks, top_k, tiles) -> None:
    """``z`` (or None), ``a [S, N, H]``, with a director ``[S + B, N, H]``, from ``x [B, N, D]``.

    They lie as `fc1_blocks_kernel` says.
    """
    tile = tiles["fc1_blocks", precision(x.dtype), 90]
    S, E, images = slot_order.shape[0], group_offsets.shape[0] - 1, a.shape[0] - slot_order.shape[0]
    num_tiles, meta = _blocks(tile, x, slot_order, E, blocks)
    num_tiles += triton.cdiv(images * x.shape[1], 2 * BLOCK)
    H, D = weight.shape[1:]
    packed = pack_rest(x, slot_order, blocks, top_k)
    aligned_kernels.fc1_blocks_kernel[(num_tiles * triton.cdiv(H, tile.cols),)](
        _box(_tokens(x), BLOCK, tile.depth),
        None if packed is None else _box(packed, BLOCK, tile.depth),
        slot_order,
        group_offsets,
        gates,
        _box(weight, 1, tile.cols, tile.depth),
        bias,
        z,
        a,
        E,
        S,
        images,
        blocks,
        x.shape[1] % BLOCK,
        top_k,
        D,
        H,
        **meta,
    )


def hidden_grad(
    grad_out, slot_order, group_offsets, gates, weight, z, dz, gated, gate_parts, bias_parts, blocks, needs, tiles
) -> None:
    """``dz``, ``gated [S, N, H]`` and parts of sums from ``grad_out [B, N, D]``, see `hidden_grad_blocks_kernel`."""
    tile = tiles["hidden_grad_blocks", precision(grad_out.dtype), 90]
    num_tiles, meta = _blocks(tile, grad_out, slot_order, weight.shape[0], blocks)
    D, H = weight.shape[1:]
    packed = pack_rest(grad_out, slot_order, blocks, gates.shape[1])
    aligned_kernels.hidden_grad_blocks_kernel[(num_tiles * triton.cdiv(H, tile.cols),)](
        _box(_tokens(grad_out), BLOCK, tile.depth),
        None if packed is None else _box(packed, BLOCK, tile.depth),
        gates,
        slot_order,
        group_offsets,
        _box(weight, 1, tile.depth, tile.cols),
        z,
        dz,
        gated,
        gate_parts,
        bias_parts,
        weight.shape[0],
        slot_order.shape[0],
        0 if gate_parts is None else gate_parts.shape[1],
        blocks,
        grad_out.shape[1] % BLOCK,
        gates.shape[1],
        D,
        H,
        *needs,
        **meta,
    )


def invert_slots(slot_order: Tensor, group_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Of every slot: its place in slot_order and its expert, int32 ``[S]``."""
    (S,), E = slot_order.shape, group_offsets.shape[0] - 1
    position, expert = (torch.empty(S, dtype=torch.int32, device=slot_order.device) for _ in range(2))
    to_images_kernels.invert_slots_kernel[(triton.cdiv(S, INVERT),)](
        slot_order, group_offsets, position, expert, E, S, experts_block(E), INVERT
    )
    return position, expert


def in_pairs(images: int, num_experts: int, top_k: int, blocks: int) -> bool:
    """Whether images of the same experts are paired: not where an image's own blocks pair up, see PAIRED otherwise."""
    return blocks % 2 == 1 and images >= PAIRED * math.comb(num_experts, top_k)


def order_images(expert: Tensor, images: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The images sorted by their sets of experts, and of each its number in its set, int32 ``[B]``."""
    order, index = (torch.empty(images, dtype=torch.int32, device=expert.device) for _ in range(2))
    to_images_kernels.order_images_kernel[(triton.cdiv(images, ORDER),)](expert, order, index, images, top_k, ORDER)
    return order, index


def to_images(
    rows_in, weight, transposed, slot_order, group_offsets, gates, bias, out, director_out, blocks, top_k, tiles
):
    """The blocks of ``out [B, N, W]`` from ``rows_in [S, N, depth]``, see `to_images_kernel`.

    weight: ``[E, depth, W]``, transposed ``[E, W, depth]``. With director_out ``[B, N, W]`` the director's rows are
    behind those of rows_in, and its weight behind the experts'.
    Returns what the K choices add to the first r tokens, ``[B, K, r, W]``; None where r = 0.
    """
    B, N, W = out.shape
    S, E, depth = slot_order.shape[0], group_offsets.shape[0] - 1, rows_in.shape[2]
    images, rest = rows_in.shape[0] - S, N - blocks * BLOCK
    pairs = in_pairs(B, E, top_k, blocks)
    kernel, name = to_images_kernels.to_images_kernel, "to_images" if blocks % 2 else "to_images_even"
    if pairs:
        kernel, name = to_images_kernels.pairs_to_images_kernel, "to_images_pairs"
    tile = tiles[name, precision(out.dtype), 90]
    by_slot = out.new_empty((B, top_k, rest, W)) if rest else None
    slots = invert_slots(slot_order, group_offsets)
    image_tiles = B * blocks * BLOCK // (BLOCK if pairs else tile.rows)
    height = 2 * BLOCK if pairs else tile.rows
    num_tiles = image_tiles + triton.cdiv(images * N, height) + max_tiles(S * rest, E, height)
    box = (tile.cols, tile.depth) if transposed else (tile.depth, tile.cols)
    kernel[(num_tiles * triton.cdiv(W, tile.cols),)](
        _box(rows_in.view(-1, depth), BLOCK if pairs else height, tile.depth),
        _box(weight, 1, *box),
        *slots,
        slot_order,
        group_offsets,
        *(order_images(slots[1], B, top_k) if pairs else ()),
        gates,
        bias,
        out,
        by_slot,
        director_out,
        B if pairs else image_tiles,
        S,
        images,
        E,
        blocks,
        rest,
        top_k,
        depth,
        W,
        transposed,
        triton.next_power_of_2(top_k),
        experts_block(E),
        *(() if pairs else (tile.rows,)),
        tile.cols,
        tile.depth,
        2 * GROUP if pairs else GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return by_slot


def to_slots(
    rows_in, weight, transposed, slot_order, group_offsets, gates, bias, out, director_out, blocks, tiles
) -> None:
    """``out [S, N, W]``, slots in their own order, from ``rows_in [S, N, depth]``, see `to_slots_blocks_kernel`.

    weight: ``[E, depth, W]``, transposed ``[E, W, depth]``. director_out: see `to_images`.
    """
    N, depth = rows_in.shape[1:]
    S, E, W = slot_order.shape[0], group_offsets.shape[0] - 1, out.shape[-1]
    images = rows_in.shape[0] - S
    tile = tiles["to_slots_blocks", precision(out.dtype), 90]
    num_tiles = max_tiles(S * blocks, E, 2) + max_tiles(S * (N - blocks * BLOCK), E, 2 * BLOCK)
    num_tiles += triton.cdiv(images * N, 2 * BLOCK)
    box = (tile.cols, tile.depth) if transposed else (tile.depth, tile.cols)
    to_slots_kernels.to_slots_blocks_kernel[(num_tiles * triton.cdiv(W, tile.cols),)](
        _box(rows_in.view(-1, depth), 2 * BLOCK, tile.depth),
        slot_order,
        group_offsets,
        gates,
        _box(weight, 1, *box),
        bias,
        out,
        director_out,
        E,
        S,
        images,
        blocks,
        N - blocks * BLOCK,
        depth,
        W,
        transposed,
        experts_block(E),
        tile.cols,
        tile.depth,
        GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def weight_grad(left, right, gathered, rest, slot_order, group_offsets, out, blocks, top_k, tiles) -> None:
    """``out [E, height, width]``; ``gathered`` is the one of ``left`` and ``right`` that is ``[B, N, .]``.

    The other is ``[S*64q, .]``, and ``rest [S, r, .]`` what it is for the first tokens.
    """
    height, width = out.shape[1:]
    tile = tiles["weight_grad_blocks", precision(left.dtype), 90]
    is_left = gathered is left
    cut = Cut(slot_order.shape[0], out, tile)
    weight_grad_kernels.weight_grad_blocks_kernel[cut.grid](
        _box(left, *(1,) * is_left, BLOCK, tile.rows),
        _box(right, *(1,) * (not is_left), BLOCK, tile.cols),
        slot_order,
        group_offsets,
        left if is_left else rest,
        rest if is_left else right,
        out,
        *cut.arguments,
        blocks,
        gathered.shape[1] % BLOCK,
        top_k,
        height,
        width,
        gathered.stride(0),
        gathered.stride(1),
        is_left,
        cut.experts,
        tile.rows,
        tile.cols,
        tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    cut.add_parts(group_offsets)


def _tokens(t: Tensor) -> Tensor:
    """``[B, N, W]`` as ``[B*N, W]``; a copy where the images of t do not follow one another."""
    return tma_ready(t.flatten(0, 1))


def _box(t: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))


def _blocks(tile: Tile, x: Tensor, slot_order: Tensor, num_experts: int, blocks: int) -> tuple[int, dict[str, int]]:
    """Tiles of two blocks, or of packed rows, that any split over the experts fits in, and how they are compiled."""
    S, rest = slot_order.shape[0], x.shape[1] - blocks * BLOCK
    return max_tiles(S * blocks, num_experts, 2) + max_tiles(S * rest, num_experts, 2 * BLOCK), {
        "HALVES": tile.halves,
        "EXPERTS": experts_block(num_experts),
        "COLS": tile.cols,
        "DEPTH": tile.depth,
        "GROUP": GROUP,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
