"""`align_loss` in plain torch: the forward, and a hand-written backward."""

import torch
from torch import Tensor

from ..common import EPS, accumulation_dtype

TEMPERATURE = 0.5
"""Temperature of the director's softmax in the KD align loss; the experts' is 1."""

COSINE_EPS = 1e-8
"""Smallest norm in the cosine align loss."""


def forward(
    experts_out: Tensor, director_out: Tensor, kind: str, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss, and the numbers saved for its backward, ``[*, R]`` for R rows: here none, ``[0, R]``.

    In the cosine loss norms below 1e-8 count as 1e-8.
    """
    dtype = accumulation_dtype(experts_out.dtype)
    y, d = experts_out.to(dtype), director_out.detach().to(dtype)
    rows = y[..., 0].numel()
    if token_mask is not None:
        return _rows(y, d, kind).masked_fill(~token_mask, 0).sum() / _count(y, token_mask), y.new_empty(0, rows)
    if kind == "kd":
        loss = -((d / TEMPERATURE).softmax(-1) * y.softmax(-1).clamp(min=EPS).log()).sum() / max(rows, 1)
    elif kind == "cosine":
        y, d = (t / t.norm(dim=-1, keepdim=True).clamp(min=COSINE_EPS) for t in (y, d))
        loss = (1 - (y * d).sum(-1)).sum() / max(rows, 1)
    else:
        loss = (y - d).square().sum() / max(y.numel(), 1)
    return loss, loss.new_empty(0, rows)


def _rows(y: Tensor, d: Tensor, kind: str) -> Tensor:
    """The loss of each row."""
    if kind == "kd":
        return -((d / TEMPERATURE).softmax(-1) * y.softmax(-1).clamp(min=EPS).log()).sum(-1)
    if kind == "cosine":
        y, d = (t / t.norm(dim=-1, keepdim=True).clamp(min=COSINE_EPS) for t in (y, d))
        return 1 - (y * d).sum(-1)
    return (y - d).square().sum(-1) / max(y.shape[-1], 1)


def _count(y: Tensor, token_mask: Tensor | None) -> int | Tensor:
    """The number of real rows, at least 1."""
    return max(y[..., 0].numel(), 1) if token_mask is None else token_mask.sum().clamp(min=1)


def backward(
    grad_loss: Tensor,
    experts_out: Tensor,
    director_out: Tensor,
    saved: Tensor,
    kind: str,
    token_mask: Tensor | None = None,
) -> Tensor:
    """The gradient of experts_out; director_out has none.

    - ``kd``: with ``w = p`` where ``q >= 1e-6`` and 0 elsewhere: ``q * sum_D(w) - w``.
    - ``cosine``: ``-(d / |d| - cos * y / |y|) / |y|``; norms below 1e-8 count as 1e-8.
    - ``mse``: ``2 (y - d) / D``.
    """
    dtype = accumulation_dtype(experts_out.dtype)
    y, d = experts_out.to(dtype), director_out.to(dtype)
    scale = grad_loss.to(dtype) / _count(y, token_mask)
    if kind == "kd":
        q = y.softmax(-1)
        w = (d / TEMPERATURE).softmax(-1).masked_fill(q < EPS, 0)
        grad = q * w.sum(-1, keepdim=True) - w
    elif kind == "cosine":
        norm = y.norm(dim=-1, keepdim=True)
        y_norm, d_norm = norm.clamp(min=COSINE_EPS), d.norm(dim=-1, keepdim=True).clamp(min=COSINE_EPS)
        unit = d / d_norm
        cos = (y / y_norm * unit).sum(-1, keepdim=True)
        # Below the floor the norm is a constant, without a gradient.
        grad = -(unit - torch.where(norm < COSINE_EPS, 0, cos) * y / y_norm) / y_norm
    else:
        grad = 2 * (y - d) / y.shape[-1]
    grad = (scale * grad).to(experts_out.dtype)
    return grad if token_mask is None else grad.masked_fill(~token_mask[..., None], 0)
