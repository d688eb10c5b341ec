"""Heads on the encoder's tokens: classification, and linear probes for classification and segmentation.

Letters: B images, L patches, G patches per side, D width, C classes, S image side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pooled(tokens: Tensor) -> Tensor:
    """``tokens [B, 1 + L, D]``, CLS first, ``-> [B, 2 D]``: the CLS token and the mean of the patches, concatenated."""
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


class ClassificationHead(nn.Module):
    """``tokens [B, 1 + L, D] -> logits [B, C]``: CLS token and mean of patches, LayerNorm, dropout, a linear map.

    linear: a linear probe, without dropout and without weights in LayerNorm.
    """

    def __init__(self, dim: int, classes: int, dropout: float = 0.0, linear: bool = False):
        super().__init__()
        self.norm: nn.LayerNorm = nn.LayerNorm(2 * dim, elementwise_affine=not linear)
        self.dropout: nn.Dropout = nn.Dropout(0.0 if linear else dropout)
        self.linear: nn.Linear = nn.Linear(2 * dim, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.dropout(self.norm(pooled(tokens))))


class LinearSegmentation(nn.Module):
    """``tokens [B, 1 + L, D] -> logits [B, C, S, S]``: one linear map on every patch, resized bilinearly."""

    def __init__(self, dim: int, classes: int, img_size: int):
        super().__init__()
        self.img_size = img_size
        self.norm: nn.LayerNorm = nn.LayerNorm(dim, elementwise_affine=False)
        self.linear: nn.Linear = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = as_map(self.linear(self.norm(tokens)))
        return F.interpolate(logits, (self.img_size, self.img_size), mode="bilinear", align_corners=False)


def as_map(tokens: Tensor) -> Tensor:
    """``[B, 1 + G * G, D]``, CLS first, ``-> [B, D, G, G]``."""
    B, N, D = tokens.shape
    side = round((N - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).reshape(B, D, side, side)
