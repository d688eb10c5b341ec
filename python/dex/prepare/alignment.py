"""Whether two images show the same, once the one is shifted and scaled to lie upon the other.

`align` finds shift and scale by Gauss-Newton steps from coarse to fine, gain and offset of the grey levels left free.
Then correlations are taken where the images overlap: `coarse`, of the levels; `fine` and `finest`, of what remains of
them when everything wider than some pixels is taken away. Of a copy, whatever was done to it, all are near 1; slices
that are neighbours in a volume are alike in the coarse one and have their own edges and noise in the others.

Shape letters: P pairs; S `SIDE`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 128
COPY = 0.988
"""The finest correlation from which on an image is a copy. Measured by `benchmarks/test_leak.py`, as is the next."""
RELATED, COARSE = 0.85, 0.9
"""The fine and the coarse correlation from which on two images show the same anatomy, copies or neighbours."""
_MOST_SHIFT, _MOST_SCALE = 0.3, 0.25  # of half a side; natural logarithm
_LEVELS = ((16, 5), (32, 5))  # sides, steps: of all pairs, then, of those that are alike, also
_FINER = ((64, 4), (SIDE, 3))
_SMOOTH, _WIDE, _NARROW = 1.2, 4.0, 2.0  # pixels: what is finer than the first, or wider than another, does not count
_DETAIL = 0.5  # levels of 255: images with less have nothing to compare
_LEAST_OVERLAP = 0.5


class Alignment(NamedTuple):
    """shift: [P, 2], of a against b, along x and y in sides; scale: [P, 2], how much longer the sides of b are in a;
    coarse, fine, finest: [P], correlations within [-1, 1]; -1 where the images do not overlap or have no detail."""

    shift: Tensor
    scale: Tensor
    coarse: Tensor
    fine: Tensor
    finest: Tensor


@torch.no_grad()
def align(a: Tensor, b: Tensor, start: Tensor) -> Alignment:
    """Of P pairs of images, float32 [P, S, S] each, levels 0..255.

    start: [P, 3], shift along x and y in half sides, and scale, which take a place in b to one in a.
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
    """`count` Gauss-Newton steps that bring gain * a(place) + offset nearer to b."""
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
    """[side]: of pixels, from -1 to 1."""
    return (torch.arange(side) + 0.5) / side * 2 - 1


def _grid(place: Tensor, side: int) -> Tensor:
    """[P, side, side, 2]: where each pixel of b lies in a."""
    centre = _centres(side)
    x, y = (centre * place[:, 2 + i, None].exp() + place[:, i, None] for i in (0, 1))
    return torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)


def _overlap(a: Tensor, b: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a laid upon b, b, and where both are."""
    grid = _grid(place, a.shape[-1])
    moved = F.grid_sample(a[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    return moved, b, (grid.abs() <= 1).all(dim=-1)


def _fine_correlation(a: Tensor, b: Tensor, inside: Tensor, wide: float) -> Tensor:
    a, b = (_blurred(image, _SMOOTH) - _blurred(image, wide) for image in (a, b))
    inner = F.avg_pool2d(inside.float()[:, None], 9, stride=1, padding=4, count_include_pad=False)[:, 0] > 0.999
    return _correlation(a, b, inner, _DETAIL * wide / _WIDE)


def _correlation(a: Tensor, b: Tensor, inside: Tensor, least: float = 0.0) -> Tensor:
    """[P]: of the pixels `inside`; -1 where these are few, or either has a standard deviation of `least` or below."""
    weight = inside.float()
    pixels = weight.sum((1, 2), keepdim=True).clamp_min(1)
    a, b = ((image - (image * weight).sum((1, 2), keepdim=True) / pixels) * weight for image in (a, b))
    variance_a, variance_b = ((image * image).sum((1, 2)) / pixels[:, 0, 0] for image in (a, b))
    value = (a * b).sum((1, 2)) / pixels[:, 0, 0] / (variance_a * variance_b).sqrt().clamp_min(1e-6)
    enough = (torch.minimum(variance_a, variance_b) > least**2) & (weight.mean((1, 2)) >= _LEAST_OVERLAP)
    return torch.where(enough, value, -torch.ones(()))


def _smaller(images: Tensor, side: int) -> Tensor:
    """[P, side, side], a little blurred at full size: slopes of single pixels lead nowhere."""
    if side == images.shape[-1]:
        return _blurred(images, 0.7)
    return F.adaptive_avg_pool2d(images[:, None], side)[:, 0]


def _blurred(images: Tensor, sigma: float) -> Tensor:
    reach = int(3 * sigma + 0.5)
    kernel = torch.exp(-0.5 * ((torch.arange(2 * reach + 1) - reach) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    wide = F.pad(images[:, None], (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(F.conv2d(wide, kernel[None, None, None]), kernel[None, None, :, None])[:, 0]
