"""`grouped_mlp` in Triton, on two paths, of which `plan.choose_path` picks one by shapes, dtype and device alone.

Letters: B images, N tokens, D width, H hidden, E experts, K chosen, S = B*K slots. Rows: see `triton_common`.
``gather``: any N, D, H and token-wise routing. Every product gathers its rows by pointer, so a tile may mix images.
``aligned``: see `aligned_kernels`. An image's blocks of 64 tokens are loaded by descriptors, the rest is packed.
No tile mixes experts. Grids are upper bounds known from shapes, and nothing is added in an order that changes: the bits
of a result depend on the inputs alone.
"""

import torch
import triton
from torch import Tensor

from ....records import MLPWeights
from ...triton_common import max_tiles, on_device, unit_rows
from ..records import Gradients, Needs, Result, Saved, Slots, has_director
from . import aligned, gather, sums
from .plan import BLOCK, HiddenGrads, Plan, Product, Tiles, make_plan


def forward(
    x: Tensor,
    slots: Slots,
    weights: MLPWeights,
    save: bool,
    activation: str = "gelu",
    *,
    path: str | None = None,
    tiles: Tiles | None = None,
) -> Result:
    """`Result` on a GPU. What lies where in ``z [S, N, H]`` is the path's affair: see `aligned.split`.

    A director whose weights stand behind the experts' is one more expert of the same launches, which every image takes;
    of it nothing is saved.
    ``path``: see `plan.choose_path`; for tests and benchmarks, which give the backward the same.

    Besides the results it holds ``a [S, N, H]``, the director's ``[B, N, H]`` behind it and, of the tokens outside the
    blocks, inputs and outputs by slot; with more than ONE_SUM experts and K > 1 the outputs of all tokens.
    """
    plan = make_plan(x, slots, weights, activation, path, tiles)
    (B, N, D), H = x.shape, weights.fc1_weight.shape[1]
    images = B if has_director(weights, slots) else 0
    out, director_out = x.new_empty((B, N, D)), x.new_empty((images, N, D))
    z = x.new_empty((slots.num_slots if save else 0, N, H))
    if out.numel() == 0:
        return Result(out, z, director_out)
    launches, ready = (aligned, aligned.tma_ready) if plan.blocks else (gather, unit_rows)
    x = ready(x)
    weights = MLPWeights(
        ready(weights.fc1_weight),
        weights.fc1_bias.contiguous(),
        ready(weights.fc2_weight),
        weights.fc2_bias.contiguous(),
    )
    a = x.new_empty((slots.num_slots + images, N, H))
    with on_device(x):
        launches.fc1(x, weights, z if save else None, a, plan)
        launches.to_images(
            Product(
                rows_in=a,
                weight=weights.fc2_weight,
                transposed=True,
                bias=weights.fc2_bias,
                gates=plan.slots.gates,
                out=out,
                director_out=director_out if images else None,
            ),
            plan,
        )
    return Result(out, z, director_out)


def backward(
    grad_out: Tensor,
    saved: Saved,
    needs: Needs,
    grad_dtype: torch.dtype,
    activation: str = "gelu",
    *,
    path: str | None = None,
    tiles: Tiles | None = None,
) -> Gradients:
    """`Gradients` on a GPU, those of the weights in ``grad_dtype``.

    While it runs it holds at most ``dz`` and ``g gelu(z)``, each ``[S, N, H]``, which lie as z does, and the parts of
    sums: of the weight gradients see `chunks.Cut`.
    """
    computed = MLPWeights(saved.fc1_weight, None, saved.fc2_weight, saved.fc2_bias)
    plan = make_plan(saved.x, saved.slots, computed, activation, path, tiles)
    grads = _empty_gradients(saved, needs, grad_dtype)
    if saved.x.shape[0] * saved.x.shape[1] == 0:
        for t in grads:
            if t is not None:
                t.zero_()
        return grads
    launches, ready = (aligned, aligned.tma_ready) if plan.blocks else (gather, unit_rows)
    grad_out = ready(grad_out)
    saved = saved._replace(
        x=ready(saved.x),
        fc1_weight=ready(saved.fc1_weight),
        fc2_weight=ready(saved.fc2_weight),
        fc2_bias=saved.fc2_bias.contiguous(),
        z=saved.z.contiguous(),
    )
    tile = launches.hidden_grad_tile(plan)
    bias_rows = BLOCK if plan.blocks else tile.rows
    hidden = _empty_hidden_grads(saved.z, tile.cols, bias_rows, needs, plan)
    with on_device(saved.x):
        launches.hidden_grad(grad_out, saved, hidden, needs, plan)
        if needs.gates or needs.weights:
            image_sums = sums.image_sums(grad_out)
        if needs.gates:
            sums.gate_grad(hidden, image_sums, saved.fc2_bias, grads.gates, plan)
        if needs.weights:
            sums.bias1_grad(hidden, bias_rows, grads.fc1_bias, plan)
            sums.bias2_grad(image_sums, plan.slots, grads.fc2_bias)
            dweights = MLPWeights(grads.fc1_weight, grads.fc1_bias, grads.fc2_weight, grads.fc2_bias)
            launches.weight_grads(grad_out, saved.x, hidden, dweights, plan)
        if needs.x:
            launches.to_images(
                Product(
                    rows_in=hidden.dz,
                    weight=saved.fc1_weight,
                    transposed=False,
                    bias=None,
                    gates=None,
                    out=grads.x,
                    director_out=None,
                ),
                plan,
            )
    return grads


def _empty_gradients(saved: Saved, needs: Needs, grad_dtype: torch.dtype) -> Gradients:
    dx = saved.x.new_empty(saved.x.shape) if needs.x else None
    dgates = saved.gates.new_empty(saved.gates.shape) if needs.gates else None
    if not needs.weights:
        return Gradients(dx, dgates, None, None, None, None)
    E, H, D = saved.fc1_weight.shape
    shapes = (E, H, D), (E, H), (E, D, H), (E, D)
    return Gradients(dx, dgates, *(saved.fc1_weight.new_empty(shape, dtype=grad_dtype) for shape in shapes))


def _empty_hidden_grads(z: Tensor, tile_cols: int, bias_rows: int, needs: Needs, plan: Plan) -> HiddenGrads:
    """Parts are of sums over the columns, for the gates, and over the rows, for the bias: of blocks, of the rest."""
    (S, _, H), float32 = z.shape, {"dtype": torch.float32, "device": z.device}
    num_parts = triton.cdiv(H, tile_cols) * (plan.blocks + plan.rest)
    bias_parts = S * plan.blocks + max_tiles(S * plan.rest, plan.slots.num_experts, bias_rows)
    return HiddenGrads(
        dz=torch.empty_like(z) if needs.x or needs.weights else None,
        gated=torch.empty_like(z) if needs.weights else None,
        gate_parts=torch.empty((S, num_parts), **float32) if needs.gates else None,
        bias_parts=torch.empty((bias_parts, H), **float32) if needs.weights else None,
    )
