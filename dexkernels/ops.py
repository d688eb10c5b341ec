"""The operators: validation, autocast and autograd, written once for all backends.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
from .routing import Routing

ROUTINGS = ("image", "token")
ROUTE_FROM = ("cls", "mean")
ALIGN_KINDS = ("kd", "cosine", "mse")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    backend: str | None = None,
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
        router_noise: standard normal noise ``[B, 1, E]`` (image) or ``[B, N, E]`` (token); drawn when None.
        usage_ema: ``[E]`` running usage, needed with noise.

    Returns: a `Routing`. Its ``gates`` and ``balance_loss`` are differentiable in x and router_weight.
    Raises: ValueError naming the argument.
    """
    _check_x(x)
    check_choice("routing", routing, ROUTINGS)
    check_choice("route_from", route_from, ROUTE_FROM)
    B, N, D = x.shape
    _check_tensor("router_weight", router_weight, (None, D), like=x, same_dtype=False)
    E = router_weight.shape[0]
    check_top_k(top_k, E)
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature!r}")
    if N == 0:
        raise ValueError("x: expected at least one token to route from, got shape " + _shape(x))
    check_noise_std(noise_std)
    if isinstance(noise_std, Tensor) or noise_std > 0:
        shape = (B, 1 if routing == "image" else N, E)
        if usage_ema is None:
            raise ValueError("usage_ema: expected a tensor [E] when noise_std is not 0, got None")
        _check_tensor("usage_ema", usage_ema, (E,), like=x, same_dtype=False)
        if router_noise is None:
            router_noise = torch.randn(shape, device=x.device)
        _check_tensor("router_noise", router_noise, shape, like=x, same_dtype=False)
    else:
        router_noise = None
    run = backends.launcher("route", backend, x.device)
    with torch.autocast(x.device.type, enabled=False):
        return run(
            x,
            router_weight,
            top_k,
            routing=routing,
            route_from=route_from,
            temperature=temperature,
            noise_std=noise_std,
            router_noise=router_noise,
            usage_ema=usage_ema,
        )


def grouped_mlp(
    x: Tensor,
    routing: Routing,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """``out[b] = sum_k gates[b, k] * fc2_e(gelu(fc1_e(x[b])))`` with ``e = expert_indices[b, k]`` and the exact GELU.

    Args:
        x: ``[B, N, D]``.
        routing: what `route` returned for this x; gates ``[B, K]`` (per image) or ``[B, N, K]`` (per token).
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: ``[E, H, D]``, ``[E, H]``, ``[E, D, H]``, ``[E, D]``, dtype of x
            (any of the four float dtypes; under autocast they are cast to its dtype).

    Returns: ``[B, N, D]``. Differentiable once, in x, gates and weights; an expert without images gets exact zeros.
    Raises: ValueError naming the argument.
    """
    _check_x(x)
    B, N, D = x.shape
    autocast = torch.is_autocast_enabled(x.device.type)
    _check_tensor("fc1_weight", fc1_weight, (None, None, D), like=x, same_dtype=not autocast)
    E, H, _ = fc1_weight.shape
    for name, t, shape in (
        ("fc1_bias", fc1_bias, (E, H)),
        ("fc2_weight", fc2_weight, (E, D, H)),
        ("fc2_bias", fc2_bias, (E, D)),
    ):
        _check_tensor(name, t, shape, like=x, same_dtype=not autocast)
    gates = routing.gates
    if tuple(gates.shape[:-1]) not in ((B,), (B, N)):
        raise ValueError(f"routing.gates: expected [{B}, K] or [{B}, {N}, K] for this x, got {_shape(gates)}")
    _check_tensor("routing.group_sizes", routing.group_sizes, (E,), like=x, same_dtype=False)
    _check_tensor("routing.slot_order", routing.slot_order, (gates.numel(),), like=x, same_dtype=False)
    launch = backends.launcher("grouped_mlp", backend, x.device)
    tensors = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = tuple(t.to(dtype) for t in tensors)
    x, *weights = tensors
    by_token = gates.dim() == 3
    if by_token:
        x, gates = x.reshape(B * N, 1, D), gates.flatten(0, 1)
    with torch.autocast(x.device.type, enabled=False):
        out = _GroupedMLP.apply(launch, x, gates, routing.slot_order, routing.group_offsets, *weights)
    return out.view(B, N, D) if by_token else out


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, launch, x, gates, slot_order, group_offsets, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        forward, ctx.backward_of_backend = launch
        out, z = forward(x, gates, slot_order, group_offsets, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        ctx.save_for_backward(x, gates, slot_order, group_offsets, fc1_weight, fc2_weight, fc2_bias, z)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        _, need_x, need_gates, _, _, *need_weights = ctx.needs_input_grad
        dx, dgates, *dweights = ctx.backward_of_backend(
            grad_out, *ctx.saved_tensors, need_x=need_x, need_gates=need_gates, need_weights=any(need_weights)
        )
        return None, dx, dgates, None, None, *dweights


def align_loss(experts_out: Tensor, director_out: Tensor, kind: str = "kd", *, backend: str | None = None) -> Tensor:
    """How far the experts' output is from the director's, a 0-dim mean over all leading dimensions.

    - ``kd``: ``q = softmax(experts_out)``, ``p = softmax(director_out / 0.5)``; ``-sum_D p * log(max(q, 1e-6))``.
    - ``cosine``: ``1 - cos`` along D, the paper's Eq. 7.
    - ``mse``: mean squared difference.

    Args:
        experts_out, director_out: ``[..., D]``, same shape; no gradient flows into director_out.

    Returns: 0-dim, float32 for half-precision inputs. Raises: ValueError naming the argument.
    """
    check_choice("kind", kind, ALIGN_KINDS)
    if experts_out.dim() < 1 or experts_out.dtype not in FLOATS:
        raise ValueError(f"experts_out: expected floats [..., D], got {experts_out.dtype} {_shape(experts_out)}")
    _check_tensor("director_out", director_out, tuple(experts_out.shape), like=experts_out, same_dtype=False)
    run = backends.launcher("align_loss", backend, experts_out.device)
    with torch.autocast(experts_out.device.type, enabled=False):
        return run(experts_out, director_out, kind)


def group_ema_(
    directors: list[Tensor],
    experts: list[Tensor],
    group_weights: list[Tensor],
    momentum: float | Tensor,
    *,
    skip: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """GEMA: ``director <- m * director + (1 - m) * sum_e a_e * experts[e]``, in place, of any number of tensors.

    Args:
        directors: tensors of any shape, float32 or float64: in half precision a director would not move at m = 0.999.
        experts: one ``[E, *director.shape]`` per director.
        group_weights: one ``[E]`` per director, normalised gate mass. Weight 0 contributes nothing whatever the expert
            holds; all 0 leaves the director as it is.
        momentum: m, a float in [0, 1] or a 0-dim tensor.
        skip: 0-dim bool tensor; where true nothing changes.

    Raises: ValueError naming the argument, before anything is changed.
    """
    if not len(directors) == len(experts) == len(group_weights):
        raise ValueError(
            f"experts, group_weights: expected one per director ({len(directors)}), "
            f"got {len(experts)} and {len(group_weights)}"
        )
    check_momentum(momentum)
    check_skip(skip)
    for i, (d, e, a) in enumerate(zip(directors, experts, group_weights, strict=True)):
        if d.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"directors[{i}]: expected float32 or float64 (half precision cannot follow), got {d.dtype}"
            )
        _check_tensor(f"experts[{i}]", e, (None, *d.shape), like=d)
        _check_tensor(f"group_weights[{i}]", a, (e.shape[0],), like=d, same_dtype=False)
    if directors:
        backends.launcher("group_ema_", backend, directors[0].device)(directors, experts, group_weights, momentum, skip)


def guard_version(loss: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """``loss`` itself, whose backward raises RuntimeError when one of ``tensors`` was changed in place since.

    Without it, a layer that is recomputed in backward (activation checkpointing) after an early `update_director`
    would silently use the new director.
    """
    return _GuardVersion.apply(loss, tensors)


class _GuardVersion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, tensors):
        # Plain attributes: saved tensors would be recomputed together with the forward, at their new version.
        ctx.tensors, ctx.versions = tensors, [t._version for t in tensors]
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad):
        if [t._version for t in ctx.tensors] != ctx.versions:
            raise RuntimeError(
                "the director was changed between forward and backward: call update_director after backward "
                "(the losses of a step use the director before its update)"
            )
        return grad, None


def check_top_k(top_k: int, num_experts: int) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: expected an integer in 1..num_experts ({num_experts}), got {top_k!r}")


def check_noise_std(noise_std: float | Tensor) -> None:
    _check_scalar("noise_std", noise_std, "a number >= 0", lambda v: v >= 0)


def check_momentum(momentum: float | Tensor) -> None:
    _check_scalar("momentum", momentum, "a number in [0, 1]", lambda v: 0 <= v <= 1)


def check_skip(skip: Tensor | None) -> None:
    if skip is not None and not (isinstance(skip, Tensor) and skip.dim() == 0 and skip.dtype == torch.bool):
        raise ValueError(f"skip: expected a 0-dim bool tensor or None, got {_describe(skip)}")


def _check_scalar(name: str, value: float | Tensor, expected: str, holds) -> None:
    if isinstance(value, Tensor):
        # Its value stays where it is: reading it would make the host wait for a GPU.
        if value.dim() != 0:
            raise ValueError(f"{name}: expected a float or a 0-dim tensor, got shape {_shape(value)}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
        raise ValueError(f"{name}: expected {expected}, or a 0-dim tensor, got {value!r}")


def _check_x(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() != 3 or x.dtype not in FLOATS:
        raise ValueError(f"x: expected a floating-point tensor [B, N, D], got {_describe(x)}")


def _check_tensor(name: str, t: Tensor, shape: tuple, *, like: Tensor, same_dtype: bool = True) -> None:
    """``shape`` may hold None for a free size."""
    fits = isinstance(t, Tensor) and t.dim() == len(shape)
    if not fits or any(want is not None and got != want for got, want in zip(t.shape, shape, strict=True)):
        wanted = "[" + ", ".join("*" if s is None else str(s) for s in shape) + "]"
        raise ValueError(f"{name}: expected shape {wanted}, got {_describe(t)}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {t.device}")
    if same_dtype and t.dtype != like.dtype:
        raise ValueError(f"{name}: expected {like.dtype}, got {t.dtype}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def _describe(t) -> str:
    return f"{t.dtype} {_shape(t)}" if isinstance(t, Tensor) else repr(t)
