"""UNETR in 2-D (Hatamizadeh et al. 2022): MONAI's blocks decode hidden states of the encoder to a map of classes.

With a patch side of 2^u pixels, u transposed convolutions double the patch grid until it has the size of the image.
Hidden states after a quarter, a half and three quarters of the blocks, and the image itself, are skip connections at
different scales. If the patch side is not a power of two, the next one is used, and image and result are resized.

Letters: B images, D width, G patches per side, S image side, C classes, u doublings.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dex.model.heads import as_map

_WIDEST = 8
"""Channels of the coarsest level as a multiple of the feature size, as in MONAI's UNETR."""


def skip_blocks(depth: int) -> tuple[int, ...]:
    """Numbers of blocks after which hidden states are taken: 3, 6 and 9 of 12, the quarters of other depths."""
    return tuple(sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3)} - {depth}))


class UNETR(nn.Module):
    """``images [B, in_chans, S, S], tokens [B, 1 + G * G, D], hidden states -> logits [B, C, S, S]``.

    Args:
        img_size, patch_size: S and the side of a patch, which divides S.
        dim, depth: D and the encoder's number of blocks.
        classes: C, background included.
        feature_size: channels at full size. in_chans: of the images.

    Needs MONAI. Raises: ValueError naming the argument.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        classes: int,
        feature_size: int = 16,
        in_chans: int = 3,
    ):
        super().__init__()
        if patch_size < 2:
            raise ValueError(f"patch_size: expected at least 2 for UNETR, which upsamples patches, got {patch_size}")
        if img_size % patch_size or img_size < 2 * patch_size:
            expected = f"a multiple of the patch size, {patch_size}, and at least two patches"
            raise ValueError(f"img_size: expected {expected}, got {img_size}")
        from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock

        common = {"spatial_dims": 2, "kernel_size": 3, "norm_name": "instance", "res_block": True}
        self.img_size = img_size
        self.doublings: int = (patch_size - 1).bit_length()
        self.inner_size: int = img_size // patch_size * 2**self.doublings
        """Side of the decoder's result: S, or more if the patch side is not a power of two."""
        self.after: tuple[int, ...] = skip_blocks(depth)
        u = self.doublings
        self._levels = [max(0, u - 1 - i) for i in range(len(self.after))]
        """Number of doublings of each hidden state before its skip connection."""

        def width(level: int) -> int:
            return dim if level == 0 else feature_size * min(2 ** (u - level), _WIDEST)

        self.skips: nn.ModuleList = nn.ModuleList(
            UnetrPrUpBlock(
                in_channels=dim,
                out_channels=width(level),
                num_layer=level - 1,
                stride=1,
                upsample_kernel_size=2,
                conv_block=True,
                **common,
            )
            if level
            else nn.Identity()
            for level in self._levels
        )
        same_grid = self._levels.count(0)
        self.bottom: nn.Module = (
            UnetrBasicBlock(in_channels=dim * (1 + same_grid), out_channels=dim, stride=1, **common)
            if same_grid
            else nn.Identity()
        )
        joined = {level for level in self._levels if level} | {u}
        self.ups: nn.ModuleList = nn.ModuleList()
        for level in range(1, u + 1):
            channels = {"in_channels": width(level - 1), "out_channels": feature_size if level == u else width(level)}
            if level in joined:
                self.ups.append(UnetrUpBlock(upsample_kernel_size=2, **channels, **common))
            else:
                self.ups.append(
                    UnetrPrUpBlock(
                        num_layer=0, stride=1, upsample_kernel_size=2, conv_block=False, **channels, **common
                    )
                )
        self.image: UnetrBasicBlock = UnetrBasicBlock(
            in_channels=in_chans, out_channels=feature_size, stride=1, **common
        )
        self.out: UnetOutBlock = UnetOutBlock(spatial_dims=2, in_channels=feature_size, out_channels=classes)

    def forward(self, images: Tensor, tokens: Tensor, hidden: dict[int, Tensor]) -> Tensor:
        skips: dict[int, list[Tensor]] = {}
        for after, level, block in zip(self.after, self._levels, self.skips, strict=True):
            skips.setdefault(level, []).append(block(as_map(hidden[after])))
        if self.inner_size != self.img_size:
            images = F.interpolate(images, (self.inner_size, self.inner_size), mode="bilinear", align_corners=False)
        skips[self.doublings] = [*skips.get(self.doublings, []), self.image(images)]
        x = self.bottom(torch.cat([as_map(tokens), *skips.get(0, [])], 1))
        for level, up in enumerate(self.ups, 1):
            x = up(x, *skips[level]) if level in skips else up(x)
        logits = self.out(x)
        if self.inner_size != self.img_size:
            logits = F.interpolate(logits, (self.img_size, self.img_size), mode="bilinear", align_corners=False)
        return logits
