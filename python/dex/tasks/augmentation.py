"""The same random change of images and their masks: flip, scale, shift, rotation, and the images' intensity.

Numbers are hashes of a key per image (`dex.common.random`): what happens to an image does not depend on ranks, on the
rest of its batch, or on what was drawn before.

Shape letters: B images, S their side.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dex.common.random import uniform
from dex.data import center
from dex.tasks.recipe import Settings
from dex.tasks.task import IGNORED

_NUMBERS = 8


def augment(
    images: Tensor, masks: Tensor | None, keys: Tensor, settings: Settings, channels: int = 3
) -> tuple[Tensor, Tensor | None]:
    """uint8 ``[B, 3, S, S]`` and uint8 ``[B, S, S]`` -> normalised float32 ``[B, C, S, S]`` and uint8 ``[B, S, S]``.

    keys: int64 ``[B]``. channels: C, 3 or 1, as the model takes. What comes in from beyond an image is black, and
    `IGNORED` in its mask.
    """
    size = images.shape[-1]
    numbers = 2 * uniform(keys, _NUMBERS) - 1
    grid = F.affine_grid(_transforms(numbers, settings), [len(images), 1, size, size], align_corners=False)
    out = F.grid_sample(images.float() / 255, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if settings.intensity:
        contrast, brightness = (1 + settings.intensity * numbers[:, 6], settings.intensity * numbers[:, 7])
        inside = (grid.abs() <= 1).all(-1)[:, None]
        changed = (out - 0.5) * contrast[:, None, None, None] + 0.5 + brightness[:, None, None, None]
        out = torch.where(inside, changed, out)
    out = center(out.clamp_(0, 1), size, channels)
    if masks is None:
        return out, None
    # One more, so that what is beyond the mask is 0, and one less in uint8 is IGNORED.
    moved = F.grid_sample(masks[:, None].float() + 1, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    values = moved[:, 0].round_() - 1
    return out, values.masked_fill_(values < 0, IGNORED).to(torch.uint8)


def _transforms(numbers: Tensor, settings: Settings) -> Tensor:
    """``[B, 2, 3]``: a place in the result -> its place in the image. ``numbers [B, 8]`` in [-1, 1)."""
    grows = (1 - settings.scale) ** -1
    zoom = torch.exp(numbers[:, 0] * math.log(grows))
    angle = torch.deg2rad(numbers[:, 1] * settings.rotation)
    mirror = torch.where((numbers[:, 4] < 0) & (settings.flips in ("horizontal", "both")), -1.0, 1.0)
    upset = torch.where((numbers[:, 5] < 0) & (settings.flips == "both"), -1.0, 1.0)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    x = torch.stack([cos * mirror, -sin * upset, numbers[:, 2] * settings.shift], 1)
    y = torch.stack([sin * mirror, cos * upset, numbers[:, 3] * settings.shift], 1)
    return torch.stack([x, y], 1)
