"""The launches of the gather path of `grouped_mlp`: any N, D, H and token-wise routing. Kernels: `gather_kernels`."""

import triton
from torch import Tensor

from ....records import MLPWeights
from ...triton_common import Tile, max_tiles
from ..records import Needs, Saved
from .chunks import Cut
from .gather_kernels import fc1_kernel, to_hidden_grad_kernel, to_slots_kernel
from .plan import HiddenGrads, Plan, Product
from .sums import combine
from .weight_grad_kernels import weight_grad_kernel

GROUP = 8
"""Row tiles that walk the columns together, see `cut_in_groups`."""


def fc1(x: Tensor, weights: MLPWeights, z: Tensor | None, a: Tensor, plan: Plan) -> None:
    """``z`` (or None) and ``a [S, N, H]``, with a director ``[S + B, N, H]``, of ``x [B, N, D]``, see `fc1_kernel`."""
    weight, slots = weights.fc1_weight, plan.slots
    H, D = weight.shape[1:]
    tile, images = plan.tile("fc1"), a.shape[0] - slots.num_slots
    fc1_kernel[(_num_tiles(tile, images, plan) * triton.cdiv(H, tile.cols),)](
        x=x,
        slot_order=slots.slot_order,
        offsets=slots.group_offsets,
        weight=weight,
        bias=weights.fc1_bias,
        z=z,
        a=a,
        num_experts=slots.num_experts,
        num_slots=slots.num_slots,
        director_images=images,
        tokens=plan.tokens,
        top_k=slots.top_k,
        dim=D,
        hidden=H,
        stride_xb=x.stride(0),
        stride_xn=x.stride(1),
        stride_we=weight.stride(0),
        stride_wh=weight.stride(1),
        TANH=plan.tanh,
        GROUP=GROUP,
        **_compiled(tile, plan),
    )


def to_images(product: Product, plan: Plan) -> None:
    """``out [B, N, W] = sum_k g_k (rows_in [S, N, depth] @ weight [E, depth, W] + bias [E, W])``, by slot."""
    B, N, W = product.out.shape
    by_slot = product.out.new_empty((B, plan.slots.top_k, N, W))
    to_slots(product, by_slot, plan)
    combine(by_slot, product.gates, product.out)


def to_slots(product: Product, by_slot: Tensor, plan: Plan) -> None:
    """``by_slot [B, K, N, W] = rows_in [S, N, depth] @ weight [E, depth, W] (+ bias)``, see `to_slots_kernel`."""
    weight = product.weight.mT if product.transposed else product.weight
    slots, tile = plan.slots, plan.tile("to_slots")
    depth, width = weight.shape[1:]
    images = product.rows_in.shape[0] - slots.num_slots
    to_slots_kernel[(_num_tiles(tile, images, plan) * triton.cdiv(width, tile.cols),)](
        rows_in=product.rows_in,
        slot_order=slots.slot_order,
        offsets=slots.group_offsets,
        weight=weight,
        bias=product.bias,
        out=by_slot,
        director_out=product.director_out,
        num_experts=slots.num_experts,
        num_slots=slots.num_slots,
        director_images=images,
        tokens=plan.tokens,
        depth=depth,
        width=width,
        stride_we=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_wj=weight.stride(2),
        HAS_BIAS=product.bias is not None,
        GROUP=GROUP,
        **_compiled(tile, plan),
    )


def hidden_grad_tile(plan: Plan) -> Tile:
    return plan.tile("to_hidden_grad")


def hidden_grad(grad_out: Tensor, saved: Saved, hidden: HiddenGrads, needs: Needs, plan: Plan) -> None:
    """``hidden`` from ``grad_out [B, N, D]``, see `to_hidden_grad_kernel`."""
    weight, slots, tile = saved.fc2_weight, plan.slots, hidden_grad_tile(plan)
    D, H = weight.shape[1:]
    to_hidden_grad_kernel[(_num_tiles(tile, 0, plan) * triton.cdiv(H, tile.cols),)](
        grad_out=grad_out,
        gates=slots.gates,
        slot_order=slots.slot_order,
        offsets=slots.group_offsets,
        weight=weight,
        z=saved.z,
        **hidden._asdict(),
        num_experts=slots.num_experts,
        num_parts=0 if hidden.gate_parts is None else hidden.gate_parts.shape[1],
        tokens=plan.tokens,
        top_k=slots.top_k,
        dim=D,
        hidden=H,
        stride_gb=grad_out.stride(0),
        stride_gn=grad_out.stride(1),
        stride_we=weight.stride(0),
        stride_wd=weight.stride(1),
        NEED_DZ=needs.x or needs.weights,
        NEED_GATES=needs.gates,
        NEED_WEIGHTS=needs.weights,
        TANH=plan.tanh,
        HALVES=tile.halves,
        GROUP=GROUP,
        **_compiled(tile, plan),
    )


def weight_grads(grad_out: Tensor, x: Tensor, hidden: HiddenGrads, dweights: MLPWeights, plan: Plan) -> None:
    """Those of fc1 and fc2 of ``dweights``."""
    weight_grad(grad_out, hidden.gated, grad_out, dweights.fc2_weight, plan)
    weight_grad(hidden.dz, x, x, dweights.fc1_weight, plan)


def weight_grad(left: Tensor, right: Tensor, gathered: Tensor, out: Tensor, plan: Plan) -> None:
    """``out [E, height, width]``; ``gathered`` is the one of ``left`` and ``right`` that is ``[B, N, .]``."""
    height, width = out.shape[1:]
    tile, slots = plan.tile("weight_grad"), plan.slots
    cut = Cut(slots.num_slots, out, tile)
    weight_grad_kernel[cut.grid](
        left=left,
        right=right,
        slot_order=slots.slot_order,
        offsets=slots.group_offsets,
        out=out,
        parts=cut.parts,
        num_experts=slots.num_experts,
        most=cut.most,
        tokens=plan.tokens,
        top_k=slots.top_k,
        height=height,
        width=width,
        stride_b=gathered.stride(0),
        stride_n=gathered.stride(1),
        GATHER_LEFT=gathered is left,
        **_compiled(tile, plan),
    )
    cut.add_parts(slots.group_offsets)


def _num_tiles(tile: Tile, director_images: int, plan: Plan) -> int:
    """Row tiles that any split over the experts fits in, and those of the director."""
    rows = plan.slots.num_slots * plan.tokens
    return max_tiles(rows, plan.slots.num_experts, tile.rows) + triton.cdiv(director_images * plan.tokens, tile.rows)


def _compiled(tile: Tile, plan: Plan) -> dict[str, int]:
    """How a kernel is compiled."""
    return {
        "EXPERTS": plan.experts_block,
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "DEPTH": tile.depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
