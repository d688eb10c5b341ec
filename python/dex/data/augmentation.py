"""The training crop, flip and rotation as a few batched torch operations, on whatever device the images are.

Shape letters: B images, H and W their height and width, S side of the result.

The result agrees with the same formula in float64 to 2e-4 (normalised units) for 8-bit images: grid_sample computes
positions in float32, so a pixel is taken from within 1e-4 pixels of where it should be.

Random numbers are hashes of a key per image, see `dex.common.random`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dex.common.random import uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

AREA_SCALE = (0.2, 1.0)
MIN_AREA = 0.5 * 256**2
ASPECT = (3 / 4, 4 / 3)
TRIES = 10
MIN_BRIGHTNESS = 0.05
MAX_ROTATION = 15.0


class Crop(NamedTuple):
    """One batch's random choices. `boxes` int64 [B, 4]: top, left, height, width in pixels; `tries` int64 [B]: the
    try that was taken, `TRIES` where none was and the box is the centre square; `flip` bool [B]: left to right,
    applied first; `angle` float32 [B]: degrees, counter-clockwise as seen."""

    boxes: torch.Tensor
    tries: torch.Tensor
    flip: torch.Tensor
    angle: torch.Tensor


def augment(images: torch.Tensor, size: int, keys: torch.Tensor) -> torch.Tensor:
    """A random crop, flip and rotation of every image, ImageNet-normalised.

    images: [B, 3, H, W], uint8, or float within [0, 1]; keys: int64 [B] on the same device, see
    `dex.common.random.sample_keys`; returns float32 [B, 3, size, size] there.

    The crop is that of the published corpus: its area is drawn from (0.2, 1) of the image's, but at least half of
    256^2 pixels (of an image smaller than that: at least half of it); its aspect log-uniformly from 3/4 to 4/3; a
    box that does not fit or is near black (mean below 0.05) is drawn again, ten times at most, after which the
    centre square is taken. Then a flip with probability 1/2 and a rotation of up to 15 degrees about the crop's
    centre; the corners it brings in are black.

    What happens to an image is a function of the image and its key: not of the rest of the batch, nor of any random
    number generator. On CUDA the host never waits.
    """
    images = _check_images(images, size)
    if not isinstance(keys, torch.Tensor) or keys.shape != images.shape[:1] or keys.dtype != torch.int64:
        got = f"{keys.dtype} {list(keys.shape)}" if isinstance(keys, torch.Tensor) else type(keys).__name__
        raise ValueError(f"keys: expected int64 [{len(images)}], one for each image, got {got}")
    if keys.device != images.device:
        raise ValueError(f"keys: expected a tensor on the images' device {images.device}, got one on {keys.device}")
    return render(images, draw(images, keys), size)


def center(images: torch.Tensor, size: int) -> torch.Tensor:
    """The centre square of every image at `size`, ImageNet-normalised: what evaluation sees.

    images: [B, 3, H, W], uint8, or float within [0, 1]; returns float32 [B, 3, size, size]. Antialiased; an image
    that is already size x size is not resampled.
    """
    images = _check_images(images, size)
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    out = images[:, :, top : top + side, left : left + side].to(torch.float32, copy=True)
    if len(images) == 0:
        return out.new_zeros(0, 3, size, size)
    if side != size:
        out = F.interpolate(out, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return _normalize_(out, 255 if images.dtype == torch.uint8 else 1)


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """The inverse of the ImageNet normalisation: [B, 3, H, W] or [3, H, W] -> the same shape, float, not clamped."""
    if images.ndim not in (3, 4) or images.shape[-3] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images: expected a float tensor [B, 3, H, W] or [3, H, W], got {images.dtype} {list(images.shape)}"
        )
    mean, std = _statistics(images.device)
    return images * std + mean


def draw(images: torch.Tensor, keys: torch.Tensor) -> Crop:
    """Draw what `augment` does to each image of `images [B, 3, H, W]`; of the pixels only brightness matters."""
    batch, _, height, width = images.shape
    device = images.device
    numbers = uniform(keys, 4 * TRIES + 2)
    u_area, u_aspect, u_top, u_left = numbers[:, : 4 * TRIES].reshape(batch, 4, TRIES).unbind(1)

    area = height * width
    low = max(AREA_SCALE[0] * area, 0.5 * min(area, 2 * MIN_AREA))
    areas = low + u_area * (AREA_SCALE[1] * area - low)
    log_aspect = math.log(ASPECT[0]) + u_aspect * (math.log(ASPECT[1]) - math.log(ASPECT[0]))
    heights = torch.sqrt(areas * torch.exp(-log_aspect)).round().long()
    widths = torch.sqrt(areas * torch.exp(log_aspect)).round().long()
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    heights, widths = heights.clamp(1, height), widths.clamp(1, width)
    # u < 1, but the product may round up to the bound itself
    tops = torch.minimum((u_top * (height - heights + 1)).long(), height - heights)
    lefts = torch.minimum((u_left * (width - widths + 1)).long(), width - widths)

    boxes = torch.stack([tops, lefts, heights, widths], dim=2)  # [B, TRIES, 4]
    accepted = fits & (brightness(images, boxes) >= MIN_BRIGHTNESS)
    side = min(height, width)
    centre = boxes.new_empty(batch, 1, 4)
    _fill_(centre, ((height - side) // 2, (width - side) // 2, side, side))
    boxes = torch.cat([boxes, centre], dim=1)
    accepted = torch.cat([accepted, torch.ones(batch, 1, dtype=torch.bool, device=device)], dim=1)
    tries = accepted.int().argmax(dim=1)  # the first of equal maxima
    boxes = boxes.gather(1, tries[:, None, None].expand(batch, 1, 4))[:, 0]
    return Crop(boxes, tries, numbers[:, -2] < 0.5, (2 * numbers[:, -1] - 1) * MAX_ROTATION)


def brightness(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Mean over pixels and channels, in [0, 1], of boxes [B, T, 4] of images [B, 3, H, W]; float64 [B, T].

    Exact for uint8 images: the integral image holds whole numbers.
    """
    batch, channels, height, width = images.shape
    if images.dtype == torch.uint8:
        # the widest type costs twice the time, so it is taken only where sums may leave 32 bits
        dtype = torch.int32 if height * width * channels * 255 < 2**31 else torch.int64
        full = 255
        # in 16 bits: a sum over dim 1 would first make a wide copy of the whole batch
        grey = images[:, 0].short() + images[:, 1] + images[:, 2]
    else:
        dtype, full = torch.float64, 1
        grey = images.sum(1, dtype=dtype)
    summed = grey.cumsum(1, dtype=dtype).cumsum(2, dtype=dtype)
    summed = F.pad(summed, (1, 0, 1, 0)).flatten(1)  # [B, (H+1)(W+1)]
    top, left, h, w = boxes.unbind(2)

    def corner(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return summed.gather(1, rows * (width + 1) + columns)

    total = corner(top + h, left + w) - corner(top, left + w) - corner(top + h, left) + corner(top, left)
    return total.double() / (h * w * (channels * full))


def render(images: torch.Tensor, crop: Crop, size: int) -> torch.Tensor:
    """Cut, flip, rotate and normalise: images [B, 3, H, W] -> float32 [B, 3, size, size], one grid_sample.

    Where a crop may be larger than the result, every result pixel is the mean of k x k samples, k the nearest whole
    number to max(H, W) / size, so that no detail is skipped.
    """
    batch, _, height, width = images.shape
    if batch == 0:
        return torch.zeros(0, 3, size, size, device=images.device)
    k = max(1, round(max(height, width) / size))
    radians = torch.deg2rad(crop.angle.float())
    cos, sin = torch.cos(radians)[:, None], torch.sin(radians)[:, None]
    sign = 1 - 2 * crop.flip.float()[:, None]
    samples = k * size
    at = (2 * torch.arange(samples, device=images.device, dtype=torch.float32) + 1) / samples - 1
    # result position (at[x], at[y]) -> position in the crop: turn back, then unflip -> position in the image, both
    # within [-1, 1]. Each coordinate is a term of x plus a term of y, so one broadcast sum makes it.
    top, left, h, w = crop.boxes.float()[:, :, None].unbind(1)
    half = torch.stack([w / width, h / height], dim=2)  # [B, 1, 2]: half the crop's width and height
    middle = torch.stack([(2 * left + w) / width - 1, (2 * top + h) / height - 1], dim=2)
    of_x = torch.stack([sign * cos * at, sin * at], dim=2) * half + middle  # [B, samples, 2]
    of_y = torch.stack([-sign * sin * at, cos * at], dim=2) * half
    grid = of_x[:, None] + of_y[:, :, None]  # [B, samples, samples, 2]
    out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    # what a rotation brings in from beyond the crop is black; 1e-5: nothing is without one, rounding included
    outside = (grid.sub_(middle[:, None]).abs_() > half[:, None] * (1 + 1e-5)).any(dim=3)
    out.masked_fill_(outside[:, None], 0)
    if k > 1:
        out = F.avg_pool2d(out, k)
    return _normalize_(out, 255 if images.dtype == torch.uint8 else 1)


def _normalize_(images: torch.Tensor, full: int) -> torch.Tensor:
    # values run to `full`: scaling the statistics instead of the images saves a pass over the batch
    mean, std = _statistics(images.device)
    return images.sub_(mean * full).div_(std * full)


def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = torch.empty(3, device=device), torch.empty(3, device=device)
    _fill_(mean, IMAGENET_MEAN)
    _fill_(std, IMAGENET_STD)
    return mean.reshape(3, 1, 1), std.reshape(3, 1, 1)


def _fill_(out: torch.Tensor, values: tuple[float, ...]) -> None:
    """out [..., i] = values[i]; torch.tensor(values, device=...) would wait for a copy from the host."""
    for number, value in enumerate(values):
        out[..., number].fill_(value)


def _check_images(images: torch.Tensor, size: int) -> torch.Tensor:
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        got = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"images: expected a tensor [B, 3, H, W], got {got}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images: expected uint8 or float, got {images.dtype}")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size: expected a positive whole number, got {size!r}")
    return images
