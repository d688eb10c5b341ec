"""Attention of the last block, and principal components of patches.

Shape letters: B images, S image side, G patches per side, L = G * G patches, D width, A heads.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis.routes import evaluating
from dex.model import VisionTransformer


class Tokens(NamedTuple):
    """Tokens of whole images after the final norm, float32 on the host."""

    cls: Tensor
    """``[B, D]``"""
    patches: Tensor
    """``[B, L, D]``"""
    attention: Tensor
    """``[B, A, R, C]``, R rows and C columns of patches: attention of the CLS token in the last block; sums to at most
    1."""


@torch.no_grad()
def tokens(encoder: VisionTransformer, images: Tensor, *, batch_size: int = 64) -> Tokens:
    """Tokens and attention of whole ``images [B, C, S, S]`` in evaluation mode; the encoder's mode is restored."""
    attn, inputs = encoder.blocks[-1].attn, []
    handle = attn.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    out = []
    try:
        with evaluating(encoder):
            for part in images.split(batch_size):
                inputs.clear()
                x = encoder(part).float().cpu()
                B, N, D = inputs[0].shape
                A, grid = attn.num_heads, encoder.grid
                q, k, _ = attn.qkv(inputs[0]).view(B, N, 3, A, D // A).permute(2, 0, 3, 1, 4)
                weight = torch.softmax((q[:, :, :1].float() @ k.float().transpose(2, 3)) * (D // A) ** -0.5, -1)
                out.append(Tokens(x[:, 0], x[:, 1:], weight[:, :, 0, 1:].reshape(B, A, *grid).cpu()))
    finally:
        handle.remove()
    return Tokens(*(torch.cat(field) for field in zip(*out, strict=True)))


def principal_maps(patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """The first three principal components of ``patches [B, L, D]`` over all images, as colours ``[B, R, C, 3]`` in [0,
    1]: patches of equal colour are similar, also across images. Each component spans its 2nd to 98th percentile.

    grid: rows R and columns C of patches; None: a square.
    """
    B, L, D = patches.shape
    x = patches.reshape(B * L, D).double()
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    axes = vectors[:, values.argsort(descending=True)[: min(3, D)]]
    # The sign of a component is arbitrary; make the larger tail bright, so that equal features give equal maps.
    projected = x @ axes
    projected = projected * torch.where(projected.pow(3).sum(0) < 0, -1.0, 1.0)
    low, high = (
        (projected.quantile(q, dim=0) for q in (0.02, 0.98))
        if B * L <= 2**24
        else (projected.amin(0), projected.amax(0))
    )
    colour = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    if colour.shape[1] < 3:
        colour = torch.cat([colour, colour.new_zeros(B * L, 3 - colour.shape[1])], 1)
    return colour.view(B, *(grid or (math.isqrt(L), math.isqrt(L))), 3).float()
