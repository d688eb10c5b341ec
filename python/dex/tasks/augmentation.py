"""Random flips, scaling, shifts and rotations of images together with their masks, and changes of intensity.

Random numbers are hashes of a key per image (``dex.common.random``), so the result does not depend on ranks, on the
rest of the batch, or on earlier draws.

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

    keys: int64 ``[B]``. channels: C, 3 or 1, of the model. Areas from outside an image are black and, in the mask,
    ``IGNORED``.
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
    # Masks are shifted by 1, so that 0 marks the outside and becomes IGNORED.
    moved = F.grid_sample(masks[:, None].float() + 1, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    values = moved[:, 0].round_() - 1
    return out, values.masked_fill_(values < 0, IGNORED).to(torch.uint8)


def _transforms(numbers: Tensor, settings: Settings) -> Tensor:
    """Affine maps ``[B, 2, 3]`` from positions in the result to those in the image. ``numbers [B, 8]`` in [-1, 1)."""
    largest_zoom = (1 - settings.scale) ** -1
    zoom = torch.exp(numbers[:, 0] * math.log(largest_zoom))
    angle = torch.deg2rad(numbers[:, 1] * settings.rotation)
    flip_x = torch.where((numbers[:, 4] < 0) & (settings.flips in ("horizontal", "both")), -1.0, 1.0)
    flip_y = torch.where((numbers[:, 5] < 0) & (settings.flips == "both"), -1.0, 1.0)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    x = torch.stack([cos * flip_x, -sin * flip_y, numbers[:, 2] * settings.shift], 1)
    y = torch.stack([sin * flip_x, cos * flip_y, numbers[:, 3] * settings.shift], 1)
    return torch.stack([x, y], 1)
