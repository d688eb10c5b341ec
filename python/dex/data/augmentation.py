"""The training crop, flip and rotation as a few batched torch operations, on whatever device the images are.

Shape letters: B images, C channels, H and W their height and width, h and w those of the result.

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
from dex.common.shapes import CHANNELS, Size, check_size, height_width, statistics

AREA_SCALE = (0.2, 1.0)
MIN_AREA = 0.5 * 256**2
ASPECT = (3 / 4, 4 / 3)
TRIES = 10
MIN_BRIGHTNESS = 0.05
MAX_ROTATION = 15.0


class Crop(NamedTuple):
    """One batch's random choices. `boxes` int64 [B, 4]: top, left, height, width in pixels; `tries` int64 [B]: the
    try that was taken, `TRIES` where none was and the box is the centre one; `flip` bool [B]: left to right,
    applied first; `angle` float32 [B]: degrees, counter-clockwise as seen."""

    boxes: torch.Tensor
    tries: torch.Tensor
    flip: torch.Tensor
    angle: torch.Tensor


def augment(images: torch.Tensor, size: Size, keys: torch.Tensor) -> torch.Tensor:
    """A random crop, flip and rotation of every image, ImageNet-normalised.

    images: [B, C, H, W], uint8, or float within [0, 1], of one or three channels; keys: int64 [B] on the same device,
    see `dex.common.random.sample_keys`; returns float32 [B, C, h, w] there. size: h = w, or (h, w).

    The crop is that of the published corpus: its area is drawn from (0.2, 1) of the image's, but at least half of
    256^2 pixels (of an image smaller than that: at least half of it); its aspect log-uniformly from 3/4 to 4/3; a
    box that does not fit or is near black (mean below 0.05) is drawn again, ten times at most, after which the
    centre square is taken. Then a flip with probability 1/2 and a rotation of up to 15 degrees about the crop's
    centre; the corners it brings in are black. For a result that is no square the same holds of its shape: aspects lie
    around its own, areas are shares of the largest such box in the image, whose middle one is taken in the end.

    What happens to an image is a function of the image and its key: not of the rest of the batch, nor of any random
    number generator. On CUDA the host never waits.
    """
    images = _check_images(images, size)
    if not isinstance(keys, torch.Tensor) or keys.shape != images.shape[:1] or keys.dtype != torch.int64:
        got = f"{keys.dtype} {list(keys.shape)}" if isinstance(keys, torch.Tensor) else type(keys).__name__
        raise ValueError(f"keys: expected int64 [{len(images)}], one for each image, got {got}")
    if keys.device != images.device:
        raise ValueError(f"keys: expected a tensor on the images' device {images.device}, got one on {keys.device}")
    return render(images, draw(images, keys, size), size)


def center(images: torch.Tensor, size: Size, channels: int | None = None) -> torch.Tensor:
    """The centre of every image at `size`, the largest box of that shape, ImageNet-normalised: what evaluation sees.

    images: [B, C, H, W], uint8, or float within [0, 1], of one or three channels; returns float32 [B, C, h, w]. size:
    h = w, or (h, w). Antialiased; an image that already has that size is not resampled. channels: what the images come
    to, see `with_channels`; None: as they are.
    """
    images = _check_images(images, size)
    if channels is not None:
        images = with_channels(images, channels)
    top, left, high, wide = centre_box(images.shape[2], images.shape[3], size)
    out = images[:, :, top : top + high, left : left + wide].to(torch.float32, copy=True)
    target = height_width(size)
    if len(images) == 0:
        return out.new_zeros(0, images.shape[1], *target)
    if (high, wide) != target:
        out = F.interpolate(out, target, mode="bilinear", antialias=True, align_corners=False)
    return _normalize_(out, 255 if images.dtype == torch.uint8 else 1)


def centre_box(height: int, width: int, size: Size) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest box of `size`'s shape in the middle of an image."""
    high, wide = height_width(size)
    if width * high >= height * wide:
        box = (height, min(width, max(1, round(height * wide / high))))
    else:
        box = (min(height, max(1, round(width * high / wide))), width)
    return (height - box[0]) // 2, (width - box[1]) // 2, *box


def luminance(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] -> [B, 1, H, W] of the same dtype by ITU-R 601-2, as Pillow makes grey of colours; [B, 1, H, W] as
    it is."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.float().unbind(1)
    grey = (red * 299 + green * 587 + blue * 114) / 1000
    return (grey.round() if images.dtype == torch.uint8 else grey).to(images.dtype)[:, None]


def with_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Images of one or three channels with so many: colours become `luminance`, grey three equal channels (a view)."""
    return luminance(images) if channels == 1 else images.expand(-1, channels, -1, -1)


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """The inverse of the ImageNet normalisation: [B, C, H, W] or [C, H, W] -> the same shape, float, not clamped."""
    if images.ndim not in (3, 4) or images.shape[-3] not in CHANNELS or not images.is_floating_point():
        raise ValueError(
            "images: expected a float tensor [B, C, H, W] or [C, H, W] of one or three channels, got "
            f"{images.dtype} {list(images.shape)}"
        )
    mean, std = _statistics(images.device, images.shape[-3])
    return images * std + mean


def draw(images: torch.Tensor, keys: torch.Tensor, size: Size = 1) -> Crop:
    """Draw what `augment` does to each image of `images [B, C, H, W]`; of the pixels only brightness matters, of `size`
    its shape."""
    batch, _, height, width = images.shape
    high, wide = height_width(size)
    middle = centre_box(height, width, size)
    device = images.device
    numbers = uniform(keys, 4 * TRIES + 2)
    u_area, u_aspect, u_top, u_left = numbers[:, : 4 * TRIES].reshape(batch, 4, TRIES).unbind(1)

    area = height * width if high == wide else middle[2] * middle[3]
    low = max(AREA_SCALE[0] * area, 0.5 * min(area, 2 * MIN_AREA))
    areas = low + u_area * (AREA_SCALE[1] * area - low)
    log_aspect = math.log(ASPECT[0] * wide / high) + u_aspect * (math.log(ASPECT[1]) - math.log(ASPECT[0]))
    heights = torch.sqrt(areas * torch.exp(-log_aspect)).round().long()
    widths = torch.sqrt(areas * torch.exp(log_aspect)).round().long()
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    heights, widths = heights.clamp(1, height), widths.clamp(1, width)
    # u < 1, but the product may round up to the bound itself
    tops = torch.minimum((u_top * (height - heights + 1)).long(), height - heights)
    lefts = torch.minimum((u_left * (width - widths + 1)).long(), width - widths)

    boxes = torch.stack([tops, lefts, heights, widths], dim=2)  # [B, TRIES, 4]
    accepted = fits & (brightness(images, boxes) >= MIN_BRIGHTNESS)
    centre = boxes.new_empty(batch, 1, 4)
    _fill_(centre, middle)
    boxes = torch.cat([boxes, centre], dim=1)
    accepted = torch.cat([accepted, torch.ones(batch, 1, dtype=torch.bool, device=device)], dim=1)
    tries = accepted.int().argmax(dim=1)  # the first of equal maxima
    boxes = boxes.gather(1, tries[:, None, None].expand(batch, 1, 4))[:, 0]
    return Crop(boxes, tries, numbers[:, -2] < 0.5, (2 * numbers[:, -1] - 1) * MAX_ROTATION)


def brightness(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Mean over pixels and channels, in [0, 1], of boxes [B, T, 4] of images [B, C, H, W]; float64 [B, T].

    Exact for uint8 images: the integral image holds whole numbers.
    """
    batch, channels, height, width = images.shape
    if images.dtype == torch.uint8:
        # the widest type costs twice the time, so it is taken only where sums may leave 32 bits
        dtype = torch.int32 if height * width * channels * 255 < 2**31 else torch.int64
        full = 255
        # in 16 bits: a sum over dim 1 would first make a wide copy of the whole batch
        grey = images[:, 0].short()
        for channel in range(1, channels):
            grey = grey + images[:, channel]
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


def render(images: torch.Tensor, crop: Crop, size: Size) -> torch.Tensor:
    """Cut, flip, rotate and normalise: images [B, C, H, W] -> float32 [B, C, h, w], one grid_sample.

    Where a crop may be larger than the result, every result pixel is the mean of k x k samples, k the nearest whole
    number to max(H, W) / max(h, w), so that no detail is skipped.
    """
    batch, channels, height, width = images.shape
    target = height_width(size)
    if batch == 0:
        return torch.zeros(0, channels, *target, device=images.device)
    k = max(1, round(max(height, width) / max(target)))
    radians = torch.deg2rad(crop.angle.float())
    cos, sin = torch.cos(radians)[:, None], torch.sin(radians)[:, None]
    sign = 1 - 2 * crop.flip.float()[:, None]
    at_y, at_x = (_places(k * side, images.device) for side in target)
    # result position (at_x, at_y) -> position in the crop: turn back, then unflip -> position in the image, both
    # within [-1, 1]. Each coordinate is a term of x plus a term of y, so one broadcast sum makes it.
    top, left, h, w = crop.boxes.float()[:, :, None].unbind(1)
    half = torch.stack([w / width, h / height], dim=2)  # [B, 1, 2]: half the crop's width and height
    middle = torch.stack([(2 * left + w) / width - 1, (2 * top + h) / height - 1], dim=2)
    # A rotation keeps lengths in pixels of the result, which are not those of [-1, 1] unless it is a square.
    stretch = target[0] / target[1]
    of_x = torch.stack([sign * cos * at_x, sin / stretch * at_x], dim=2) * half + middle  # [B, k w, 2]
    of_y = torch.stack([-sign * sin * stretch * at_y, cos * at_y], dim=2) * half  # [B, k h, 2]
    grid = of_x[:, None] + of_y[:, :, None]  # [B, k h, k w, 2]
    out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    # what a rotation brings in from beyond the crop is black; 1e-5: nothing is without one, rounding included
    outside = (grid.sub_(middle[:, None]).abs_() > half[:, None] * (1 + 1e-5)).any(dim=3)
    out.masked_fill_(outside[:, None], 0)
    if k > 1:
        out = F.avg_pool2d(out, k)
    return _normalize_(out, 255 if images.dtype == torch.uint8 else 1)


def _normalize_(images: torch.Tensor, full: int) -> torch.Tensor:
    # values run to `full`: scaling the statistics instead of the images saves a pass over the batch
    mean, std = _statistics(images.device, images.shape[1])
    return images.sub_(mean * full).div_(std * full)


def _statistics(device: torch.device, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = []
    for values in statistics(channels):
        tensors.append(torch.empty(channels, device=device))
        _fill_(tensors[-1], values)
    return tensors[0].reshape(-1, 1, 1), tensors[1].reshape(-1, 1, 1)


def _places(count: int, device: torch.device) -> torch.Tensor:
    """The middles of `count` equal parts of [-1, 1]."""
    return (2 * torch.arange(count, device=device, dtype=torch.float32) + 1) / count - 1


def _fill_(out: torch.Tensor, values: tuple[float, ...]) -> None:
    """out [..., i] = values[i]; torch.tensor(values, device=...) would wait for a copy from the host."""
    for number, value in enumerate(values):
        out[..., number].fill_(value)


def _check_images(images: torch.Tensor, size: Size) -> torch.Tensor:
    is_tensor = isinstance(images, torch.Tensor)
    if not is_tensor or images.ndim != 4 or images.shape[1] not in CHANNELS or 0 in images.shape[2:]:
        got = list(images.shape) if is_tensor else type(images).__name__
        raise ValueError(f"images: expected a tensor [B, 3, H, W], or [B, 1, H, W], got {got}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images: expected uint8 or float, got {images.dtype}")
    check_size("size", size)
    return images
