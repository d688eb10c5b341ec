"""`route`: chooses the experts of an image or a token.

Letters: B images, N tokens (CLS first), D width, E experts, K chosen, R decisions (B, or B*N token-wise).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import (
    check_choice,
    check_noise_std,
    check_temperature,
    check_tensor,
    check_top_k,
    check_transforms,
    check_x,
    shape_of,
)
from ...choices import ROUTE_FROM, ROUTINGS, BackendName, RouteFrom, RoutingName
from ...routing import Routing, SlotOrder
from .. import backends
from ..common import EPS, accumulation_dtype, check_versions, gradients, remember_versions, without_autocast
from .records import Routed, Saved

BACKENDS = {"reference": "cpu", "triton": "triton"}
"""Backend -> the module of this folder that has its ``forward`` and ``backward``."""

LIMITS = {"triton": {"token_mask": "its kernel counts every decision in the balance loss and the gate mass"}}
"""Backend -> feature -> why the backend lacks it; plain torch is used instead."""

backends.register("route", __name__, BACKENDS, LIMITS)


class Noise(NamedTuple):
    """Exploration noise of the router, see `route`."""

    std: float | Tensor = 0.0
    drawn: Tensor | None = None
    """Standard normal; None: torch draws it."""
    usage_ema: Tensor | None = None
    """``[E]``; required with noise."""


def route(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    *,
    routing: RoutingName = "image",
    route_from: RouteFrom = "cls",
    temperature: float = 0.5,
    noise_std: float | Tensor = 0.0,
    router_noise: Tensor | None = None,
    usage_ema: Tensor | None = None,
    backend: BackendName | None = None,
) -> Routing:
    """Choose K of E experts for every image (``routing="image"``) or token (``"token"``).

    ``p = softmax((r @ router_weight.T + noise) / temperature)``, gates are the K largest p over their sum. Computed in
    float32 for half-precision inputs and outside autocast.

    Args:
        x: ``[B, N, D]``, CLS token first.
        router_weight: ``[E, D]``.
        top_k: K, ``1 <= K <= E``.
        route_from: image-wise only: ``"cls"`` decides from ``x[:, 0]``, ``"mean"`` from the mean token.
        noise_std: exploration noise, a float or 0-dim tensor, ``>= 0``; a float 0 means none.
        router_noise: standard normal noise ``[B, 1, E]`` (image) or ``[B, N, E]`` (token); None: torch draws it.
        usage_ema: ``[E]`` running usage, required with noise.

    Returns: a `Routing`. Its ``gates`` and ``balance_loss`` are differentiable in x and router_weight.
    Raises: ValueError naming the argument.
    """
    check_x(x)
    check_transforms(x, router_weight)
    check_choice("routing", routing, ROUTINGS)
    check_choice("route_from", route_from, ROUTE_FROM)
    check_tensor("router_weight", router_weight, (None, x.shape[2]), like=x, same_dtype=False)
    check_top_k(top_k, router_weight.shape[0])
    check_temperature(temperature)
    check_tokens(x)
    check_noise_std(noise_std)
    noise = scaled_noise(x, router_weight.shape[0], routing, Noise(noise_std, router_noise, usage_ema))
    backend = backends.choose("route", backend, x.device, dtype=x.dtype)
    r = router_rows(x, routing, route_from)
    routed = Routed(*torch.ops.dexkernels.route(r, router_weight, noise, usage_ema, top_k, temperature, backend))
    return as_routing(routed, x, routing)


def check_tokens(x: Tensor) -> None:
    if x.shape[1] == 0:
        raise ValueError("x: expected at least one token to route from, got shape " + shape_of(x))


def scaled_noise(x: Tensor, num_experts: int, routing: str, noise: Noise) -> Tensor | None:
    """The noise added to the logits, ``[R, E]``, or None; the caller has checked ``noise.std``."""
    if not isinstance(noise.std, Tensor) and noise.std == 0:
        return None
    shape = (x.shape[0], 1 if routing == "image" else x.shape[1], num_experts)
    if noise.usage_ema is None:
        raise ValueError("usage_ema: expected a tensor [E] if noise_std is not 0, got None")
    check_tensor("usage_ema", noise.usage_ema, (num_experts,), like=x, same_dtype=False)
    drawn = torch.randn(shape, device=x.device) if noise.drawn is None else noise.drawn
    check_tensor("router_noise", drawn, shape, like=x, same_dtype=False)
    with torch.no_grad():
        return expert_usage_noise(noise.std, drawn, noise.usage_ema).reshape(-1, num_experts)


def expert_usage_noise(noise_std: float | Tensor, router_noise: Tensor, usage_ema: Tensor) -> Tensor:
    """``noise_std * (router_noise + f)``, ``f_e = 1 - usage_e / (sum(usage) + 1e-6)``, which favours unused experts."""
    usage = usage_ema.to(router_noise.dtype)
    return noise_std * (router_noise + (1 - usage / (usage.sum() + EPS)))


def router_rows(x: Tensor, routing: str, route_from: str, token_mask: Tensor | None = None) -> Tensor:
    """The router's input, ``[B, D]`` per image or ``[B*N, D]`` per token; contiguous, so that strides change no bit.

    With a mask, bool ``[B, N]`` and true for real tokens, the mean is over real tokens; padding must be 0 in x.
    """
    if routing == "token":
        return x.reshape(-1, x.shape[2]).contiguous()
    if route_from == "cls":
        return x[:, 0].contiguous()
    if token_mask is not None:
        return x.contiguous().sum(1, dtype=accumulation_dtype(x.dtype)) / num_real(token_mask)
    return x.contiguous().mean(1, dtype=accumulation_dtype(x.dtype))


def num_real(token_mask: Tensor) -> Tensor:
    """``[B, 1]``: number of real tokens of each image, at least 1."""
    return token_mask.sum(1, keepdim=True).clamp(min=1)


def counted_rows(token_mask: Tensor | None, routing: str) -> Tensor | None:
    """bool ``[R]``: decisions about real tokens, or about images with real tokens; None: all decisions."""
    if token_mask is None:
        return None
    return token_mask.flatten() if routing == "token" else token_mask.any(1)


def as_routing(routed: Routed, x: Tensor, routing: str) -> Routing:
    """``routed`` as a `Routing`, without the probabilities; token-wise, gates and indices are ``[B, N, K]``."""
    gates, indices = routed.gates, routed.expert_indices
    if routing == "token":
        shape = (*x.shape[:2], gates.shape[1])
        gates, indices = gates.view(shape), indices.view(shape)
    order = SlotOrder(routed.slot_order, routed.group_sizes, routed.group_offsets)
    return Routing(gates, indices, routed.balance_loss, routed.gate_mass, *order)


def remember_usage(ctx: Any, noise: Tensor | None, usage_ema: Tensor | None) -> None:
    """Guard usage_ema, which the noise depends on: recomputed after an early update, a forward would differ."""
    remember_versions(ctx, () if noise is None else (usage_ema,))


class _Inputs(NamedTuple):
    """The arguments of the operator, in the order of its schema."""

    r: Tensor
    router_weight: Tensor
    noise: Tensor | None
    usage_ema: Tensor | None
    top_k: int
    temperature: float
    backend: str


@torch.library.custom_op("dexkernels::route", mutates_args=())
def _route(
    r: Tensor,
    router_weight: Tensor,
    noise: Tensor | None,
    usage_ema: Tensor | None,
    top_k: int,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Routed`. usage_ema is not read; the backward checks that it has not changed."""
    with without_autocast(r.device):
        return tuple(run_forward(backend, r, router_weight, top_k, temperature, noise))


def run_forward(
    backend: str,
    r: Tensor,
    router_weight: Tensor,
    top_k: int,
    temperature: float,
    noise: Tensor | None,
    counted: Tensor | None = None,
) -> Routed:
    """Run the forward of ``backend`` with autocast off. Only backends with a token mask accept ``counted``."""
    more = {} if counted is None else {"counted": counted}
    return backends.load("route", backend).forward(r, router_weight, top_k, temperature, noise, **more)


@_route.register_fake
def _(r, router_weight, noise, usage_ema, top_k, temperature, backend):
    return tuple(empty_routed(r, r.shape[0], router_weight.shape[0], top_k))


def empty_routed(like: Tensor, R: int, E: int, K: int) -> Routed:
    """An uninitialised `Routed` of R decisions, for fake kernels."""
    real, ints = {"dtype": accumulation_dtype(like.dtype)}, {"dtype": torch.int64}
    return Routed(
        p=like.new_empty((R, E), **real),
        gates=like.new_empty((R, K), **real),
        expert_indices=like.new_empty((R, K), dtype=torch.int32),
        balance_loss=like.new_empty((), **real),
        gate_mass=like.new_empty((E,), **real),
        slot_order=like.new_empty(R * K, **ints),
        group_sizes=like.new_empty(E, **ints),
        group_offsets=like.new_empty(E + 1, **ints),
    )


@torch.library.custom_op("dexkernels::route_backward", mutates_args=())
def _route_backward(
    grad_gates: Tensor,
    grad_balance: Tensor,
    p: Tensor,
    gates: Tensor,
    expert_indices: Tensor,
    r: Tensor,
    router_weight: Tensor,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    saved = Saved(p, gates, expert_indices, r, router_weight)
    with without_autocast(r.device):
        return tuple(backends.load("route", backend).backward(grad_gates, grad_balance, saved, temperature))


@_route_backward.register_fake
def _(grad_gates, grad_balance, p, gates, expert_indices, r, router_weight, temperature, backend):
    return r.new_empty(r.shape), router_weight.new_empty(router_weight.shape)


def _save(ctx, inputs, output):
    given, routed = _Inputs(*inputs), Routed(*output)
    remember_usage(ctx, given.noise, given.usage_ema)
    ctx.mark_non_differentiable(routed.p, routed.gate_mass)
    ctx.temperature, ctx.backend = given.temperature, given.backend
    ctx.save_for_backward(routed.p, routed.gates, routed.expert_indices, given.r, given.router_weight)


def _backward(ctx, *grad_outputs):
    check_versions(ctx)
    grads = Routed(*grad_outputs)
    dr, drouter = torch.ops.dexkernels.route_backward(
        grads.gates, grads.balance_loss, *ctx.saved_tensors, ctx.temperature, ctx.backend
    )
    return gradients(_Inputs, r=dr, router_weight=drouter)


_route.register_autograd(_backward, setup_context=_save)
