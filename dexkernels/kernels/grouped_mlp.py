"""The experts' MLPs in Triton, on two paths, of which `choose_path` picks one by shapes, dtype and device alone.

Letters: B images, N tokens, D width, H hidden, E experts, K chosen, S = B*K slots. Rows: see `common`.
``gather``: any N, D, H and token-wise routing. Every product gathers its rows by pointer, so a tile may mix images.
``aligned``: see `aligned_kernels`. An image's blocks of 64 tokens are loaded by descriptors, the rest is packed.
No tile mixes experts. Grids are upper bounds known from shapes, and nothing is added in an order that changes: the bits
of a result depend on the inputs alone.
"""

import torch
import triton
from torch import Tensor

from ..reference import has_director
from . import aligned
from .chunks import Cut
from .common import MAX_ROWS, Tile, architecture, check_dtype, experts_block, max_tiles, on_device, precision, unit_rows
from .configurations import path_of, shape_class, tiles_of
from .mlp_kernels import (
    bias1_grad_kernel,
    bias2_grad_kernel,
    combine_kernel,
    fc1_kernel,
    gate_grad_kernel,
    image_sum_kernel,
    to_hidden_grad_kernel,
    to_slots_kernel,
)
from .weight_grad_kernels import weight_grad_kernel

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
    **aligned.TILES,
}
"""(kernel, precision, architecture) -> tile. No tile needs more than 99 KB on 80, which 8.6 and 8.9 share.
weight_grad counts more stages than it has buffers: in its loop the loads of slot numbers take stages of their own."""

PATH = {(80, "half"): "gather", (80, "float"): "gather", (90, "half"): "gather", (90, "float"): "gather"}
"""(architecture, precision) -> the path that is taken where it applies. Only (90, half) has tiles of the aligned one,
and until they are measured on a GPU it must be asked for."""

ONE_SUM = 16
"""Experts up to which the K > 1 results of an image are one sum in `aligned.to_images`; with more, images that run
beside one another share few experts, and results by slot reuse the weights better. By reckoning, not measured."""

GROUP = 8
"""Row tiles that walk the columns together, see `cut_in_groups`."""

SUM_ROWS, SUM_COLS = 32, 64
"""Block of the column sums (bias gradients)."""

COMBINE = 1024
"""Elements of one image that one program combines."""


def choose_path(
    path: str | None,
    tokens: int,
    dim: int,
    hidden: int,
    dtype: torch.dtype,
    arch: int,
    tma: bool,
    measured: str | None = None,
) -> str:
    """``"gather"`` or ``"aligned"``: the path asked for, or what was ``measured`` or PATH says, where it applies.

    Raises ValueError with the reason when the aligned path is asked for and can't be taken.
    """
    if path not in (None, "gather", "aligned"):
        raise ValueError(f"path: expected 'gather', 'aligned' or None, got {path!r}")
    wanted = path or measured or PATH[arch, precision(dtype)]
    reason = aligned.why_not_aligned(tokens, dim, hidden, dtype, tma) if wanted == "aligned" else None
    if reason and path:
        raise ValueError(f"path: 'aligned' cannot be taken: {reason}")
    return "gather" if reason else wanted


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
    path: str | None = None,
    tiles: dict[tuple[str, str, int], Tile] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dexkernels.reference.grouped_mlp_forward` on a GPU: ``out``, ``z`` for the backward, and the director's output.

    What lies where in ``z [S, N, H]`` is the path's affair: see `_split`. A director whose weights stand behind the
    experts' is one more expert of the same launches, which every image takes; of it nothing is saved.
    ``path``: see `choose_path`; for tests and benchmarks, which give the backward the same.

    Besides the results it holds ``a [S, N, H]``, the director's ``[B, N, H]`` behind it and, of the tokens outside the
    blocks, inputs and outputs by slot; with more than ONE_SUM experts and K > 1 the outputs of all tokens.
    """
    B, N, D, H, E, K = _sizes(x, gates, group_offsets, fc1_weight)
    S, kind = slot_order.shape[0], shape_class(slot_order.shape[0] * N, E)
    tiles = tiles_of(kind, TILES) if tiles is None else tiles
    blocks = _num_blocks(path, x, H, tiles, path_of(kind, x.dtype, x.device))
    images = B if has_director(fc1_weight, group_offsets) else 0
    out, director_out = x.new_empty((B, N, D)), x.new_empty((images, N, D))
    z = x.new_empty((S if save else 0, N, H))
    if out.numel() == 0:
        return out, z, director_out
    ready = aligned.tma_ready if blocks else unit_rows
    x, fc1_weight, fc2_weight = ready(x), ready(fc1_weight), ready(fc2_weight)
    gates, slot_order, group_offsets = gates.contiguous(), slot_order.contiguous(), group_offsets.contiguous()
    fc1_bias, fc2_bias = fc1_bias.contiguous(), fc2_bias.contiguous()
    to_z, a = z if save else None, x.new_empty((S + images, N, H))
    order, rest = (slot_order, group_offsets), N - blocks * aligned.BLOCK
    to_director = director_out if images else None
    with on_device(x):
        if not blocks:
            _fc1(x, *order, fc1_weight, fc1_bias, to_z, a, K, tiles)
            _through_slots(a, *order, fc2_weight.mT, fc2_bias, gates, out, to_director, tiles)
        elif 1 < K and E <= ONE_SUM:
            # In one sum the gates are in a; by slot they are what combines the results.
            aligned.fc1(x, *order, gates, fc1_weight, fc1_bias, to_z, a, blocks, K, tiles)
            by_slot = aligned.to_images(
                a, fc2_weight, True, *order, gates, fc2_bias, out, to_director, blocks, K, tiles
            )
            if rest:
                _combine(by_slot, None, out[:, :rest])
        else:
            aligned.fc1(x, *order, None, fc1_weight, fc1_bias, to_z, a, blocks, K, tiles)
            _through_slots_of_blocks(a, fc2_weight, True, *order, gates, fc2_bias, out, to_director, blocks, tiles)
    return out, z, director_out


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
    grad_dtype: torch.dtype | None = None,
    *,
    path: str | None = None,
    tiles: dict[tuple[str, str, int], Tile] | None = None,
) -> tuple[Tensor | None, ...]:
    """`dexkernels.reference.grouped_mlp_backward` on a GPU: gradients of x, gates, fc1_weight, fc1_bias, fc2_weight,
    fc2_bias; None for what is not needed, those of the weights in ``grad_dtype`` (None: the weights' own).

    While it runs it holds at most ``dz`` and ``g gelu(z)``, each ``[S, N, H]``, which lie as z does, and the parts of
    sums: of the weight gradients see `chunks.Cut`.
    """
    B, N, D, H, E, K = _sizes(x, gates, group_offsets, fc1_weight)
    S, kind = slot_order.shape[0], shape_class(slot_order.shape[0] * N, E)
    tiles = tiles_of(kind, TILES) if tiles is None else tiles
    blocks = _num_blocks(path, x, H, tiles, path_of(kind, x.dtype, x.device))
    dx = x.new_empty((B, N, D)) if need_x else None
    dgates = gates.new_empty(gates.shape) if need_gates else None
    dweights = (None, None, None, None)
    if need_weights:
        dtype = grad_dtype or fc1_weight.dtype
        shapes = (E, H, D), (E, H), (E, D, H), (E, D)
        dweights = tuple(fc1_weight.new_empty(shape, dtype=dtype) for shape in shapes)
    if B * N == 0:
        for t in (dgates, *dweights):
            if t is not None:
                t.zero_()
        return dx, dgates, *dweights
    ready = aligned.tma_ready if blocks else unit_rows
    grad_out, x, z = ready(grad_out), ready(x), z.contiguous()
    fc1_weight, fc2_weight = ready(fc1_weight), ready(fc2_weight)
    gates, slot_order, group_offsets = gates.contiguous(), slot_order.contiguous(), group_offsets.contiguous()
    arch, kind, rest = architecture(x.device), precision(x.dtype), N - blocks * aligned.BLOCK
    tile = tiles["hidden_grad_blocks", kind, 90] if blocks else tiles["to_hidden_grad", kind, arch]
    # Parts of the sums over the columns, for the gates, and over the rows, for the bias: of the blocks, of the rest.
    num_parts = triton.cdiv(H, tile.cols) * (blocks + rest)
    rows = aligned.BLOCK if blocks else tile.rows
    num_tiles = max_tiles(S * rest, E, rows)
    float32 = {"dtype": torch.float32, "device": x.device}
    bias_parts = torch.empty((S * blocks + num_tiles, H), **float32) if need_weights else None
    gate_parts = torch.empty((S, num_parts), **float32) if need_gates else None
    dz = torch.empty_like(z) if need_x or need_weights else None
    gated = torch.empty_like(z) if need_weights else None
    order = slot_order, group_offsets
    needs = (need_x or need_weights, need_gates, need_weights)
    with on_device(x):
        if blocks:
            aligned.hidden_grad(
                grad_out,
                slot_order,
                group_offsets,
                gates,
                fc2_weight,
                z,
                dz,
                gated,
                gate_parts,
                bias_parts,
                blocks,
                needs,
                tiles,
            )
        else:
            to_hidden_grad_kernel[(num_tiles * triton.cdiv(H, tile.cols),)](
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
                num_parts,
                N,
                K,
                D,
                H,
                grad_out.stride(0),
                grad_out.stride(1),
                fc2_weight.stride(0),
                fc2_weight.stride(1),
                *needs,
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
                num_parts,
                K,
                D,
                experts_block(E),
                512,
            )
        if need_weights:
            dfc1, dbias1, dfc2, dbias2 = dweights
            bias1_grad_kernel[(E, triton.cdiv(H, SUM_COLS))](
                *bias_parts.split((S * blocks, num_tiles)),
                group_offsets,
                dbias1,
                E,
                blocks,
                rest,
                H,
                rows,
                experts_block(E),
                SUM_ROWS,
                SUM_COLS,
            )
            bias2_grad_kernel[(E, triton.cdiv(D, SUM_COLS))](
                sums, gates, slot_order, group_offsets, dbias2, K, D, SUM_ROWS, SUM_COLS
            )
            if blocks:
                (gated_blocks, gated_rest), (dz_blocks, dz_rest) = _split(gated, blocks), _split(dz, blocks)
                aligned.weight_grad(grad_out, gated_blocks, grad_out, gated_rest, *order, dfc2, blocks, K, tiles)
                aligned.weight_grad(dz_blocks, x, x, dz_rest, *order, dfc1, blocks, K, tiles)
            else:
                _weight_grad(grad_out, gated, grad_out, *order, dfc2, K, tiles)
                _weight_grad(dz, x, x, *order, dfc1, K, tiles)
        if need_x and blocks and 1 < K and E <= ONE_SUM:
            by_slot = aligned.to_images(dz, fc1_weight, False, *order, None, None, dx, None, blocks, K, tiles)
            if rest:
                _combine(by_slot, None, dx[:, :rest])
        elif need_x and blocks:
            _through_slots_of_blocks(dz, fc1_weight, False, *order, None, None, dx, None, blocks, tiles)
        elif need_x:
            _through_slots(dz, *order, fc1_weight, None, None, dx, None, tiles)
    return dx, dgates, *dweights


def _num_blocks(path: str | None, x: Tensor, hidden: int, tiles: dict, measured: str | None = None) -> int:
    """Blocks of an image that take the aligned path."""
    N, D = x.shape[1:]
    arch, tma = architecture(x.device), aligned.has_tma(x.device)
    if choose_path(path, N, D, hidden, x.dtype, arch, tma, measured) == "gather":
        return 0
    if ("fc1_blocks", precision(x.dtype), 90) not in tiles:
        raise ValueError(f"path: 'aligned' cannot be taken: it has no tiles for {x.dtype}")
    return N // aligned.BLOCK


def _split(t: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """How ``t [S, N, H]`` lies: the rows of the blocks ``[S*64q, H]``, then the packed ``[S, r, H]``; slot order."""
    S, N, H = t.shape
    aligned_rows = blocks * aligned.BLOCK
    of_blocks, of_rest = t.view(-1).split((S * aligned_rows * H, S * (N - aligned_rows) * H))
    return of_blocks.view(-1, H), of_rest.view(S, N - aligned_rows, H)


def _sizes(x: Tensor, gates: Tensor, group_offsets: Tensor, fc1_weight: Tensor) -> tuple[int, ...]:
    """B, N, D, H, E, K, after the checks that are this backend's own."""
    check_dtype("x", x)
    (B, N, D), H, E, K = x.shape, fc1_weight.shape[1], group_offsets.shape[0] - 1, gates.shape[1]
    if D == 0 or H == 0:
        raise ValueError(f"fc1_weight: expected D and H of at least 1, got {list(fc1_weight.shape)}")
    rows = B * N * (K + has_director(fc1_weight, group_offsets))
    if rows > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows B*N*K (K + 1 with a director), got {rows}")
    return B, N, D, H, E, K


def _meta(tile: Tile) -> dict[str, int]:
    return {
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "DEPTH": tile.depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _fc1(x, slot_order, group_offsets, weight, bias, z, a, top_k, tiles) -> None:
    """``z`` (or None) and ``a [S, N, H]``, with a director ``[S + B, N, H]``, of ``x [B, N, D]``, see `fc1_kernel`."""
    _, H, D = weight.shape
    S, E, N = slot_order.shape[0], group_offsets.shape[0] - 1, x.shape[1]
    images = a.shape[0] - S
    tile = tiles["fc1", precision(x.dtype), architecture(x.device)]
    num_tiles = max_tiles(S * N, E, tile.rows) + triton.cdiv(images * N, tile.rows)
    fc1_kernel[(num_tiles * triton.cdiv(H, tile.cols),)](
        x,
        slot_order,
        group_offsets,
        weight,
        bias,
        z,
        a,
        E,
        S,
        images,
        N,
        top_k,
        D,
        H,
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        weight.stride(1),
        experts_block(E),
        **_meta(tile),
        GROUP=GROUP,
    )


def _through_slots_of_blocks(
    rows_in, weight, transposed, slot_order, group_offsets, gates, bias, out, director_out, blocks, tiles
) -> None:
    """`_through_slots` on the aligned path, see `aligned.to_slots`."""
    B, K = out.shape[0], slot_order.shape[0] // out.shape[0]
    inputs, others = (rows_in, weight, transposed, slot_order, group_offsets), (director_out, blocks, tiles)
    if K == 1:  # a slot is an image: nothing is to be combined
        aligned.to_slots(*inputs, gates, bias, out, *others)
        return
    by_slot = out.new_empty((B, K, *out.shape[1:]))
    aligned.to_slots(*inputs, None, bias, by_slot, *others)
    _combine(by_slot, gates, out)


def _through_slots(rows_in, slot_order, group_offsets, weight, bias, gates, out, director_out, tiles) -> None:
    """``out [B, N, W] = sum_k g_k (rows_in [S, N, depth] @ weight [E, depth, W] + bias [E, W])``, by way of the slots.

    Without gates they are 1. director_out: see `to_slots_kernel`.
    """
    B, N, W = out.shape
    by_slot = out.new_empty((B, slot_order.shape[0] // B, N, W))
    _to_slots(rows_in, slot_order, group_offsets, weight, bias, by_slot, director_out, tiles)
    _combine(by_slot, gates, out)


def _to_slots(rows_in, slot_order, group_offsets, weight, bias, out, director_out, tiles) -> None:
    """``out [B, K, N, W] = rows_in [S, N, depth] @ weight [E, depth, W] (+ bias [E, W])``, see `to_slots_kernel`.

    With a director its rows are behind those of rows_in, and its weight and bias behind the experts'.
    """
    _, depth, width = weight.shape
    S, E, N = slot_order.shape[0], group_offsets.shape[0] - 1, rows_in.shape[1]
    images = rows_in.shape[0] - S
    tile = tiles["to_slots", precision(out.dtype), architecture(out.device)]
    num_tiles = max_tiles(S * N, E, tile.rows) + triton.cdiv(images * N, tile.rows)
    to_slots_kernel[(num_tiles * triton.cdiv(width, tile.cols),)](
        rows_in,
        slot_order,
        group_offsets,
        weight,
        bias,
        out,
        director_out,
        E,
        S,
        images,
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
    """``out [B, N, D] = sum_k by_slot [B, K, N, D]``, by ``gates [B, K]`` if given; an image of out is dense."""
    B, K, N, D = by_slot.shape
    grid = (B, triton.cdiv(N * D, COMBINE))
    combine_kernel[grid](by_slot, gates, out, N * D, out.stride(0), K, gates is not None, COMBINE)


def _weight_grad(left, right, gathered, slot_order, group_offsets, out, top_k, tiles) -> None:
    """``out [E, height, width]``; ``gathered`` is the one of ``left`` and ``right`` that is ``[B, N, .]``."""
    height, width = out.shape[1:]
    tile = tiles["weight_grad", precision(left.dtype), architecture(out.device)]
    cut = Cut(slot_order.shape[0], out, tile)
    weight_grad_kernel[cut.grid](
        left,
        right,
        slot_order,
        group_offsets,
        out,
        *cut.arguments,
        gathered.shape[1],
        top_k,
        height,
        width,
        gathered.stride(0),
        gathered.stride(1),
        gathered is left,
        cut.experts,
        **_meta(tile),
    )
    cut.add_parts(group_offsets)
