"""What the last block attends to, and where patches resemble each other.

Shape letters: B images, S image side, G patches a side, L = G * G patches, D width, A heads.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dex.model import VisionTransformer


class Tokens(NamedTuple):
    """Of whole images, after the last block and the final norm; float32 on the host."""

    cls: Tensor
    """``[B, D]``"""
    patches: Tensor
    """``[B, L, D]``"""
    attention: Tensor
    """``[B, A, R, C]``, R rows and C columns of patches: the last block's attention of the CLS token; sums to at
    most 1."""


@torch.no_grad()
def tokens(encoder: VisionTransformer, images: Tensor, *, batch_size: int = 64) -> Tokens:
    """Tokens and attention of whole ``images [B, C, S, S]``, in evaluation; the encoder's mode is kept."""
    attn, given = encoder.blocks[-1].attn, []
    training = encoder.training
    encoder.eval()
    handle = attn.register_forward_pre_hook(lambda module, arguments: given.append(arguments[0]))
    out = []
    try:
        for part in images.split(batch_size):
            given.clear()
            x = encoder(part).float().cpu()
            B, N, D = given[0].shape
            q, k, _ = attn.qkv(given[0]).view(B, N, 3, attn.num_heads, D // attn.num_heads).permute(2, 0, 3, 1, 4)
            weight = torch.softmax(
                (q[:, :, :1].float() @ k.float().transpose(2, 3)) * (D // attn.num_heads) ** -0.5, -1
            )
            out.append(Tokens(x[:, 0], x[:, 1:], weight[:, :, 0, 1:].reshape(B, attn.num_heads, *encoder.grid).cpu()))
    finally:
        handle.remove()
        encoder.train(training)
    return Tokens(*(torch.cat(column) for column in zip(*out, strict=True)))


def principal_maps(patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """The first three principal components of ``patches [B, L, D]`` of all images together, as colours ``[B, R, C, 3]``
    in [0, 1]: equal colours are alike patches, in whatever image. Each component spans its 2nd to 98th percentile.

    grid: rows R and columns C of patches; None: a square.
    """
    B, L, D = patches.shape
    x = patches.reshape(B * L, D).double()
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    axes = vectors[:, values.argsort(descending=True)[: min(3, D)]]
    # A component's sign means nothing; the larger tail is made the bright one, so that equal features give equal maps.
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
