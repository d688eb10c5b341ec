"""Decide whether two images show the same, after one is shifted and scaled onto the other.

``align`` finds the shift and scale by Gauss-Newton steps from coarse to fine, with free gain and offset of the grey
levels. Then it correlates the images where they overlap: ``coarse`` uses the levels; ``fine`` and ``finest`` use only
detail, without structures wider than a few pixels. For a copy, however transformed, all three are near 1. Neighbouring
slices of a volume agree in ``coarse``, but have their own edges and noise in the others.

Shape letters: P pairs; S ``SIDE``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 128
COPY = 0.988
"""Least ``finest`` correlation of a copy. Measured by ``benchmarks/test_leak.py``, like the next two."""
RELATED, COARSE = 0.85, 0.9
"""Least ``fine`` and ``coarse`` correlation of two images of the same anatomy, copies or neighbours."""
_MOST_SHIFT, _MOST_SCALE = 0.3, 0.25  # Relative to half a side; natural logarithm
_LEVELS = ((16, 5), (32, 5))  # Sides and steps for all pairs
_FINER = ((64, 4), (SIDE, 3))  # The same for pairs that are similar after these
_SMOOTH, _WIDE, _NARROW = 1.2, 4.0, 2.0  # Pixels: detail is coarser than the first, and finer than one of the others
_DETAIL = 0.5  # Levels of 255: images with less detail have nothing to compare
_LEAST_OVERLAP = 0.5


class Alignment(NamedTuple):
    """shift: [P, 2], of a relative to b, along x and y in sides; scale: [P, 2], length of b's sides in a, relative to
    a's; coarse, fine, finest: [P], correlations in [-1, 1], -1 if the images do not overlap or have no detail."""

    shift: Tensor
    scale: Tensor
    coarse: Tensor
    fine: Tensor
    finest: Tensor


@torch.no_grad()
def align(a: Tensor, b: Tensor, start: Tensor) -> Alignment:
    """Align P pairs of images, float32 [P, S, S] each, levels 0..255.

    start: [P, 3], shift along x and y in half sides, and scale, that map a place in b to one in a.
    """
    place = torch.cat([start[:, :2], start[:, 2:].log().expand(-1, 2)], dim=1)
    for side, steps in _LEVELS:
        place = _steps(_smaller(a, side), _smaller(b, side), place, steps)
    side = _LEVELS[-1][0]
    coarse = _correlation(*_overlap(_smaller(a, side), _smaller(b, side), place))
    fine, finest = torch.full_like(coarse, -1), torch.full_like(coarse, -1)
    near = torch.nonzero(coarse >= COARSE)[:, 0]
    if len(near):
        a, b, finer = a[near], b[near], place[near]
        for side, steps in _FINER:
            finer = _steps(_smaller(a, side), _smaller(b, side), finer, steps)
        moved, b, inside = _overlap(a, b, finer)
        place[near], coarse[near] = finer, _correlation(moved, b, inside)
        fine[near] = _fine_correlation(moved, b, inside, _WIDE)
        finest[near] = _fine_correlation(moved, b, inside, _NARROW)
    return Alignment(place[:, :2] / 2, place[:, 2:].exp(), coarse, fine, finest)


def _steps(a: Tensor, b: Tensor, place: Tensor, count: int) -> Tensor:
    """Improve ``place`` by ``count`` Gauss-Newton steps that fit gain * a(place) + offset to b."""
    side = a.shape[-1]
    down, across = torch.gradient(a, dim=(1, 2))
    layers = torch.stack([a, across * side / 2, down * side / 2], dim=1)
    centre = _centres(side)
    for _ in range(count):
        grid = _grid(place, side)
        inside = (grid.abs() <= 1).all(dim=-1).float()
        moved, by_x, by_y = F.grid_sample(layers, grid, padding_mode="border", align_corners=False).unbind(1)
        pixels = inside.sum((1, 2), keepdim=True).clamp_min(1)
        x = (moved - (moved * inside).sum((1, 2), keepdim=True) / pixels) * inside
        y = (b - (b * inside).sum((1, 2), keepdim=True) / pixels) * inside
        gain = (x * y).sum((1, 2), keepdim=True) / (x * x).sum((1, 2), keepdim=True).clamp_min(1e-6)
        scale = place[:, 2:].exp()[:, :, None, None]
        slopes = (
            torch.stack([by_x, by_y, by_x * centre * scale[:, 0], by_y * centre[:, None] * scale[:, 1]], dim=1)
            * (gain * inside)[:, None]
        )
        slopes = slopes - slopes.sum((2, 3), keepdim=True) / pixels[:, None] * inside[:, None]
        slopes = slopes.flatten(2)
        normal = slopes @ slopes.transpose(1, 2)
        damping = 1e-3 * normal.diagonal(dim1=1, dim2=2).mean(dim=1) + 1e-6
        normal = normal + damping[:, None, None] * torch.eye(4)
        change = torch.linalg.solve(normal, slopes @ (y - gain * x).flatten(1)[:, :, None])[:, :, 0]
        place = place + change.clamp(-0.1, 0.1)
        limit = torch.tensor([_MOST_SHIFT, _MOST_SHIFT, _MOST_SCALE, _MOST_SCALE])
        place = torch.minimum(torch.maximum(place, -limit), limit)
    return place


def _centres(side: int) -> Tensor:
    """[side]: centres of the pixels, from -1 to 1."""
    return (torch.arange(side) + 0.5) / side * 2 - 1


def _grid(place: Tensor, side: int) -> Tensor:
    """[P, side, side, 2]: the place in a of each pixel of b."""
    centre = _centres(side)
    x, y = (centre * place[:, 2 + i, None].exp() + place[:, i, None] for i in (0, 1))
    return torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)


def _overlap(a: Tensor, b: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a resampled onto b, b, and a mask of the pixels where both are."""
    grid = _grid(place, a.shape[-1])
    moved = F.grid_sample(a[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    return moved, b, (grid.abs() <= 1).all(dim=-1)


def _fine_correlation(a: Tensor, b: Tensor, inside: Tensor, wide: float) -> Tensor:
    a, b = (_blurred(image, _SMOOTH) - _blurred(image, wide) for image in (a, b))
    inner = F.avg_pool2d(inside.float()[:, None], 9, stride=1, padding=4, count_include_pad=False)[:, 0] > 0.999
    return _correlation(a, b, inner, _DETAIL * wide / _WIDE)


def _correlation(a: Tensor, b: Tensor, inside: Tensor, least: float = 0.0) -> Tensor:
    """[P]: correlation over the pixels ``inside``; -1 if these are few, or if a standard deviation is at most
    ``least``."""
    weight = inside.float()
    pixels = weight.sum((1, 2), keepdim=True).clamp_min(1)
    a, b = ((image - (image * weight).sum((1, 2), keepdim=True) / pixels) * weight for image in (a, b))
    variance_a, variance_b = ((image * image).sum((1, 2)) / pixels[:, 0, 0] for image in (a, b))
    value = (a * b).sum((1, 2)) / pixels[:, 0, 0] / (variance_a * variance_b).sqrt().clamp_min(1e-6)
    enough = (torch.minimum(variance_a, variance_b) > least**2) & (weight.mean((1, 2)) >= _LEAST_OVERLAP)
    return torch.where(enough, value, -torch.ones(()))


def _smaller(images: Tensor, side: int) -> Tensor:
    """[P, side, side], slightly blurred at full size: slopes of single pixels give no direction."""
    if side == images.shape[-1]:
        return _blurred(images, 0.7)
    return F.adaptive_avg_pool2d(images[:, None], side)[:, 0]


def _blurred(images: Tensor, sigma: float) -> Tensor:
    reach = int(3 * sigma + 0.5)
    kernel = torch.exp(-0.5 * ((torch.arange(2 * reach + 1) - reach) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    wide = F.pad(images[:, None], (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(F.conv2d(wide, kernel[None, None, None]), kernel[None, None, :, None])[:, 0]
