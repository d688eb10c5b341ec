"""The launches of the aligned path of `grouped_mlp`. What is computed, and where rows lie: see `aligned_kernels`.

Letters: B images, N tokens, D width, H hidden, E experts, K chosen, S = B*K slots, q blocks of an image, r tokens of it
outside of them.
"""

import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ....records import MLPWeights
from ...triton_common import Tile, experts_block, max_tiles
from ..records import Needs, Saved, Slots
from . import aligned_kernels, to_images_kernels, to_slots_kernels, weight_grad_kernels
from .chunks import Cut
from .plan import BLOCK, HiddenGrads, Plan, Product
from .sums import combine

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


def tma_ready(t: Tensor) -> Tensor:
    """``t``, or a contiguous copy of it where a descriptor can't have its address or strides."""
    steps = [stride * t.dtype.itemsize for stride in t.stride()[:-1]]
    right = t.stride(-1) == 1 and all(step > 0 and step % 16 == 0 for step in steps) and t.data_ptr() % 16 == 0
    # Not contiguous(): that keeps whatever strides dimensions of size 1 have.
    return t if right else t.clone(memory_format=torch.contiguous_format)


def pack_rest(t: Tensor, plan: Plan) -> Tensor | None:
    """The first r tokens of ``t [B, N, W]`` in slot order, ``[S*r, W]``; None where r = 0. Few: not a copy of t."""
    slots, W = plan.slots, t.shape[2]
    if not plan.rest:
        return None
    packed = t.new_empty((slots.num_slots * plan.rest, W))
    aligned_kernels.pack_rows_kernel[(packed.shape[0],)](
        x=t,
        slot_order=slots.slot_order,
        packed=packed,
        rest=plan.rest,
        top_k=slots.top_k,
        dim=W,
        stride_b=t.stride(0),
        stride_n=t.stride(1),
        COLS=PACK,
    )
    return packed


def fc1(x: Tensor, weights: MLPWeights, z: Tensor | None, a: Tensor, plan: Plan) -> None:
    """``z`` (or None), ``a [S, N, H]``, with a director ``[S + B, N, H]``, from ``x [B, N, D]``.

    They lie as `fc1_blocks_kernel` says. In one sum the gates are in a; by slot they are what combines the results.
    """
    slots, tile = plan.slots, plan.tile("fc1_blocks")
    H, D = weights.fc1_weight.shape[1:]
    images = a.shape[0] - slots.num_slots
    num_tiles = _num_tiles(plan) + triton.cdiv(images * plan.tokens, 2 * BLOCK)
    packed = pack_rest(x, plan)
    aligned_kernels.fc1_blocks_kernel[(num_tiles * triton.cdiv(H, tile.cols),)](
        x=box(_tokens(x), BLOCK, tile.depth),
        packed_x=None if packed is None else box(packed, BLOCK, tile.depth),
        slot_order=slots.slot_order,
        offsets=slots.group_offsets,
        gates=slots.gates if plan.one_sum else None,
        weight=box(weights.fc1_weight, 1, tile.cols, tile.depth),
        bias=weights.fc1_bias,
        z=z,
        a=a,
        num_experts=slots.num_experts,
        num_slots=slots.num_slots,
        director_images=images,
        blocks=plan.blocks,
        first_token=plan.rest,
        top_k=slots.top_k,
        dim=D,
        hidden=H,
        TANH=plan.tanh,
        HALVES=tile.halves,
        **_compiled(tile, plan),
    )


def hidden_grad_tile(plan: Plan) -> Tile:
    return plan.tile("hidden_grad_blocks")


def hidden_grad(grad_out: Tensor, saved: Saved, hidden: HiddenGrads, needs: Needs, plan: Plan) -> None:
    """``hidden`` from ``grad_out [B, N, D]``, see `hidden_grad_blocks_kernel`."""
    weight, slots, tile = saved.fc2_weight, plan.slots, hidden_grad_tile(plan)
    D, H = weight.shape[1:]
    packed = pack_rest(grad_out, plan)
    aligned_kernels.hidden_grad_blocks_kernel[(_num_tiles(plan) * triton.cdiv(H, tile.cols),)](
        grad_out=box(_tokens(grad_out), BLOCK, tile.depth),
        packed_grad=None if packed is None else box(packed, BLOCK, tile.depth),
        gates=slots.gates,
        slot_order=slots.slot_order,
        offsets=slots.group_offsets,
        weight=box(weight, 1, tile.depth, tile.cols),
        z=saved.z,
        **hidden._asdict(),
        num_experts=slots.num_experts,
        num_slots=slots.num_slots,
        num_parts=0 if hidden.gate_parts is None else hidden.gate_parts.shape[1],
        blocks=plan.blocks,
        first_token=plan.rest,
        top_k=slots.top_k,
        dim=D,
        hidden=H,
        NEED_DZ=needs.x or needs.weights,
        NEED_GATES=needs.gates,
        NEED_WEIGHTS=needs.weights,
        TANH=plan.tanh,
        HALVES=tile.halves,
        **_compiled(tile, plan),
    )


def to_images(product: Product, plan: Plan) -> None:
    """The results of the product, combined: as one sum an image, or by slot."""
    if plan.one_sum:
        by_slot = sum_choices(product, plan)
        if by_slot is not None:
            combine(by_slot, None, product.out[:, : plan.rest])
    elif plan.slots.top_k == 1:  # a slot is an image: nothing is to be combined
        to_slots(product, product.out, plan)
    else:
        by_slot = product.out.new_empty((product.out.shape[0], plan.slots.top_k, *product.out.shape[1:]))
        to_slots(product._replace(gates=None), by_slot, plan)
        combine(by_slot, product.gates, product.out)


def invert_slots(slots: Slots) -> tuple[Tensor, Tensor]:
    """Of every slot: its place in slot_order and its expert, int32 ``[S]``."""
    S = slots.num_slots
    position, expert = (torch.empty(S, dtype=torch.int32, device=slots.slot_order.device) for _ in range(2))
    to_images_kernels.invert_slots_kernel[(triton.cdiv(S, INVERT),)](
        slot_order=slots.slot_order,
        offsets=slots.group_offsets,
        position=position,
        expert=expert,
        num_experts=slots.num_experts,
        num_slots=S,
        EXPERTS=experts_block(slots.num_experts),
        SLOTS=INVERT,
    )
    return position, expert


def in_pairs(images: int, num_experts: int, top_k: int, blocks: int) -> bool:
    """Whether images of the same experts are paired: not where an image's own blocks pair up, see PAIRED otherwise."""
    return blocks % 2 == 1 and images >= PAIRED * math.comb(num_experts, top_k)


def order_images(expert: Tensor, images: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The images sorted by their sets of experts, and of each its number in its set, int32 ``[B]``."""
    order, index = (torch.empty(images, dtype=torch.int32, device=expert.device) for _ in range(2))
    to_images_kernels.order_images_kernel[(triton.cdiv(images, ORDER),)](
        expert=expert, order=order, index=index, num_images=images, top_k=top_k, IMAGES=ORDER
    )
    return order, index


def sum_choices(product: Product, plan: Plan) -> Tensor | None:
    """The blocks of ``out [B, N, W]``: K products are one sum, see `to_images_kernel` and `pairs_to_images_kernel`.

    Returns what the K choices add to the first r tokens, ``[B, K, r, W]``; None where r = 0.
    """
    out, slots = product.out, plan.slots
    B, N, W = out.shape
    S, depth = slots.num_slots, product.rows_in.shape[2]
    images = product.rows_in.shape[0] - S
    pairs = in_pairs(B, slots.num_experts, slots.top_k, plan.blocks)
    tile = plan.tile("to_images_pairs" if pairs else "to_images" if plan.blocks % 2 else "to_images_even")
    height = 2 * BLOCK if pairs else tile.rows
    image_tiles = B * plan.blocks * BLOCK // (BLOCK if pairs else height)
    num_tiles = image_tiles + triton.cdiv(images * N, height) + max_tiles(S * plan.rest, slots.num_experts, height)
    by_slot = out.new_empty((B, slots.top_k, plan.rest, W)) if plan.rest else None
    position, expert = invert_slots(slots)
    arguments = {
        "rows_in": box(product.rows_in.view(-1, depth), BLOCK if pairs else height, tile.depth),
        "weight": _expert_boxes(product, tile),
        "position": position,
        "expert": expert,
        "slot_order": slots.slot_order,
        "offsets": slots.group_offsets,
        "gates": product.gates,
        "bias": product.bias,
        "out": out,
        "by_slot": by_slot,
        "director_out": product.director_out,
        "num_slots": S,
        "director_images": images,
        "num_experts": slots.num_experts,
        "blocks": plan.blocks,
        "first_token": plan.rest,
        "top_k": slots.top_k,
        "depth": depth,
        "width": W,
        "TRANSPOSED": product.transposed,
        "CHOICES": triton.next_power_of_2(slots.top_k),
    } | _compiled(tile, plan)
    grid = (num_tiles * triton.cdiv(W, tile.cols),)
    if pairs:
        order, index = order_images(expert, B, slots.top_k)
        arguments["GROUP"] = 2 * GROUP
        to_images_kernels.pairs_to_images_kernel[grid](order=order, index=index, num_images=B, **arguments)
    else:
        to_images_kernels.to_images_kernel[grid](image_tiles=image_tiles, ROWS=tile.rows, **arguments)
    return by_slot


def to_slots(product: Product, by_slot: Tensor, plan: Plan) -> None:
    """``by_slot [S, N, W]``, slots in their own order, see `to_slots_blocks_kernel`; the gates of each are in it."""
    slots, depth, W = plan.slots, product.rows_in.shape[2], by_slot.shape[-1]
    images, tile = product.rows_in.shape[0] - slots.num_slots, plan.tile("to_slots_blocks")
    num_tiles = _num_tiles(plan) + triton.cdiv(images * plan.tokens, 2 * BLOCK)
    to_slots_kernels.to_slots_blocks_kernel[(num_tiles * triton.cdiv(W, tile.cols),)](
        rows_in=box(product.rows_in.view(-1, depth), 2 * BLOCK, tile.depth),
        slot_order=slots.slot_order,
        offsets=slots.group_offsets,
        gates=product.gates,
        weight=_expert_boxes(product, tile),
        bias=product.bias,
        out=by_slot,
        director_out=product.director_out,
        num_experts=slots.num_experts,
        num_slots=slots.num_slots,
        director_images=images,
        blocks=plan.blocks,
        first_token=plan.rest,
        depth=depth,
        width=W,
        TRANSPOSED=product.transposed,
        **_compiled(tile, plan),
    )


def weight_grads(grad_out: Tensor, x: Tensor, hidden: HiddenGrads, dweights: MLPWeights, plan: Plan) -> None:
    """Those of fc1 and fc2 of ``dweights``."""
    gated, gated_rest = split(hidden.gated, plan)
    dz, dz_rest = split(hidden.dz, plan)
    weight_grad(grad_out, gated, grad_out, gated_rest, dweights.fc2_weight, plan)
    weight_grad(dz, x, x, dz_rest, dweights.fc1_weight, plan)


def split(t: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """How ``t [S, N, H]`` lies: the rows of the blocks ``[S*64q, H]``, then the packed ``[S, r, H]``; slot order."""
    S, _, H = t.shape
    of_blocks, of_rest = t.view(-1).split((S * plan.blocks * BLOCK * H, S * plan.rest * H))
    return of_blocks.view(-1, H), of_rest.view(S, plan.rest, H)


def weight_grad(left: Tensor, right: Tensor, gathered: Tensor, rest: Tensor, out: Tensor, plan: Plan) -> None:
    """``out [E, height, width]``; ``gathered`` is the one of ``left`` and ``right`` that is ``[B, N, .]``.

    The other is ``[S*64q, .]``, and ``rest [S, r, .]`` what it is for the first tokens.
    """
    height, width = out.shape[1:]
    slots, tile = plan.slots, plan.tile("weight_grad_blocks")
    is_left = gathered is left
    cut = Cut(slots.num_slots, out, tile)
    weight_grad_kernels.weight_grad_blocks_kernel[cut.grid](
        left=box(left, *(1,) * is_left, BLOCK, tile.rows),
        right=box(right, *(1,) * (not is_left), BLOCK, tile.cols),
        slot_order=slots.slot_order,
        offsets=slots.group_offsets,
        left_rest=left if is_left else rest,
        right_rest=rest if is_left else right,
        out=out,
        parts=cut.parts,
        num_experts=slots.num_experts,
        most=cut.most,
        blocks=plan.blocks,
        first_token=plan.rest,
        top_k=slots.top_k,
        height=height,
        width=width,
        stride_b=gathered.stride(0),
        stride_n=gathered.stride(1),
        GATHER_LEFT=is_left,
        EXPERTS=plan.experts_block,
        ROWS=tile.rows,
        COLS=tile.cols,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    cut.add_parts(slots.group_offsets)


def box(t: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))


def _tokens(t: Tensor) -> Tensor:
    """``[B, N, W]`` as ``[B*N, W]``; a copy where the images of t do not follow one another."""
    return tma_ready(t.flatten(0, 1))


def _expert_boxes(product: Product, tile: Tile) -> TensorDescriptor:
    """As `expert_block` reads them."""
    block = (tile.cols, tile.depth) if product.transposed else (tile.depth, tile.cols)
    return box(product.weight, 1, *block)


def _num_tiles(plan: Plan) -> int:
    """Tiles of two blocks, and of packed rows, that any split over the experts fits in."""
    S, E = plan.slots.num_slots, plan.slots.num_experts
    return max_tiles(S * plan.blocks, E, 2) + max_tiles(S * plan.rest, E, 2 * BLOCK)


def _compiled(tile: Tile, plan: Plan) -> dict[str, int]:
    """How a kernel is compiled."""
    return {
        "EXPERTS": plan.experts_block,
        "COLS": tile.cols,
        "DEPTH": tile.depth,
        "GROUP": GROUP,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
