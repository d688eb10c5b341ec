"""The training crop, flip and rotation as a few batched torch operations on the device of the images.

Shape letters: B images, C channels, H and W their height and width, h and w those of the result.

For 8-bit images the result agrees with the same formula in float64 to 2e-4 (normalised units): grid_sample computes
positions in float32, so a pixel is sampled within 1e-4 pixels of its exact position.

Random numbers are hashes of a key per image, see ``dex.common.random``.
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
    """Random choices for a batch."""

    boxes: torch.Tensor
    """int64 ``[B, 4]``: top, left, height, width in pixels."""
    tries: torch.Tensor
    """int64 ``[B]``: the accepted try; ``TRIES`` if none was accepted and the box is the centre box."""
    flip: torch.Tensor
    """bool ``[B]``: left to right, applied first."""
    angle: torch.Tensor
    """float32 ``[B]``: degrees, counter-clockwise as displayed."""


def augment(images: torch.Tensor, size: Size, keys: torch.Tensor) -> torch.Tensor:
    """A random crop, flip and rotation of every image, ImageNet-normalised; float32 ``[B, C, h, w]``.

    Args:
        images: ``[B, C, H, W]``, uint8, or float within [0, 1], of one or three channels.
        size: h = w, or (h, w).
        keys: int64 ``[B]`` on the same device, see ``dex.common.random.sample_keys``.

    The crop is that of the published corpus. Its area is drawn uniformly from (0.2, 1) of the image's area, but is at
    least half of 256^2 pixels (or at least half of a smaller image); its aspect is drawn log-uniformly from 3/4 to 4/3.
    A box that does not fit or is nearly black (mean below 0.05) is drawn again, up to ten times; then the centre square
    is taken. A flip with probability 1/2 and a rotation of up to 15 degrees about the centre of the crop follow; the
    corners of a rotated crop are black. If the result is not square, aspects are relative to its aspect and areas to
    the largest box of its shape in the image, and the last resort is that box in the middle.

    The result is a function of an image and its key, independent of the rest of the batch and of random number
    generators. On CUDA the host never waits.
    """
    images = _check_images(images, size)
    if not isinstance(keys, torch.Tensor) or keys.shape != images.shape[:1] or keys.dtype != torch.int64:
        got = f"{keys.dtype} {list(keys.shape)}" if isinstance(keys, torch.Tensor) else type(keys).__name__
        raise ValueError(f"keys: expected int64 [{len(images)}], one per image, got {got}")
    if keys.device != images.device:
        raise ValueError(f"keys: expected a tensor on the images' device {images.device}, got one on {keys.device}")
    return render(images, draw(images, keys, size), size)


def center(images: torch.Tensor, size: Size, channels: int | None = None) -> torch.Tensor:
    """The largest centre box of every image in the shape of ``size``, resized and ImageNet-normalised, for evaluation.

    images: ``[B, C, H, W]``, uint8, or float within [0, 1], of one or three channels; returns float32 ``[B, C, h, w]``.
    size: h = w, or (h, w). Antialiased; an image of that size is not resampled. channels: of the result, see
    ``with_channels``; None keeps those of the images.
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
    """Top, left, height and width of the largest centred box with the aspect of ``size``."""
    high, wide = height_width(size)
    if width * high >= height * wide:
        box = (height, min(width, max(1, round(height * wide / high))))
    else:
        box = (min(height, max(1, round(width * high / wide))), width)
    return (height - box[0]) // 2, (width - box[1]) // 2, *box


def luminance(images: torch.Tensor) -> torch.Tensor:
    """``[B, 3, H, W] -> [B, 1, H, W]`` of the same dtype by ITU-R 601-2, as in Pillow; one channel is unchanged."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.float().unbind(1)
    grey = (red * 299 + green * 587 + blue * 114) / 1000
    return (grey.round() if images.dtype == torch.uint8 else grey).to(images.dtype)[:, None]


def with_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Convert to one or three channels: colours become ``luminance``, grey becomes three equal channels (a view)."""
    return luminance(images) if channels == 1 else images.expand(-1, channels, -1, -1)


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """Undo the ImageNet normalisation: ``[B, C, H, W]`` or ``[C, H, W]`` -> the same shape, float, not clamped."""
    if images.ndim not in (3, 4) or images.shape[-3] not in CHANNELS or not images.is_floating_point():
        raise ValueError(
            "images: expected a float tensor [B, C, H, W] or [C, H, W] of one or three channels, got "
            f"{images.dtype} {list(images.shape)}"
        )
    mean, std = _statistics(images.device, images.shape[-3])
    return images * std + mean


def draw(images: torch.Tensor, keys: torch.Tensor, size: Size = 1) -> Crop:
    """Draw the random choices of ``augment`` for ``images [B, C, H, W]``, which depend on their brightness and on the
    aspect of ``size``."""
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
    # u < 1, but the product may round up to the bound
    tops = torch.minimum((u_top * (height - heights + 1)).long(), height - heights)
    lefts = torch.minimum((u_left * (width - widths + 1)).long(), width - widths)

    boxes = torch.stack([tops, lefts, heights, widths], dim=2)  # [B, TRIES, 4]
    accepted = fits & (brightness(images, boxes) >= MIN_BRIGHTNESS)
    centre = boxes.new_empty(batch, 1, 4)
    _fill_(centre, middle)
    boxes = torch.cat([boxes, centre], dim=1)
    accepted = torch.cat([accepted, torch.ones(batch, 1, dtype=torch.bool, device=device)], dim=1)
    tries = accepted.int().argmax(dim=1)  # The first of equal maxima
    boxes = boxes.gather(1, tries[:, None, None].expand(batch, 1, 4))[:, 0]
    return Crop(boxes, tries, numbers[:, -2] < 0.5, (2 * numbers[:, -1] - 1) * MAX_ROTATION)


def brightness(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Mean over pixels and channels, in [0, 1], of boxes ``[B, T, 4]`` in images ``[B, C, H, W]``; float64 ``[B, T]``.

    Exact for uint8 images, since the integral image has integers.
    """
    batch, channels, height, width = images.shape
    if images.dtype == torch.uint8:
        # 64 bits take twice as long, so they are used only if sums may exceed 32 bits.
        dtype = torch.int32 if height * width * channels * 255 < 2**31 else torch.int64
        full = 255
        # In 16 bits, since a sum over dim 1 would first convert the whole batch to a wide type.
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
    """Crop, flip, rotate and normalise by one grid_sample: images ``[B, C, H, W]`` -> float32 ``[B, C, h, w]``.

    If a crop may be larger than the result, every pixel of the result is the mean of k x k samples, with k the integer
    nearest to max(H, W) / max(h, w), so that no detail is skipped.
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
    # Position in the result (at_x, at_y) -> position in the crop (rotate back, then unflip) -> position in the image,
    # all within [-1, 1]. Each coordinate is a term in x plus a term in y, so one broadcast sum computes the grid.
    top, left, h, w = crop.boxes.float()[:, :, None].unbind(1)
    half = torch.stack([w / width, h / height], dim=2)  # [B, 1, 2]: half the crop's width and height
    middle = torch.stack([(2 * left + w) / width - 1, (2 * top + h) / height - 1], dim=2)
    # A rotation preserves lengths in pixels, which differ from lengths in [-1, 1] unless the result is square.
    stretch = target[0] / target[1]
    of_x = torch.stack([sign * cos * at_x, sin / stretch * at_x], dim=2) * half + middle  # [B, k w, 2]
    of_y = torch.stack([-sign * sin * stretch * at_y, cos * at_y], dim=2) * half  # [B, k h, 2]
    grid = of_x[:, None] + of_y[:, :, None]  # [B, k h, k w, 2]
    out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Positions outside the crop, from a rotation, become black; 1e-5 exceeds the rounding errors without a rotation.
    outside = (grid.sub_(middle[:, None]).abs_() > half[:, None] * (1 + 1e-5)).any(dim=3)
    out.masked_fill_(outside[:, None], 0)
    if k > 1:
        out = F.avg_pool2d(out, k)
    return _normalize_(out, 255 if images.dtype == torch.uint8 else 1)


def _normalize_(images: torch.Tensor, full: int) -> torch.Tensor:
    # Values range to `full`; scaling the statistics instead of the images saves a pass over the batch.
    mean, std = _statistics(images.device, images.shape[1])
    return images.sub_(mean * full).div_(std * full)


def _statistics(device: torch.device, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = []
    for values in statistics(channels):
        tensors.append(torch.empty(channels, device=device))
        _fill_(tensors[-1], values)
    return tensors[0].reshape(-1, 1, 1), tensors[1].reshape(-1, 1, 1)


def _places(count: int, device: torch.device) -> torch.Tensor:
    """Centres of ``count`` equal parts of [-1, 1]."""
    return (2 * torch.arange(count, device=device, dtype=torch.float32) + 1) / count - 1


def _fill_(out: torch.Tensor, values: tuple[float, ...]) -> None:
    """``out[..., i] = values[i]``; torch.tensor(values, device=...) would wait for a copy from the host."""
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
