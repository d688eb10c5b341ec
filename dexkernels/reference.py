"""The specification: every operator in plain torch. It is also the CPU backend.

`route`, `grouped_mlp`, `align_loss` and `group_ema_` have the arguments of the public operators, and autograd gives
their gradients. The `_forward` and `_backward` pairs are what a backend implements, and here what a CPU runs.
Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen, S = B*K slots.
Token-wise routing is image-wise routing of ``B * N`` images of one token; `dexkernels.ops` does that reshaping.
Arguments are validated in `dexkernels.ops`; nothing here checks them again.
Source of the equations: the DEX paper (arXiv 2605.21861) and the recorded runs of its published code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import Routing, sort_slots

EPS = 1e-6
"""Added to the total gate mass and the total usage before dividing; also the floor of q in the KD align loss."""

ALIGN_TEMPERATURE = 0.5
"""Temperature of the director's softmax in the KD align loss; the experts' is 1."""

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

COSINE_EPS = 1e-8
"""Smallest norm in the cosine align loss."""

GEMA_CHUNK = 1 << 22
"""Elements of a director updated at a time, so that they stay in cache while every expert is added to them.

16 MB of float32: fastest of 2**17 to 2**23 with a last-level cache of 32 MB; a CPU with less may want less."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else the dtype itself: what sums, softmaxes and losses are computed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


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
) -> Routing:
    """`dexkernels.route` as one reads it; ``router_noise`` is drawn by the caller."""
    dtype, num_experts = accumulation_dtype(x.dtype), router_weight.shape[0]
    if routing == "token":
        r = x.to(dtype)
    else:
        r = (x[:, 0].to(dtype) if route_from == "cls" else x.mean(1, dtype=dtype)).unsqueeze(1)
    logits = r @ router_weight.to(dtype).t()
    if router_noise is not None:
        logits = logits + expert_usage_noise(noise_std, router_noise.to(dtype), usage_ema)
    p = (logits / temperature).softmax(-1)
    indices = p.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    chosen = p.gather(-1, indices)
    gates = chosen / chosen.sum(-1, keepdim=True)
    mean_p = p.sum((0, 1)) / max(p.shape[0] * p.shape[1], 1)
    balance_loss = num_experts * (mean_p * mean_p.detach()).sum()
    gate_mass = torch.stack([gates.detach()[indices == e].sum() for e in range(num_experts)])
    if routing == "image":
        gates, indices = gates.squeeze(1), indices.squeeze(1)
    return Routing(gates, indices.int(), balance_loss, gate_mass, *sort_slots(indices, num_experts))


def grouped_mlp(
    x: Tensor, routing: Routing, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    """`dexkernels.grouped_mlp` as one reads it: every expert on every token, weighted by its gate or by 0."""
    out = torch.zeros_like(x)
    for e in range(fc1_weight.shape[0]):
        gate = torch.where(routing.expert_indices == e, routing.gates, 0).sum(-1).to(x.dtype)
        weight = gate[..., None] if gate.dim() == 2 else gate[:, None, None]
        out = out + weight * mlp(x, fc1_weight[e], fc1_bias[e], fc2_weight[e], fc2_bias[e])
    return out


def route_forward(
    r: Tensor, router_weight: Tensor, top_k: int, temperature: float, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``p = softmax((r @ router_weight.T + noise) / temperature)``; the K most probable experts, renormalised.

    ``r [R, D]`` holds one row per decision, ``noise [R, E]`` what is added to the logits.
    Returns ``p [R, E]``, ``gates [R, K]``, ``expert_indices`` int32 ``[R, K]``, ``balance_loss``, ``gate_mass [E]``,
    and the slot order as `sort_slots` gives it.
    """
    dtype, num_experts = accumulation_dtype(r.dtype), router_weight.shape[0]
    logits = F.linear(r.to(dtype), router_weight.to(dtype))
    if noise is not None:
        logits = logits + noise.to(dtype)
    p = (logits / temperature).softmax(-1)
    # A stable sort, not topk: topk promises no order among ties, and NaN rows must still give distinct indices.
    indices = p.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    chosen = p.gather(-1, indices)
    gates = chosen / chosen.sum(-1, keepdim=True)
    mean_p = p.sum(0) / max(p.shape[0], 1)
    balance_loss = num_experts * mean_p.square().sum()
    # Scatter into rows and sum them: an index_add_ would add in no fixed order on a GPU.
    mass = torch.zeros_like(p).scatter_(1, indices, gates).sum(0)
    return p, gates, indices.int(), balance_loss, mass, *sort_slots(indices, num_experts)


def route_backward(
    grad_gates: Tensor | None,
    grad_balance: Tensor | None,
    p: Tensor,
    expert_indices: Tensor,
    gates: Tensor,
    r: Tensor,
    router_weight: Tensor,
    top_k: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of r and router_weight.

    Gates are ``g_k = p_k / sum_j p_j`` over the chosen, so ``dp_k = (dg_k - sum_j dg_j g_j) / sum_j p_j``; the balance
    loss is ``E * sum_e mean(p_e) * stop_grad(mean(p_e))``; then the softmax.
    """
    indices = expert_indices.long()
    dp = torch.zeros_like(p)
    if grad_gates is not None:
        centred = grad_gates - (grad_gates * gates).sum(-1, keepdim=True)
        dp.scatter_(1, indices, centred / p.gather(-1, indices).sum(-1, keepdim=True))
    if grad_balance is not None:
        R, E = p.shape
        dp += grad_balance * E / max(R, 1) * (p.sum(0) / max(R, 1))
    dlogits = p * (dp - (p * dp).sum(-1, keepdim=True)) / temperature
    dr = (dlogits @ router_weight.to(p.dtype)).to(r.dtype)
    return dr, (dlogits.t() @ r.to(p.dtype)).to(router_weight.dtype)


def expert_usage_noise(noise_std: float | Tensor, router_noise: Tensor, usage_ema: Tensor) -> Tensor:
    """``noise_std * (router_noise + f)``, ``f_e = 1 - usage_e / (sum(usage) + 1e-6)``: rarely used experts gain."""
    usage = usage_ema.to(router_noise.dtype)
    return noise_std * (router_noise + (1 - usage / (usage.sum() + EPS)))


def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """``fc2(gelu(fc1(x)))`` with the exact (erf) GELU: one expert, the director, or the dense MLP of a ViT."""
    return linear(F.gelu(linear(x.contiguous(), fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, ``[..., K]``, ``[M, K]``, ``[M]``.

    Without gradient, float32 on a CPU goes through oneDNN where torch has it: torch's own float32 products call MKL,
    which does not use the full width of some CPUs. oneDNN computes in full float32.
    """
    on_cpu = x.device.type == "cpu" and weight.dtype == x.dtype == torch.float32 and x.numel() > 0
    plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
    if on_cpu and plain and HAS_ONEDNN and torch.backends.mkldnn.enabled:
        # oneDNN takes a matrix or its transpose, and reads a bias as if it were dense.
        x, weight = (
            t if t.is_contiguous() or (t.dim() == 2 and t.t().is_contiguous()) else t.contiguous() for t in (x, weight)
        )
        bias = bias if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """``out[b] = sum_k gates[b, k] * fc2_e(gelu(fc1_e(x[b])))``, ``e = expert_indices[b, k]``.

    The weights may be of E experts, ``[E, ...]``, or of E experts and the director, ``[E + 1, ...]``.

    Returns ``out [B, N, D]``; ``z [S, N, H]`` = fc1's outputs in slot order, which the backward needs, ``[0, N, H]``
    without ``save``; and the director's output of every image, ``[B, N, D]``, or ``[0, N, D]`` when there is none.
    An expert without slots is not computed.
    """
    (B, N, D), (S,), H = x.shape, slot_order.shape, fc1_bias.shape[1]
    images, slot_gates = _images_and_gates(gates, slot_order)
    out = x.new_zeros((B, N, D), dtype=accumulation_dtype(x.dtype))
    z = x.new_empty((S if save else 0, N, H))
    for e, start, stop in _groups(group_offsets):
        z_e = linear(x.index_select(0, images[start:stop]), fc1_weight[e], fc1_bias[e])
        if save:
            z[start:stop] = z_e
        y = linear(F.gelu(z_e), fc2_weight[e], fc2_bias[e])
        out.index_add_(0, images[start:stop], y.to(out.dtype) * slot_gates[start:stop].to(out.dtype))
    director_out = x.new_empty((0, N, D))
    if has_director(fc1_weight, group_offsets):
        director_out = mlp(x, fc1_weight[-1], fc1_bias[-1], fc2_weight[-1], fc2_bias[-1])
    return out.to(x.dtype), z, director_out


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
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gates, fc1_weight, fc1_bias, fc2_weight, fc2_bias; None for what is not needed.

    Those of the weights are of ``grad_dtype`` (None: the weights' own): under autocast, of the masters' dtype. The
    weights are those of the E experts alone.

    With ``a = gelu(z)`` and ``da = grad_out[b] @ fc2_weight_e``, of one slot with gate g:
    ``dg = sum(da * a) + sum_n(grad_out[b]) . fc2_bias_e``, ``dz = g * da * gelu'(z)``,
    ``dfc2 = (g * grad_out[b]).T @ a``, ``dfc1 = dz.T @ x[b]``, ``dx[b] += dz @ fc1_weight_e``.
    Nothing is divided by g, which may be 0.
    An expert without slots gets exact zeros.
    """
    (B, N, D), (S, _, H) = x.shape, z.shape
    images, slot_gates = _images_and_gates(gates, slot_order)
    acc = accumulation_dtype(x.dtype)
    dx = x.new_zeros((B, N, D), dtype=acc) if need_x else None
    dslot = gates.new_zeros(S) if need_gates else None
    if need_weights:
        E, grad_dtype = fc1_weight.shape[0], grad_dtype or fc1_weight.dtype
        d_fc1, d_fc2 = (torch.empty_like(w, dtype=grad_dtype) for w in (fc1_weight, fc2_weight))
        d_b1, d_b2 = (fc1_weight.new_zeros((E, n), dtype=grad_dtype) for n in (H, D))
        sizes = group_offsets.diff().tolist()
        for e in (e for e in range(E) if sizes[e] == 0):
            d_fc1[e].zero_(), d_fc2[e].zero_()
    for e, start, stop in _groups(group_offsets):
        n = stop - start
        dy = grad_out.index_select(0, images[start:stop])
        g = slot_gates[start:stop].to(acc)
        z_e = z[start:stop].view(n * N, H)
        a = F.gelu(z_e)
        da = linear(dy.view(n * N, D), fc2_weight[e].t())
        if need_gates:
            through_a = torch.linalg.vecdot(da.to(acc), a.to(acc)).view(n, N).sum(1)
            dslot[start:stop] = (through_a + dy.to(acc).sum(1) @ fc2_bias[e].to(acc)).to(gates.dtype)
        if need_weights:
            dy = (dy.to(acc) * g).to(x.dtype).view(n * N, D)
            d_fc2[e] = linear(dy.t(), a.t())
            torch.sum(dy, 0, dtype=grad_dtype, out=d_b2[e])
        dz = torch.ops.aten.gelu_backward(da, z_e).view(n, N, H).mul_(g.to(x.dtype)).view(n * N, H)
        if need_weights:
            d_fc1[e] = linear(dz.t(), x.index_select(0, images[start:stop]).view(n * N, D).t())
            torch.sum(dz, 0, dtype=grad_dtype, out=d_b1[e])
        if need_x:
            dx.index_add_(0, images[start:stop], linear(dz, fc1_weight[e].t()).view(n, N, D).to(acc))
    dgates = None
    if need_gates:
        dgates = torch.empty_like(dslot).index_copy_(0, slot_order, dslot).view(gates.shape)
    dx = dx.to(x.dtype) if need_x else None
    return (dx, dgates, d_fc1, d_b1, d_fc2, d_b2) if need_weights else (dx, dgates, None, None, None, None)


def has_director(fc1_weight: Tensor, group_offsets: Tensor) -> bool:
    """Whether stacked weights hold the director's too, behind those of the experts that ``group_offsets [E+1]`` has."""
    return fc1_weight.shape[0] == group_offsets.shape[0]


def _images_and_gates(gates: Tensor, slot_order: Tensor) -> tuple[Tensor, Tensor]:
    """Of every slot in slot order: its image ``[S]`` and its gate ``[S, 1, 1]``."""
    return slot_order // gates.shape[1], gates.reshape(-1)[slot_order].view(-1, 1, 1)


def _groups(group_offsets: Tensor) -> list[tuple[int, int, int]]:
    """``(expert, first slot, end slot)`` of every expert that has slots."""
    ends = group_offsets.tolist()
    return [(e, ends[e], ends[e + 1]) for e in range(len(ends) - 1) if ends[e] < ends[e + 1]]


def align_loss(experts_out: Tensor, director_out: Tensor, kind: str = "kd") -> Tensor:
    """How far the experts' output ``[..., D]`` is from the director's; a 0-dim mean over all leading dimensions.

    - ``kd``: ``q = softmax(experts_out)``, ``p = softmax(director_out / 0.5)``; ``-sum_D p * log(max(q, 1e-6))``.
      Where q is below 1e-6 the gradient is zero.
    - ``cosine``: ``1 - cos(experts_out, director_out)`` (the paper's Eq. 7); norms below 1e-8 count as 1e-8.
    - ``mse``: mean of the squared difference, also over D.
    """
    dtype = accumulation_dtype(experts_out.dtype)
    y, d = experts_out.to(dtype), director_out.detach().to(dtype)
    rows = max(y[..., 0].numel(), 1)
    if kind == "kd":
        return -((d / ALIGN_TEMPERATURE).softmax(-1) * y.softmax(-1).clamp(min=EPS).log()).sum() / rows
    if kind == "cosine":
        # Not F.cosine_similarity, whose gradient is not that of its value where a norm is below its floor.
        y, d = (t / t.norm(dim=-1, keepdim=True).clamp(min=COSINE_EPS) for t in (y, d))
        return (1 - (y * d).sum(-1)).sum() / rows
    return (y - d).square().sum() / max(y.numel(), 1)


def align_loss_forward(experts_out: Tensor, director_out: Tensor, kind: str = "kd") -> tuple[Tensor, Tensor]:
    """`align_loss`, and what its backward wants saved for each of the R rows, ``[*, R]``: here nothing, ``[0, R]``."""
    loss = align_loss(experts_out, director_out, kind)
    return loss, loss.new_empty(0, experts_out[..., 0].numel())


def align_loss_backward(
    grad_loss: Tensor, experts_out: Tensor, director_out: Tensor, saved: Tensor, kind: str = "kd"
) -> Tensor:
    """Gradient of experts_out; none flows into director_out.

    - ``kd``: with ``w = p`` where ``q >= 1e-6`` and 0 elsewhere: ``q * sum_D(w) - w``.
    - ``cosine``: ``-(d / |d| - cos * y / |y|) / |y|``; norms below 1e-8 count as 1e-8.
    - ``mse``: ``2 (y - d) / D``.
    """
    dtype = accumulation_dtype(experts_out.dtype)
    y, d = experts_out.to(dtype), director_out.to(dtype)
    scale = grad_loss.to(dtype) / max(y[..., 0].numel(), 1)
    if kind == "kd":
        q = y.softmax(-1)
        w = (d / ALIGN_TEMPERATURE).softmax(-1).masked_fill(q < EPS, 0)
        grad = q * w.sum(-1, keepdim=True) - w
    elif kind == "cosine":
        norm = y.norm(dim=-1, keepdim=True)
        y_norm, d_norm = norm.clamp(min=COSINE_EPS), d.norm(dim=-1, keepdim=True).clamp(min=COSINE_EPS)
        unit = d / d_norm
        cos = (y / y_norm * unit).sum(-1, keepdim=True)
        # Below the floor the norm is a constant, and nothing flows through it.
        grad = -(unit - torch.where(norm < COSINE_EPS, 0, cos) * y / y_norm) / y_norm
    else:
        grad = 2 * (y - d) / y.shape[-1]
    return (scale * grad).to(experts_out.dtype)


@torch.no_grad()
def group_ema_(
    directors: list[Tensor],
    experts: list[Tensor],
    group_weights: list[Tensor],
    momentum: float | Tensor,
    skip: Tensor | None = None,
) -> None:
    """``director <- m * director + (1 - m) * sum_e a_e * experts[e]``, in place, for each ``(director, experts, a)``.

    An expert of weight exactly 0 contributes nothing, whatever it holds; when all weights are 0, or ``skip`` is true,
    the director keeps its bits.
    """
    for director, stacked, weights in zip(directors, experts, group_weights, strict=True):
        if director.device.type == "cpu":
            if skip is not None and bool(skip):
                return
            _group_ema_on_host_(director, stacked, weights.tolist(), float(momentum))
        else:
            _group_ema_on_device_(director, stacked, weights, momentum, skip)


def _group_ema_on_host_(director: Tensor, stacked: Tensor, weights: list[float], m: float) -> None:
    scale = [(1 - m) * a for a in weights]
    used = [e for e, s in enumerate(scale) if s != 0]
    if not any(weights):
        return
    if not (director.is_contiguous() and stacked.is_contiguous()):
        director.mul_(m)
        for e in used:
            director.add_(stacked[e], alpha=scale[e])
        return
    flat, sources = director.view(-1), stacked.view(len(weights), -1)
    for start in range(0, flat.numel(), GEMA_CHUNK):
        chunk = flat[start : start + GEMA_CHUNK].mul_(m)
        for e in used:
            chunk.add_(sources[e, start : start + GEMA_CHUNK], alpha=scale[e])


def _group_ema_on_device_(
    director: Tensor, stacked: Tensor, weights: Tensor, momentum: float | Tensor, skip: Tensor | None
) -> None:
    """The same without reading a value on the host, so that a GPU is never waited for."""
    still = (weights == 0).all()
    if skip is not None:
        still = still | skip
    m = torch.as_tensor(momentum, dtype=torch.float64, device=director.device)
    scale = ((1 - m) * weights).to(director.dtype)
    new = m.to(director.dtype) * director
    for e in range(stacked.shape[0]):
        new += torch.where(scale[e] != 0, scale[e] * stacked[e], 0.0)
    director.copy_(torch.where(still, director, new))
