"""The experts' MLPs in Triton, row-gather path: any N, D, H and token-wise routing.

Letters: B images, N tokens, D width, H hidden, E experts, K chosen, S = B*K slots. Rows: see `common`.
Every product gathers its rows by pointer, so a tile may mix images; it never mixes experts. Grids are upper bounds
known from shapes, and nothing is added in an order that changes: the bits of a result depend on the inputs alone.
"""

import torch
import triton
from torch import Tensor

from .common import MAX_ROWS, Tile, architecture, check_dtype, experts_block, max_tiles, on_device, precision, unit_rows
from .mlp_kernels import (
    bias1_grad_kernel,
    bias2_grad_kernel,
    combine_kernel,
    fc1_kernel,
    gate_grad_kernel,
    image_sum_kernel,
    to_hidden_grad_kernel,
    to_slots_kernel,
    weight_grad_kernel,
)

TILES = {
    ("fc1", "half", 80): Tile(128, 128, 32, 8, 4),
    ("fc1", "half", 90): Tile(128, 128, 64, 8, 4),
    ("fc1", "float", 80): Tile(64, 64, 16, 4, 3),
    ("fc1", "float", 90): Tile(64, 64, 16, 4, 3),
    ("to_slots", "half", 80): Tile(128, 128, 32, 8, 4),
    ("to_slots", "half", 90): Tile(128, 128, 64, 8, 4),
    ("to_slots", "float", 80): Tile(64, 64, 16, 4, 3),
    ("to_slots", "float", 90): Tile(64, 64, 16, 4, 3),
    ("to_hidden_grad", "half", 80): Tile(128, 128, 32, 8, 4, halves=True),
    ("to_hidden_grad", "half", 90): Tile(128, 128, 64, 8, 4, halves=True),
    ("to_hidden_grad", "float", 80): Tile(64, 64, 16, 4, 3),
    ("to_hidden_grad", "float", 90): Tile(64, 64, 16, 4, 3),
    ("weight_grad", "half", 80): Tile(128, 128, 32, 8, 6),
    ("weight_grad", "half", 90): Tile(128, 128, 64, 8, 7),
    ("weight_grad", "float", 80): Tile(64, 64, 16, 4, 3),
    ("weight_grad", "float", 90): Tile(64, 64, 16, 4, 3),
}
"""(kernel, precision, architecture) -> tile. No tile needs more than 99 KB on 80, which 8.6 and 8.9 share.
weight_grad counts more stages than it has buffers: in its loop the loads of slot numbers take stages of their own."""

GROUP = 8
"""Row tiles that walk the columns together, see `cut_in_groups`."""

SUM_ROWS, SUM_COLS = 32, 64
"""Block of the column sums (bias gradients)."""

COMBINE = 1024
"""Elements of one image that one program combines."""


def grouped_mlp_forward(
    x: Tensor,
    gates: Tensor,
    slot_order: Tensor,
    group_offsets: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    save: bool = True,
    *,
    tiles: dict[tuple[str, str, int], Tile] = TILES,
) -> tuple[Tensor, Tensor]:
    """`dexkernels.reference.grouped_mlp_forward` on a GPU: ``out [B, N, D]`` and ``z [S, N, H]`` in slot order.

    Without ``save`` z is ``[0, N, H]``.

    Besides the results it holds ``a = gelu(z) [S, N, H]`` and the slots' outputs ``[S, N, D]`` while it runs.
    """
    B, N, D, H, E, K = _sizes(x, gates, fc1_weight)
    S = slot_order.shape[0]
    out, z = x.new_empty((B, N, D)), x.new_empty((S, N, H))
    if out.numel() == 0:
        return out, z if save else x.new_empty((0, N, H))
    x, fc1_weight, fc2_weight = unit_rows(x), unit_rows(fc1_weight), unit_rows(fc2_weight)
    gates, slot_order, group_offsets = gates.contiguous(), slot_order.contiguous(), group_offsets.contiguous()
    a, by_slot = torch.empty_like(z), x.new_empty((B, K, N, D))
    with on_device(x):
        tile = tiles["fc1", precision(x.dtype), architecture(x.device)]
        fc1_kernel[(max_tiles(S * N, E, tile.rows) * triton.cdiv(H, tile.cols),)](
            x,
            slot_order,
            group_offsets,
            fc1_weight,
            fc1_bias.contiguous(),
            z,
            a,
            E,
            N,
            K,
            D,
            H,
            x.stride(0),
            x.stride(1),
            fc1_weight.stride(0),
            fc1_weight.stride(1),
            experts_block(E),
            **_meta(tile),
            GROUP=GROUP,
        )
        _to_slots(a, slot_order, group_offsets, fc2_weight.mT, fc2_bias.contiguous(), by_slot, tiles)
        _combine(by_slot, gates, out)
    return out, z if save else x.new_empty((0, N, H))


def grouped_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    gates: Tensor,
    slot_order: Tensor,
    group_offsets: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    z: Tensor,
    need_x: bool = True,
    need_gates: bool = True,
    need_weights: bool = True,
    *,
    tiles: dict[tuple[str, str, int], Tile] = TILES,
) -> tuple[Tensor | None, ...]:
    """`dexkernels.reference.grouped_mlp_backward` on a GPU: gradients of x, gates, fc1_weight, fc1_bias, fc2_weight,
    fc2_bias; None for what is not needed. While it runs it holds at most ``dz`` and ``g gelu(z)``, each ``[S, N, H]``.
    """
    B, N, D, H, E, K = _sizes(x, gates, fc1_weight)
    S = slot_order.shape[0]
    dx = x.new_empty((B, N, D)) if need_x else None
    dgates = gates.new_empty(gates.shape) if need_gates else None
    dweights = (None, None, None, None)
    if need_weights:
        dweights = tuple(fc1_weight.new_empty(shape) for shape in ((E, H, D), (E, H), (E, D, H), (E, D)))
    if B * N == 0:
        for t in (dgates, *dweights):
            if t is not None:
                t.zero_()
        return dx, dgates, *dweights
    grad_out, x, z = unit_rows(grad_out), unit_rows(x), z.contiguous()
    fc1_weight, fc2_weight = unit_rows(fc1_weight), unit_rows(fc2_weight)
    gates, slot_order, group_offsets = gates.contiguous(), slot_order.contiguous(), group_offsets.contiguous()
    arch, kind = architecture(x.device), precision(x.dtype)
    tile = tiles["to_hidden_grad", kind, arch]
    num_tiles, num_parts = max_tiles(S * N, E, tile.rows), triton.cdiv(H, tile.cols)
    float32 = {"dtype": torch.float32, "device": x.device}
    dz = torch.empty_like(z) if need_x or need_weights else None
    gated = torch.empty_like(z) if need_weights else None
    bias_parts = torch.empty((num_tiles, H), **float32) if need_weights else None
    gate_parts = torch.empty((num_parts, S * N), **float32) if need_gates else None
    with on_device(x):
        to_hidden_grad_kernel[(num_tiles * num_parts,)](
            grad_out,
            gates,
            slot_order,
            group_offsets,
            fc2_weight,
            z,
            dz,
            gated,
            gate_parts,
            bias_parts,
            E,
            S * N,
            N,
            K,
            D,
            H,
            grad_out.stride(0),
            grad_out.stride(1),
            fc2_weight.stride(0),
            fc2_weight.stride(1),
            need_x or need_weights,
            need_gates,
            need_weights,
            tile.halves,
            experts_block(E),
            **_meta(tile),
            GROUP=GROUP,
        )
        if need_gates or need_weights:
            sums = torch.empty((B, D), **float32)
            image_sum_kernel[(B, triton.cdiv(D, SUM_COLS))](
                grad_out, sums, N, D, grad_out.stride(0), grad_out.stride(1), SUM_ROWS, SUM_COLS
            )
        if need_gates:
            gate_grad_kernel[(S,)](
                gate_parts,
                sums,
                slot_order,
                group_offsets,
                fc2_bias.contiguous(),
                dgates,
                E,
                S * N,
                num_parts,
                N,
                K,
                D,
                experts_block(E),
                512,
            )
        if need_weights:
            dfc1, dbias1, dfc2, dbias2 = dweights
            bias1_grad_kernel[(E, triton.cdiv(H, SUM_COLS))](
                bias_parts, group_offsets, dbias1, E, N, H, tile.rows, experts_block(E), SUM_ROWS, SUM_COLS
            )
            bias2_grad_kernel[(E, triton.cdiv(D, SUM_COLS))](
                sums, gates, slot_order, group_offsets, dbias2, K, D, SUM_ROWS, SUM_COLS
            )
            _weight_grad(grad_out, gated, grad_out, slot_order, group_offsets, dfc2, K, tiles)
            _weight_grad(dz, x, x, slot_order, group_offsets, dfc1, K, tiles)
        if need_x:
            by_slot = x.new_empty((B, K, N, D))
            _to_slots(dz, slot_order, group_offsets, fc1_weight, None, by_slot, tiles)
            _combine(by_slot, None, dx)
    return dx, dgates, *dweights


def _sizes(x: Tensor, gates: Tensor, fc1_weight: Tensor) -> tuple[int, ...]:
    """B, N, D, H, E, K, after the checks that are this backend's own."""
    check_dtype("x", x)
    (B, N, D), (E, H, _), K = x.shape, fc1_weight.shape, gates.shape[1]
    if D == 0 or H == 0:
        raise ValueError(f"fc1_weight: expected D and H of at least 1, got {list(fc1_weight.shape)}")
    if B * N * K > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows B*N*K, got {B * N * K}")
    return B, N, D, H, E, K


def _meta(tile: Tile) -> dict[str, int]:
    return {
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "DEPTH": tile.depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _to_slots(rows_in, slot_order, group_offsets, weight, bias, out, tiles) -> None:
    """``out [B, K, N, W] = rows_in [S, N, depth] @ weight [E, depth, W] (+ bias [E, W])``, see `to_slots_kernel`."""
    E, depth, width = weight.shape
    S, N, _ = rows_in.shape
    tile = tiles["to_slots", precision(out.dtype), architecture(out.device)]
    to_slots_kernel[(max_tiles(S * N, E, tile.rows) * triton.cdiv(width, tile.cols),)](
        rows_in,
        slot_order,
        group_offsets,
        weight,
        bias,
        out,
        E,
        N,
        depth,
        width,
        *weight.stride(),
        bias is not None,
        experts_block(E),
        **_meta(tile),
        GROUP=GROUP,
    )


def _combine(by_slot: Tensor, gates: Tensor | None, out: Tensor) -> None:
    """``out [B, N, D] = sum_k by_slot [B, K, N, D]``, weighted by ``gates [B, K]`` when given."""
    B, K, N, D = by_slot.shape
    grid = (B, triton.cdiv(N * D, COMBINE))
    combine_kernel[grid](by_slot, gates, out, N * D, K, gates is not None, COMBINE)


def _weight_grad(left, right, gathered, slot_order, group_offsets, out, top_k, tiles) -> None:
    """``out [E, height, width]``; ``gathered`` is the one of ``left`` and ``right`` that is ``[B, N, .]``."""
    E, height, width = out.shape
    tile = tiles["weight_grad", precision(out.dtype), architecture(out.device)]
    weight_grad_kernel[(E * triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.cols),)](
        left,
        right,
        slot_order,
        group_offsets,
        out,
        gathered.shape[1],
        top_k,
        height,
        width,
        gathered.stride(0),
        gathered.stride(1),
        gathered is left,
        **_meta(tile),
    )
