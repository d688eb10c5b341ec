"""Leaves of the operators, and shadows of their weights."""

import torch

B, N, D, H, E, K = 4, 3, 5, 7, 6, 2
OPS = torch.ops.dexkernels


def leaves(dtype=torch.float64, seed=0):
    """x, router weight and the four expert tensors, all requiring gradient."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, N, D), (E, D), (E, H, D), (E, H), (E, D, H), (E, D)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def shadows(weights, dtype=torch.bfloat16, director=True):
    """Of the expert tensors in ``dtype``, with a director's behind them; without a dtype there are none."""
    if dtype is None:
        return (None,) * 4
    return tuple(torch.cat((w, w[:1] / 2)[: 1 + director]).detach().to(dtype) for w in weights)


def noise(rows=B, dtype=torch.float64):
    return torch.randn(rows, E, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
