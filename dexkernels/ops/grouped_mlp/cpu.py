"""`grouped_mlp` in plain torch, expert by expert: the forward, and a hand-written backward.

Letters: see `records`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...records import MLPWeights
from ..common import accumulation_dtype
from ..dense import ACTIVATIONS, linear, linear_into, mlp
from .records import Gradients, Needs, Result, Saved, Slots, has_director


def forward(x: Tensor, slots: Slots, weights: MLPWeights, save: bool, activation: str = "gelu") -> Result:
    """``out[b] = sum_k gates[b, k] * fc2_e(gelu(fc1_e(x[b])))``, ``e = expert_indices[b, k]``.

    The weights hold E experts, ``[E, ...]``, or E experts and the director, ``[E + 1, ...]``.
    z is in slot order. An expert without slots is skipped.
    """
    (B, N, D), H = x.shape, weights.fc1_bias.shape[1]
    images, gates = _images_and_gates(slots)
    out = x.new_zeros((B, N, D), dtype=accumulation_dtype(x.dtype))
    z = x.new_empty((slots.num_slots if save else 0, N, H))
    for e, start, stop in _groups(slots.group_offsets):
        z_e = linear(x.index_select(0, images[start:stop]), weights.fc1_weight[e], weights.fc1_bias[e])
        if save:
            z[start:stop] = z_e
        y = linear(F.gelu(z_e, approximate=ACTIVATIONS[activation]), weights.fc2_weight[e], weights.fc2_bias[e])
        out.index_add_(0, images[start:stop], y.to(out.dtype) * gates[start:stop].to(out.dtype))
    director_out = x.new_empty((0, N, D))
    if has_director(weights, slots):
        director_out = mlp(x, *(w[-1] for w in weights), activation)
    return Result(out.to(x.dtype), z, director_out)


def backward(
    grad_out: Tensor, saved: Saved, needs: Needs, grad_dtype: torch.dtype, activation: str = "gelu"
) -> Gradients:
    """The gradients; those of the weights have ``grad_dtype``, which under autocast is the masters' dtype.

    With ``a = gelu(z)`` and ``da = grad_out[b] @ fc2_weight_e``, for one slot with gate g:
    ``dg = sum(da * a) + sum_n(grad_out[b]) . fc2_bias_e``, ``dz = g * da * gelu'(z)``,
    ``dfc2 = (g * grad_out[b]).T @ a``, ``dfc1 = dz.T @ x[b]``, ``dx[b] += dz @ fc1_weight_e``.
    Nothing is divided by g, which may be 0.
    """
    x, slots = saved.x, saved.slots
    (B, N, D), H = x.shape, saved.z.shape[2]
    images, gates = _images_and_gates(slots)
    acc, approximate = accumulation_dtype(x.dtype), ACTIVATIONS[activation]
    dx = x.new_zeros((B, N, D), dtype=acc) if needs.x else None
    dslot = slots.gates.new_zeros(slots.num_slots) if needs.gates else None
    dweights = _weight_grads(saved, grad_dtype) if needs.weights else None
    for e, start, stop in _groups(slots.group_offsets):
        n = stop - start
        dy = grad_out.index_select(0, images[start:stop])
        g = gates[start:stop].to(acc)
        z = saved.z[start:stop].view(n * N, H)
        a = F.gelu(z, approximate=approximate)
        da = linear(dy.view(n * N, D), saved.fc2_weight[e].t())
        if needs.gates:
            through_a = torch.linalg.vecdot(da.to(acc), a.to(acc)).view(n, N).sum(1)
            through_bias = dy.to(acc).sum(1) @ saved.fc2_bias[e].to(acc)
            dslot[start:stop] = (through_a + through_bias).to(slots.gates.dtype)
        if needs.weights:
            dy = (dy.to(acc) * g).to(x.dtype).view(n * N, D)
            linear_into(dweights.fc2_weight[e], dy.t(), a.t())
            torch.sum(dy, 0, dtype=grad_dtype, out=dweights.fc2_bias[e])
        dz = (
            torch.ops.aten.gelu_backward(da, z, approximate=approximate)
            .view(n, N, H)
            .mul_(g.to(x.dtype))
            .view(n * N, H)
        )
        if needs.weights:
            linear_into(dweights.fc1_weight[e], dz.t(), x.index_select(0, images[start:stop]).view(n * N, D).t())
            torch.sum(dz, 0, dtype=grad_dtype, out=dweights.fc1_bias[e])
        if needs.x:
            dx.index_add_(0, images[start:stop], linear(dz, saved.fc1_weight[e].t()).view(n, N, D).to(acc))
    dgates = None
    if needs.gates:
        dgates = torch.empty_like(dslot).index_copy_(0, slots.slot_order, dslot).view(slots.gates.shape)
    dx = dx.to(x.dtype) if needs.x else None
    return Gradients(dx, dgates, *(dweights if needs.weights else (None,) * 4))


def _weight_grads(saved: Saved, dtype: torch.dtype) -> MLPWeights:
    """Zeros for the biases and for experts without slots; the weights of the others are uninitialised."""
    (E, H, D), weight = saved.fc1_weight.shape, saved.fc1_weight
    d_fc1, d_fc2 = (torch.empty_like(w, dtype=dtype) for w in (saved.fc1_weight, saved.fc2_weight))
    d_b1, d_b2 = (weight.new_zeros((E, n), dtype=dtype) for n in (H, D))
    sizes = saved.group_offsets.diff().tolist()
    for e in (e for e in range(E) if sizes[e] == 0):
        d_fc1[e].zero_(), d_fc2[e].zero_()
    return MLPWeights(d_fc1, d_b1, d_fc2, d_b2)


def _images_and_gates(slots: Slots) -> tuple[Tensor, Tensor]:
    """The image ``[S]`` and the gate ``[S, 1, 1]`` of every slot, in slot order."""
    return slots.slot_order // slots.top_k, slots.gates.reshape(-1)[slots.slot_order].view(-1, 1, 1)


def _groups(group_offsets: Tensor) -> list[tuple[int, int, int]]:
    """``(expert, first slot, end slot)`` of every expert that has slots."""
    ends = group_offsets.tolist()
    return [(e, ends[e], ends[e + 1]) for e in range(len(ends) - 1) if ends[e] < ends[e + 1]]
