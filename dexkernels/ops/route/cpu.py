"""`route` in plain torch: the forward, and a hand-written backward. Letters: see `records`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...routing import sort_slots
from ..common import accumulation_dtype
from .records import Routed, RouterGrads, Saved


def forward(
    r: Tensor,
    router_weight: Tensor,
    top_k: int,
    temperature: float,
    noise: Tensor | None,
    counted: Tensor | None = None,
) -> Routed:
    """``p = softmax((r @ router_weight.T + noise) / temperature)``; the K most probable experts, renormalised.

    ``r [R, D]`` holds one row per decision; ``noise [R, E]`` is added to the logits. All decisions are made alike, but
    only those where ``counted``, bool ``[R]``, is true enter the balance loss and the gate mass.
    """
    dtype, num_experts = accumulation_dtype(r.dtype), router_weight.shape[0]
    logits = F.linear(r.to(dtype), router_weight.to(dtype))
    if noise is not None:
        logits = logits + noise.to(dtype)
    p = (logits / temperature).softmax(-1)
    # A stable sort, not topk: topk guarantees no order of ties, and NaN rows must still give distinct indices.
    indices = p.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    chosen = p.gather(-1, indices)
    gates = chosen / chosen.sum(-1, keepdim=True)
    mean_p = _mean_counted(p, counted)
    balance_loss = num_experts * mean_p.square().sum()
    # Scatter into rows and sum them, since an index_add_ has no fixed order on a GPU.
    mass = torch.zeros_like(p).scatter_(1, indices, gates)
    if counted is not None:
        mass = mass.masked_fill(~counted[:, None], 0)
    return Routed(p, gates, indices.int(), balance_loss, mass.sum(0), *sort_slots(indices, num_experts))


def _mean_counted(p: Tensor, counted: Tensor | None) -> Tensor:
    """``[R, E] -> [E]``: the mean over the counted decisions; 0 without any."""
    if counted is None:
        return p.sum(0) / max(p.shape[0], 1)
    return p.masked_fill(~counted[:, None], 0).sum(0) / counted.sum().clamp(min=1)


def backward(grad_gates: Tensor, grad_balance: Tensor, saved: Saved, temperature: float) -> RouterGrads:
    """Gradients of r and router_weight.

    Gates are ``g_k = p_k / sum_j p_j`` over the chosen, so ``dp_k = (dg_k - sum_j dg_j g_j) / sum_j p_j``; the balance
    loss is ``E * sum_e mean(p_e) * stop_grad(mean(p_e))``; then the softmax.
    """
    p, r, router_weight = saved.p, saved.r, saved.router_weight
    indices = saved.expert_indices.long()
    dp = torch.zeros_like(p)
    centred = grad_gates - (grad_gates * saved.gates).sum(-1, keepdim=True)
    dp.scatter_(1, indices, centred / p.gather(-1, indices).sum(-1, keepdim=True))
    R, E = p.shape
    if saved.counted is None:
        dp += grad_balance * E / max(R, 1) * (p.sum(0) / max(R, 1))
    else:
        share = saved.counted[:, None] / saved.counted.sum().clamp(min=1)
        dp += grad_balance * E * share.to(p.dtype) * _mean_counted(p, saved.counted)
    dlogits = p * (dp - (p * dp).sum(-1, keepdim=True)) / temperature
    dr = (dlogits @ router_weight.to(p.dtype)).to(r.dtype)
    return RouterGrads(dr, (dlogits.t() @ r.to(p.dtype)).to(router_weight.dtype))
