"""The small sums of `grouped_mlp`: combined choices, and the gradients of gates and biases. Kernels: `sum_kernels`."""

import torch
import triton
from torch import Tensor

from ..records import Slots
from .plan import HiddenGrads, Plan
from .sum_kernels import bias1_grad_kernel, bias2_grad_kernel, combine_kernel, gate_grad_kernel, image_sum_kernel

SUM_ROWS, SUM_COLS = 32, 64
"""Block of the column sums (bias gradients)."""

COMBINE = 1024
"""Elements of one image that one program combines."""

GATE_BLOCK = 512
"""Parts, then elements of a bias, that one program of `gate_grad_kernel` adds at a time."""


def combine(by_slot: Tensor, gates: Tensor | None, out: Tensor) -> None:
    """``out [B, N, D] = sum_k by_slot [B, K, N, D]``, by ``gates [B, K]`` if given; an image of out is dense."""
    B, K, N, D = by_slot.shape
    combine_kernel[(B, triton.cdiv(N * D, COMBINE))](
        by_slot=by_slot,
        gates=gates,
        out=out,
        size=N * D,
        stride_ob=out.stride(0),
        top_k=K,
        HAS_GATES=gates is not None,
        BLOCK=COMBINE,
    )


def image_sums(grad_out: Tensor) -> Tensor:
    """``grad_out [B, N, D]`` summed over the tokens, float32 ``[B, D]``."""
    B, N, D = grad_out.shape
    sums = torch.empty((B, D), dtype=torch.float32, device=grad_out.device)
    image_sum_kernel[(B, triton.cdiv(D, SUM_COLS))](
        grad_out=grad_out,
        sums=sums,
        tokens=N,
        dim=D,
        stride_gb=grad_out.stride(0),
        stride_gn=grad_out.stride(1),
        SUM_ROWS=SUM_ROWS,
        SUM_COLS=SUM_COLS,
    )
    return sums


def gate_grad(hidden: HiddenGrads, sums: Tensor, fc2_bias: Tensor, dgates: Tensor, plan: Plan) -> None:
    """``dgates [B, K]`` from the parts of each slot, and from the bias's share."""
    slots = plan.slots
    gate_grad_kernel[(slots.num_slots,)](
        gate_parts=hidden.gate_parts,
        sums=sums,
        slot_order=slots.slot_order,
        offsets=slots.group_offsets,
        bias=fc2_bias,
        dgates=dgates,
        num_experts=slots.num_experts,
        num_parts=hidden.gate_parts.shape[1],
        top_k=slots.top_k,
        dim=sums.shape[1],
        EXPERTS=plan.experts_block,
        BLOCK=GATE_BLOCK,
    )


def bias1_grad(hidden: HiddenGrads, tile_rows: int, dbias: Tensor, plan: Plan) -> None:
    """``dbias [E, H]`` from the parts of every block, and of every tile of ``tile_rows`` of the other rows."""
    (E, H), of_blocks = dbias.shape, plan.slots.num_slots * plan.blocks
    bias1_grad_kernel[(E, triton.cdiv(H, SUM_COLS))](
        block_parts=hidden.bias_parts[:of_blocks],
        tile_parts=hidden.bias_parts[of_blocks:],
        offsets=plan.slots.group_offsets,
        out=dbias,
        num_experts=E,
        blocks=plan.blocks,
        tokens=plan.rest,
        hidden=H,
        TILE_ROWS=tile_rows,
        EXPERTS=plan.experts_block,
        SUM_ROWS=SUM_ROWS,
        SUM_COLS=SUM_COLS,
    )


def bias2_grad(sums: Tensor, slots: Slots, dbias: Tensor) -> None:
    """``dbias [E, D]``, from the sums of the images by their gates."""
    E, D = dbias.shape
    bias2_grad_kernel[(E, triton.cdiv(D, SUM_COLS))](
        sums=sums,
        gates=slots.gates,
        slot_order=slots.slot_order,
        offsets=slots.group_offsets,
        out=dbias,
        top_k=slots.top_k,
        dim=D,
        SUM_ROWS=SUM_ROWS,
        SUM_COLS=SUM_COLS,
    )
