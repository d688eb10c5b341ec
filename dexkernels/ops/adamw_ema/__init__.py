"""`adamw_ema_`: GEMA with the current experts, AdamW, and low-precision copies of both, in one pass over memory."""

from typing import Any, NamedTuple

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
    checked(updates, rule, momentum=momentum, clip_scale=clip_scale, skip=skip, backend=backend).run()


class Checked(NamedTuple):
    """A call of `adamw_ema_` whose arguments are checked."""

    updates: list[Update]
    rule: Rule
    scalars: Scalars
    chosen: str
    """The backend."""
    requested: bool
    """Whether it was requested by name."""
    parts: dict[str, list[Update]] | None
    """The updates of each backend; None under torch.compile, which does not see what a backend can take."""

    def run(self) -> None:
        """Compute the updates."""
        if self.parts is None:
            arguments = _flat(self.updates, self.rule, self.scalars)
            torch.ops.dexkernels.adamw_ema_(*arguments, self.chosen, self.requested)
            return
        # There is no gradient to record; the dispatcher would only add overhead to each step.
        with torch.no_grad():
            _run(self.parts, self.rule, self.scalars)
        # Kernels, even torch's fused one, bump no version: do it here, so that a backward that needs old values raises.
        torch.autograd.graph.increment_version([t for u in self.updates for t in u.moved])


def checked(
    updates: list[Update],
    rule: Rule,
    *,
    momentum: float | Tensor = 1.0,
    clip_scale: float | Tensor | None = None,
    skip: Tensor | None = None,
    backend: str | None = None,
) -> Checked:
    """Check the arguments of `adamw_ema_`, so that several calls run only if each can."""
    if not isinstance(updates, (list, tuple)) or not all(isinstance(u, Update) for u in updates):
        raise ValueError(f"updates: expected a list of Update, got {describe(updates)}")
    check_momentum(momentum)
    check_skip(skip)
    if clip_scale is not None:
        check_scalar("clip_scale", clip_scale, "a number >= 0", lambda v: v >= 0)
    _check_rule(rule)
    for i, update in enumerate(updates):
        _check(f"updates[{i}]", update, updates[0].parameter.device)
    device = updates[0].parameter.device if updates else torch.device("cpu")
    scalars = Scalars(_on(device, momentum), None if clip_scale is None else _on(device, clip_scale), skip)
    if skip is not None and skip.device != device:
        scalars = scalars._replace(skip=skip.to(device))
    chosen = backends.choose("adamw_ema_", backend, device, dtype=torch.float32)
    requested = backend is not None
    parts = None if torch.compiler.is_compiling() else _parts(updates, chosen, requested)
    return Checked(updates, rule, scalars, chosen, requested, parts)


def _parts(updates: list[Update], chosen: str, requested: bool) -> dict[str, list[Update]]:
    """The updates of the chosen backend, and those that it leaves to plain torch. ValueError if it was requested."""
    why_not = backends.load("adamw_ema_", chosen).why_not
    parts: dict[str, list[Update]] = {}
    for i, update in enumerate(updates):
        reason = why_not(update)
        if reason and requested:
            raise ValueError(f"updates[{i}].{reason}")
        parts.setdefault("reference" if reason else chosen, []).append(update)
    return parts


def _run(parts: dict[str, list[Update]], rule: Rule, scalars: Scalars) -> None:
    for backend, updates in parts.items():
        backends.load("adamw_ema_", backend).adamw_ema_(updates, rule, scalars)


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


def _flat(updates: list[Update], rule: Rule, scalars: Scalars) -> tuple[Any, ...]:
    """The arguments of the operator before the backend."""
    followed = [i for i, u in enumerate(updates) if u.director is not None]
    copied = [i for i, u in enumerate(updates) if u.copy is not None]
    on_device = isinstance(rule.lr, Tensor)
    return (
        *([getattr(u, name) for u in updates] for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq", "step")),
        *([getattr(updates[i], name) for i in followed] for name in ("director", "group_weights")),
        [updates[i].copy for i in copied],
        *(followed, copied, 0.0 if on_device else rule.lr, rule.lr if on_device else None),
        *(list(rule.betas), rule.eps, rule.weight_decay, *scalars),
    )


@torch.library.custom_op(
    "dexkernels::adamw_ema_", mutates_args=("parameters", "exp_avgs", "exp_avg_sqs", "steps", "directors", "copies")
)
def _adamw_ema_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    directors: list[Tensor],
    group_weights: list[Tensor],
    copies: list[Tensor],
    followed: list[int],
    copied: list[int],
    lr: float,
    lr_on_device: Tensor | None,
    betas: list[float],
    eps: float,
    weight_decay: float,
    momentum: Tensor,
    clip_scale: Tensor | None,
    skip: Tensor | None,
    backend: str,
    requested: bool,
) -> None:
    """followed, copied: the updates that have a director, and those that have a copy."""
    updates = [Update(*tensors) for tensors in zip(parameters, gradients, exp_avgs, exp_avg_sqs, steps, strict=True)]
    for i, director, weights in zip(followed, directors, group_weights, strict=True):
        updates[i] = updates[i]._replace(director=director, group_weights=weights)
    for i, copy in zip(copied, copies, strict=True):
        updates[i] = updates[i]._replace(copy=copy)
    first, second = betas
    rule = Rule(lr if lr_on_device is None else lr_on_device, (first, second), eps, weight_decay)
    _run(_parts(updates, backend, requested), rule, Scalars(momentum, clip_scale, skip))


@_adamw_ema_.register_fake
def _(*arguments) -> None:
    return None
