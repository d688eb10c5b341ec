"""`adamw_ema_` in plain torch: block by block on the host, and on a device without reading values on the host."""

import torch
from torch import Tensor

from ..group_ema.cpu import on_device_
from .records import Rule, Scalars, Update

BLOCK = 1 << 20
"""Elements of an expert updated at a time: GEMA reads their 4 MB from memory, then AdamW from the cache. With smaller
blocks the calls cost more than the cache saves."""


def why_not(update: Update) -> str | None:
    """Why this backend cannot take an update: it takes all."""
    return None


def adamw_ema_(updates: list[Update], rule: Rule, scalars: Scalars) -> None:
    """See `dexkernels.ops.adamw_ema.adamw_ema_`. AdamW runs in torch's fused kernel, and so has its bits."""
    if updates[0].parameter.device.type == "cpu":
        _on_host_(updates, rule, scalars)
    else:
        _on_device_(updates, rule, scalars)


def _on_host_(updates: list[Update], rule: Rule, scalars: Scalars) -> None:
    if scalars.skip is not None and bool(scalars.skip):
        return
    m, clip = float(scalars.momentum), 1.0 if scalars.clip_scale is None else float(scalars.clip_scale)
    rule = rule._replace(lr=float(rule.lr))
    for u in updates:
        u.step.add_(1)
        pieces = [u.parameter, u.gradient, u.exp_avg, u.exp_avg_sq]
        if not all(t.is_contiguous() for t in (*pieces, *((u.director,) if u.director is not None else ()))):
            _whole_(u, rule, m, clip)
            continue
        E = u.num_experts
        # Views of E rows, even if E or the rest is 0.
        size = u.parameter.numel() // E if E else 0
        flat = [t.view(E, size) for t in pieces]
        weights = [0.0] * E if u.group_weights is None else u.group_weights.tolist()
        blocks = [t.split(BLOCK, 1) for t in flat]
        if u.director is None:
            directors = copies = [None] * len(blocks[0])
        else:
            directors = u.director.view(-1).split(BLOCK)
            copies = [None] * len(directors) if u.copy is None else u.copy.view(E + 1, size).split(BLOCK, 1)
        for director, copy, *block in zip(directors, copies, *blocks, strict=True):
            _block_(block, u.step, rule, clip, weights, m, director, copy)


def _block_(
    block: list[Tensor],
    step: Tensor,
    rule: Rule,
    clip: float,
    weights: list[float],
    m: float,
    director: Tensor | None,
    copy: Tensor | None,
) -> None:
    """Update the same elements of every expert ``[E, BLOCK]``, the director and the copies ``[E + 1, BLOCK]``."""
    if any(weights):
        director.mul_(m)
    for a, p, g, exp_avg, exp_avg_sq in zip(weights, *(t.unbind() for t in block), strict=True):
        if (1 - m) * a != 0:
            director.add_(p, alpha=(1 - m) * a)
        _fused_(p, g if clip == 1.0 else g * clip, exp_avg, exp_avg_sq, step, rule)
    if copy is not None:
        copy[:-1] = block[0]
        copy[-1] = director


def _whole_(u: Update, rule: Rule, m: float, clip: float) -> None:
    """Update tensors that have no flat view."""
    if u.director is not None and bool(u.group_weights.any()):
        u.director.mul_(m)
        for e, a in enumerate(u.group_weights.tolist()):
            if (1 - m) * a != 0:
                u.director.add_(u.parameter[e], alpha=(1 - m) * a)
    states = [t.contiguous() for t in (u.parameter, u.gradient * clip, u.exp_avg, u.exp_avg_sq)]
    _fused_(*states, u.step, rule)
    for target, state in zip((u.parameter, u.exp_avg, u.exp_avg_sq), (states[0], *states[2:]), strict=True):
        if target.data_ptr() != state.data_ptr():
            target.copy_(state)
    _fill_copy(u)


def _on_device_(updates: list[Update], rule: Rule, scalars: Scalars) -> None:
    found_inf = None if scalars.skip is None else scalars.skip.float()
    for u in updates:
        if u.director is not None:
            on_device_(u.director, u.parameter, u.group_weights, scalars.momentum, scalars.skip)
    grads = [u.gradient for u in updates]
    if scalars.clip_scale is not None:
        grads = torch._foreach_mul(grads, scalars.clip_scale.to(grads[0].dtype))
    steps = [u.step for u in updates]
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        [u.parameter for u in updates], grads, [u.exp_avg for u in updates], [u.exp_avg_sq for u in updates], [], steps,
        found_inf=found_inf, **_options(rule),
    )  # fmt: skip
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))
    for u in updates:
        _fill_copy(u)


def _fused_(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, rule: Rule) -> None:
    torch._fused_adamw_([p], [g], [exp_avg], [exp_avg_sq], [], [step], **_options(rule))


def _options(rule: Rule) -> dict:
    first, second = rule.betas
    return {
        "lr": rule.lr, "beta1": first, "beta2": second, "weight_decay": rule.weight_decay, "eps": rule.eps,
        "amsgrad": False, "maximize": False,
    }  # fmt: skip


def _fill_copy(u: Update) -> None:
    """Write the copy. After a skipped step it does not change, as the weights do not."""
    if u.copy is not None:
        u.copy[:-1].copy_(u.parameter)
        u.copy[-1].copy_(u.director)
