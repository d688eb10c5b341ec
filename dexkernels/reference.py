"""THE SPECIFICATION: every operator in readable plain torch, with gradients by autograd.

Only tests and `dexkernels.verify` use it, to check the product's results. It takes the arguments of the public
operators, without checks.
Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
Source of the equations: the DEX paper (arXiv 2605.21861) and the recorded runs of its published code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import Routing


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, softmaxes and losses: float32 for half precision."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def route(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    *,
    routing: str = "image",
    route_from: str = "cls",
    temperature: float = 0.5,
    noise_std: float | Tensor = 0.0,
    router_noise: Tensor | None = None,
    usage_ema: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Routing:
    """``p = softmax((r @ router_weight.T + noise) / temperature)``; gates are the K largest p over their sum.

    r is the CLS token or the mean token of an image ``[B, 1, D]``, or every token ``[B, N, D]``.
    ``balance_loss = E * sum_e mean(p_e) * stop_grad(mean(p_e))``. ``token_mask [B, N]`` is true for real tokens: only
    these enter the mean token, and only decisions about them, or about images with any, enter loss and ``gate_mass``.
    """
    dtype, E = real(x.dtype), router_weight.shape[0]
    m = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if token_mask is None else token_mask
    r = torch.where(m[..., None], x, 0).to(dtype)
    counted = m
    if routing == "image":
        r = r[:, :1] if route_from == "cls" else r.sum(1, keepdim=True) / m.sum(1).clamp(min=1)[:, None, None]
        counted = m.any(1, keepdim=True)
    logits = r @ router_weight.to(dtype).t()
    if router_noise is not None:
        logits = logits + usage_noise(noise_std, router_noise.to(dtype), usage_ema.to(dtype))
    p = (logits / temperature).softmax(-1)
    indices = p.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    chosen = p.gather(-1, indices)
    gates = chosen / chosen.sum(-1, keepdim=True)
    mean_p = torch.where(counted[..., None], p, 0).sum((0, 1)) / counted.sum().clamp(min=1)
    balance_loss = E * (mean_p * mean_p.detach()).sum()
    gate_mass = torch.stack([gates.detach()[(indices == e) & counted[..., None]].sum() for e in range(E)])
    group_sizes = torch.stack([(indices == e).sum() for e in range(E)])
    group_offsets = torch.cat([group_sizes.new_zeros(1), group_sizes.cumsum(0)])
    slot_order = indices.flatten().sort(stable=True).indices
    if routing == "image":
        gates, indices = gates.squeeze(1), indices.squeeze(1)
    return Routing(gates, indices.int(), balance_loss, gate_mass, slot_order, group_sizes, group_offsets)


def usage_noise(noise_std: float | Tensor, router_noise: Tensor, usage_ema: Tensor) -> Tensor:
    """``noise_std * (router_noise + f)``, ``f_e = 1 - usage_e / (sum(usage) + 1e-6)``, which favours unused experts."""
    return noise_std * (router_noise + 1 - usage_ema / (usage_ema.sum() + 1e-6))


def gelu(z: Tensor, activation: str) -> Tensor:
    """``z * Phi(z)`` with the normal distribution's Phi, or for ``gelu_tanh`` its tanh approximation."""
    if activation == "gelu_tanh":
        return 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    return F.gelu(z)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: str = "gelu",
) -> Tensor:
    """``fc2(gelu(fc1(x)))``."""
    return F.linear(gelu(F.linear(x, fc1_weight, fc1_bias), activation), fc2_weight, fc2_bias)


def grouped_mlp(
    x: Tensor,
    routing: Routing,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: str = "gelu",
) -> Tensor:
    """``out[b] = sum_k gates[b, k] * mlp_e(x[b])``, ``e = expert_indices[b, k]``.

    Computes every expert on every token, weighted by its gate or by 0.
    """
    out = torch.zeros_like(x)
    for e in range(fc1_weight.shape[0]):
        gate = torch.where(routing.expert_indices == e, routing.gates, 0).sum(-1).to(x.dtype)
        weight = gate[..., None] if gate.dim() == 2 else gate[:, None, None]
        out = out + weight * mlp(x, fc1_weight[e], fc1_bias[e], fc2_weight[e], fc2_bias[e], activation)
    return out


def align_loss(experts_out: Tensor, director_out: Tensor, kind: str = "kd", token_mask: Tensor | None = None) -> Tensor:
    """Distance of the experts' output ``[..., D]`` from the director's; a 0-dim mean over all leading dimensions.

    With a mask ``[...]`` the mean is over the rows where it is true.

    - ``kd``: ``q = softmax(experts_out)``, ``p = softmax(director_out / 0.5)``; ``-sum_D p * log(max(q, 1e-6))``.
      Where q is below 1e-6 the gradient is zero.
    - ``cosine``: ``1 - cos(experts_out, director_out)`` (the paper's Eq. 7); norms below 1e-8 count as 1e-8.
    - ``mse``: mean of the squared difference, also over D.
    """
    dtype = real(experts_out.dtype)
    y, d = experts_out.to(dtype), director_out.detach().to(dtype)
    if kind == "kd":
        loss = -((d / 0.5).softmax(-1) * y.softmax(-1).clamp(min=1e-6).log()).sum(-1)
    elif kind == "cosine":
        # Not F.cosine_similarity: below the floor of a norm, its gradient does not match its value.
        y, d = (t / t.norm(dim=-1, keepdim=True).clamp(min=1e-8) for t in (y, d))
        loss = 1 - (y * d).sum(-1)
    else:
        loss = (y - d).square().mean(-1)
    if token_mask is not None:
        loss = loss[token_mask]
    return loss.sum() / max(loss.numel(), 1)


@torch.no_grad()
def group_ema_(
    directors: list[Tensor],
    experts: list[Tensor],
    group_weights: list[Tensor],
    momentum: float | Tensor,
    skip: Tensor | None = None,
) -> None:
    """``director <- m * director + (1 - m) * sum_e a_e * experts[e]``, in place, for each ``(director, experts, a)``.

    An expert of weight exactly 0 contributes nothing, whatever it holds. If all weights are 0, or ``skip`` is true,
    the director does not change.
    """
    m = float(momentum)
    for director, stacked, weights in zip(directors, experts, group_weights, strict=True):
        used = [e for e, a in enumerate(weights.tolist()) if a != 0]
        if used and not (skip is not None and bool(skip)):
            director.copy_(m * director + (1 - m) * sum(weights[e] * stacked[e] for e in used))


@torch.no_grad()
def adamw_ema_(
    parameter: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    rule: dict[str, float],
    director: Tensor | None = None,
    group_weights: Tensor | None = None,
    momentum: float = 1.0,
    clip_scale: float = 1.0,
    skip: bool = False,
) -> None:
    """GEMA with the current experts, then AdamW of the experts (Loshchilov and Hutter 2019), in place.

    state: ``exp_avg``, ``exp_avg_sq`` and ``step``. rule: ``lr``, ``beta1``, ``beta2``, ``eps`` and ``weight_decay``.
    """
    if skip:
        return
    if director is not None:
        group_ema_([director], [parameter], [group_weights], momentum)
    g, lr = clip_scale * gradient, rule["lr"]
    state["step"] += 1
    t = float(state["step"])
    parameter.mul_(1 - lr * rule["weight_decay"])
    state["exp_avg"].copy_(rule["beta1"] * state["exp_avg"] + (1 - rule["beta1"]) * g)
    state["exp_avg_sq"].copy_(rule["beta2"] * state["exp_avg_sq"] + (1 - rule["beta2"]) * g**2)
    corrected = state["exp_avg"] / (1 - rule["beta1"] ** t), state["exp_avg_sq"] / (1 - rule["beta2"] ** t)
    parameter.sub_(lr * corrected[0] / (corrected[1].sqrt() + rule["eps"]))
