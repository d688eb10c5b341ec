"""`adamw_ema_`: GEMA with the current experts, AdamW, and low-precision copies of both, in one pass over memory."""

import torch
from torch import Tensor

from ...checks import check_momentum, check_number, check_scalar, check_skip, check_tensor, describe
from .. import backends
from .records import Rule, Scalars, Update

BACKENDS = {"reference": "cpu", "triton": "triton", "cuda": "cuda"}
"""Backend -> the module of this folder that has its ``adamw_ema_`` and ``why_not``."""

COPIES = (torch.bfloat16, torch.float16)

backends.register("adamw_ema_", __name__, BACKENDS)


def adamw_ema_(
    updates: list[Update],
    rule: Rule,
    *,
    momentum: float | Tensor = 1.0,
    clip_scale: float | Tensor | None = None,
    skip: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """AdamW of every parameter, and GEMA of the directors of stacked experts, in place.

    With ``g = clip_scale * gradient`` and ``t = step + 1``, in this order:
    ``director <- m * director + (1 - m) * sum_e a_e * parameter[e]``, see `group_ema_`;
    ``parameter <- (1 - lr * weight_decay) * parameter``; ``exp_avg <- beta1 * exp_avg + (1 - beta1) * g``;
    ``exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g^2``;
    ``parameter <- parameter - lr / (1 - beta1^t) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)``;
    ``copy <- parameter, director``, rounded; ``step <- t``. Equals `torch.optim.AdamW` up to rounding.

    Args:
        updates: see `Update`; on one device.
        rule: learning rate, betas, eps and weight decay.
        momentum: m, a float in [0, 1] or a 0-dim tensor.
        clip_scale: a float or a 0-dim tensor that multiplies gradients; the gradients do not change.
        skip: 0-dim bool tensor, read on the device; if true, nothing changes.
        backend: name or None. A parameter that the backend cannot take (float64, strides, an address that is not a
            multiple of 4 bytes, 2^31 elements an expert) is updated by plain torch, unless the backend was requested
            by name.

    Raises: ValueError naming the argument, before anything is changed.
    """
    if not isinstance(updates, (list, tuple)) or not all(isinstance(u, Update) for u in updates):
        raise ValueError(f"updates: expected a list of Update, got {describe(updates)}")
    check_momentum(momentum)
    check_skip(skip)
    if clip_scale is not None:
        check_scalar("clip_scale", clip_scale, "a number >= 0", lambda v: v >= 0)
    _check_rule(rule)
    for i, update in enumerate(updates):
        _check(f"updates[{i}]", update, updates[0].parameter.device)
    if not updates:
        return
    device = updates[0].parameter.device
    scalars = Scalars(_on(device, momentum), None if clip_scale is None else _on(device, clip_scale), skip)
    if skip is not None and skip.device != device:
        scalars = scalars._replace(skip=skip.to(device))
    chosen = backends.choose("adamw_ema_", backend, device, dtype=torch.float32)
    parts: dict[str, list[Update]] = {chosen: [], "reference": []}
    for i, update in enumerate(updates):
        reason = backends.load("adamw_ema_", chosen).why_not(update)
        if reason and backend is not None:
            raise ValueError(f"updates[{i}].{reason}")
        parts["reference" if reason else chosen].append(update)
    with torch.no_grad():
        for name, part in parts.items():
            if part:
                backends.load("adamw_ema_", name).adamw_ema_(part, rule, scalars)
    # Kernels, even torch's fused one, bump no version: do it here, so that a backward that needs old values raises.
    torch.autograd.graph.increment_version([t for u in updates for t in u.moved])


def _on(device: torch.device, value: float | Tensor) -> Tensor:
    """``value`` on the device, in float64 so that 1 - m is exact. A fill kernel, unlike a copy, causes no wait."""
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), value, dtype=torch.float64, device=device)


def _check_rule(rule: Rule) -> None:
    check_scalar("rule.lr", rule.lr, "a number >= 0", lambda v: v >= 0)
    for i, beta in enumerate(rule.betas):
        check_number(f"rule.betas[{i}]", beta, "a number in [0, 1)", lambda v: 0 <= v < 1)
    for name in ("eps", "weight_decay"):
        check_number(f"rule.{name}", getattr(rule, name), "a number >= 0", lambda v: v >= 0)


def _check(name: str, u: Update, device: torch.device) -> None:
    p = u.parameter
    if not isinstance(p, Tensor) or p.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}.parameter: expected float32 or float64, got {describe(p)}")
    if p.device != device:
        raise ValueError(f"{name}.parameter: expected device {device}, that of updates[0], got {p.device}")
    for field in ("gradient", "exp_avg", "exp_avg_sq"):
        check_tensor(f"{name}.{field}", getattr(u, field), tuple(p.shape), like=p)
    if not isinstance(u.step, Tensor) or u.step.dim() or u.step.dtype != torch.float32:
        raise ValueError(f"{name}.step: expected a 0-dim float32 tensor, got {describe(u.step)}")
    if u.step.device != device:
        raise ValueError(f"{name}.step: expected device {device}, got {u.step.device}")
    if (u.director is None) != (u.group_weights is None) or (u.copy is not None and u.director is None):
        raise ValueError(f"{name}: expected a director with its group_weights, and a copy only with a director")
    if u.director is None:
        return
    if p.dim() == 0 or p.shape[0] == 0:
        raise ValueError(
            f"{name}.parameter: expected [E, ...] with at least one expert for a director, got {describe(p)}"
        )
    check_tensor(f"{name}.director", u.director, tuple(p.shape[1:]), like=p)
    check_tensor(f"{name}.group_weights", u.group_weights, (p.shape[0],), like=p, same_dtype=False)
    if u.copy is not None:
        check_tensor(f"{name}.copy", u.copy, (p.shape[0] + 1, *p.shape[1:]), like=p, same_dtype=False)
        if u.copy.dtype not in COPIES or not u.copy.is_contiguous():
            raise ValueError(f"{name}.copy: expected contiguous bfloat16 or float16, got {describe(u.copy)}")
