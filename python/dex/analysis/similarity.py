"""Similarity of two networks' outputs for the same inputs, independent of their bases: CKA.

Shape letters: n inputs, D width, E experts.
"""

import torch
from torch import Tensor

from dex.analysis.routes import evaluating
from dex.model import MaskedAutoencoder
from dexkernels.ops.dense import mlp

ROWS = 1024
"""Number of tokens of a layer that are compared."""


def cka(one: Tensor, other: Tensor) -> float:
    """Linear CKA of ``[n, D1]`` and ``[n, D2]`` with the unbiased HSIC (Song et al. 2012; Nguyen et al. 2021, Eq. 3).

    1: equal up to rotation and scale. About 0, of either sign: unrelated, also with more features than inputs, where
    the biased estimate approaches 1. NaN if one of them is constant. ValueError: fewer than 4 inputs, or different
    numbers of inputs.
    """
    if len(one) != len(other) or len(one) < 4:
        raise ValueError(f"one, other: expected the same number of rows, at least 4, got {len(one)} and {len(other)}")
    a, b = (_kernel(t) for t in (one, other))
    scale = _hsic(a, a) * _hsic(b, b)
    return float(_hsic(a, b) / scale.sqrt()) if scale > 0 else float("nan")


@torch.no_grad()
def expert_similarity(model: MaskedAutoencoder, images: Tensor, *, batch_size: int = 64) -> list[Tensor]:
    """CKA of a layer's experts and director, float ``[E_l + 1, E_l + 1]`` per layer; the director comes last.

    All get the same tokens: at most ``ROWS`` of the layer's inputs for whole ``images [B, C, S, S]``, drawn
    with a fixed seed. Experts that started as copies have 1 everywhere.
    """
    layers = model.encoder.dex_layers
    inputs: list[list[Tensor]] = [[] for _ in layers]
    handles = [
        layer.register_forward_pre_hook(lambda m, a, k=i: inputs[k].append(a[0].flatten(0, 1)))
        for i, layer in enumerate(layers)
    ]
    try:
        with evaluating(model):
            for part in images.split(batch_size):
                model.encoder(part)
    finally:
        for handle in handles:
            handle.remove()
    matrices = []
    for layer, parts in zip(layers, inputs, strict=True):
        tokens = torch.cat(parts)
        generator = torch.Generator().manual_seed(0)
        tokens = tokens[torch.randperm(len(tokens), generator=generator)[:ROWS].to(tokens.device)]
        weights = [tuple(w[e] for w in layer.experts.weights) for e in range(layer.num_experts)]
        outputs = [_kernel(mlp(tokens, *w)) for w in (*weights, tuple(layer.director.weights))]
        scale = [_hsic(k, k) for k in outputs]
        matrix = torch.ones(len(outputs), len(outputs))
        for i in range(len(outputs)):
            for j in range(i):
                product = scale[i] * scale[j]
                value = float(_hsic(outputs[i], outputs[j]) / product.sqrt()) if product > 0 else float("nan")
                matrix[i, j] = matrix[j, i] = value
        matrices.append(matrix)
    return matrices


def _kernel(x: Tensor) -> Tensor:
    """``x x^T`` of the centred rows, with a zero diagonal, float64."""
    x = x.detach().cpu().double()
    kernel = (x - x.mean(0)) @ (x - x.mean(0)).T
    return kernel.fill_diagonal_(0)


def _hsic(a: Tensor, b: Tensor) -> Tensor:
    """The unbiased estimate of HSIC from kernels with zero diagonal."""
    n = len(a)
    total = (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.sum(0) @ b.sum(0))
    return total / (n * (n - 3))
