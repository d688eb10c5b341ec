"""What the operators share: dtypes, autocast, and the guard of what a backward must find unchanged."""

from typing import Any

import torch
from torch import Tensor

EPS = 1e-6
"""Added to the total gate mass and the total usage before dividing; also the floor of q in the KD align loss."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else the dtype itself: what sums, softmaxes and losses are computed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What an operator computes in: autocast's dtype where it is enabled for the device of x, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(device: torch.device) -> torch.autocast:
    """Autocast off: an operator's dtypes are decided before it is called, also when backward runs under autocast."""
    return torch.autocast(device.type, enabled=False)


def or_empty(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """``tensors`` with an empty tensor in the place of each None, which a `torch.library` operator cannot return."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def gradients(inputs: type, **of: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a backward returns: the gradients ``of`` some fields of the record ``inputs``, None for all others."""
    return inputs(**dict.fromkeys(inputs._fields) | of)


def guard_version(loss: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """``loss`` itself, whose backward raises RuntimeError when one of ``tensors`` was changed in place since.

    Without it, a layer that is recomputed in backward (activation checkpointing) after an early `update_director`
    would silently use the new director. Compiled graphs go without: there is no version to read while tracing.
    """
    if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
        return loss
    return _GuardVersion.apply(loss, tensors)


class _GuardVersion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, tensors):
        remember_versions(ctx, tensors)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad):
        check_versions(ctx)
        return grad, None


def remember_versions(ctx: Any, tensors: tuple[Tensor, ...]) -> None:
    # Plain attributes: saved tensors would be recomputed together with the forward, at their new version.
    ctx.guarded = [(t, t._version) for t in tensors]


def check_versions(ctx: Any) -> None:
    if any(t._version != version for t, version in ctx.guarded):
        raise RuntimeError(
            "the director or usage_ema was changed between forward and backward: call update_director after backward "
            "(the losses of a step use the director before its update)"
        )
