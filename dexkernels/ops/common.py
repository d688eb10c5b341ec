"""Helpers of the operators: dtypes, autocast, and the guard of tensors that must not change before backward."""

from typing import Any

import torch
from torch import Tensor

EPS = 1e-6
"""Added to the total gate mass and the total usage before dividing; also the floor of q in the KD align loss."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, softmaxes and losses: float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that an operator computes in: autocast's if it is enabled for the device of x, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(device: torch.device) -> torch.autocast:
    """A context without autocast: an operator's dtypes are fixed before the call, also if backward runs under it."""
    return torch.autocast(device.type, enabled=False)


def or_empty(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """``tensors`` with an empty tensor instead of each None, which a `torch.library` operator cannot return."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def gradients(inputs: type, **grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The result of a backward: ``grads`` for some fields of the record ``inputs``, None for all others."""
    return inputs(**dict.fromkeys(inputs._fields) | grads)


def guard_version(loss: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """``loss`` itself, whose backward raises RuntimeError if one of ``tensors`` was changed in place since.

    Without it, a layer that is recomputed in backward (activation checkpointing) after an early `update_director`
    would silently use the new director. Compiled graphs are not guarded: tracing cannot read versions.
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
    # Plain attributes, since saved tensors would be recomputed with the forward, at their new version.
    ctx.guarded = [(t, t._version) for t in tensors]


def check_versions(ctx: Any) -> None:
    if any(t._version != version for t, version in ctx.guarded):
        raise RuntimeError(
            "the director or usage_ema was changed between forward and backward: call update_director after backward "
            "(the losses of a step use the director before its update)"
        )
