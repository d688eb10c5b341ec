"""A masked autoencoder with a loop over experts in plain torch, as one would write it without this library.

Letters: B images, L patches, N tokens (CLS first), D width, E experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexkernels.testing import ExpertLoop


class Losses(NamedTuple):
    """Results of a forward."""

    pixels: Tensor
    align: Tensor
    balance: Tensor
    gate_mass: list[Tensor]
    """Per layer ``[E]``."""


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP with residuals; the MLP is dense without ``experts``."""

    def __init__(self, dim: int, heads: int, experts: nn.Module | None = None):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = experts or nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        B, N, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))
        y = self.mlp(self.norm2(x))
        if isinstance(y, tuple):
            return x + y[0], y[1:]
        return x + y, ()


class PlainMAE(nn.Module):
    """The sizes of ``dex.model.MaskedAutoencoder``, with `ExpertLoop` layers in the encoder."""

    def __init__(
        self, size: int, patch: int, encoder: tuple[int, int, int], decoder: tuple[int, int, int], experts: int, k: int
    ):
        """encoder, decoder: width, depth, heads."""
        super().__init__()
        (D, depth, heads), (d, decoder_depth, decoder_heads) = encoder, decoder
        self.patch, patches = patch, (size // patch) ** 2
        self.embed = nn.Conv2d(3, D, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, D))
        self.position = nn.Parameter(torch.randn(1, 1 + patches, D) / 50, requires_grad=False)
        self.blocks = nn.ModuleList(PlainBlock(D, heads, ExpertLoop(D, 4 * D, experts, k)) for _ in range(depth))
        self.norm, self.decoder_embed = nn.LayerNorm(D), nn.Linear(D, d)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        self.decoder_position = nn.Parameter(torch.randn(1, 1 + patches, d) / 50, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(PlainBlock(d, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm, self.predict = nn.LayerNorm(d), nn.Linear(d, patch**2 * 3)

    def forward(self, images: Tensor, mask_ratio: float = 0.75) -> Losses:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position[:, 1:]
        B, L, D = x.shape
        kept = int(L * (1 - mask_ratio))
        shuffled = torch.rand(B, L).argsort(1)
        back = shuffled.argsort(1)
        x = x.gather(1, shuffled[:, :kept, None].expand(-1, -1, D))
        x = torch.cat([(self.cls + self.position[:, :1]).expand(B, -1, -1), x], 1)
        align, balance, masses = 0, 0, []
        for i, block in enumerate(self.blocks):
            x, (block_align, block_balance, mass) = block(x)
            align, balance = align + block_align / (len(self.blocks) - i), balance + block_balance
            masses.append(mass)
        x = self.decoder_embed(self.norm(x))
        x_ = torch.cat([x[:, 1:], self.mask_token.expand(B, L - kept, -1)], 1)
        x_ = x_.gather(1, back[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], x_], 1) + self.decoder_position
        for block in self.decoder_blocks:
            x, _ = block(x)
        predicted = self.predict(self.decoder_norm(x))[:, 1:]
        P, G = self.patch, images.shape[2] // self.patch
        target = images.reshape(B, 3, G, P, G, P).permute(0, 2, 4, 3, 5, 1).reshape(B, L, -1)
        mask = (back >= kept).float()
        pixels = ((predicted - target).square().mean(-1) * mask).sum() / mask.sum()
        return Losses(pixels, align / len(self.blocks), balance / len(self.blocks), masses)

    def update_directors(self, masses: list[Tensor], momentum: float) -> None:
        for block, mass in zip(self.blocks, masses, strict=True):
            block.mlp.update_director(mass, momentum)
