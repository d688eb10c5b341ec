"""Sizes of images (one number for a square, or height and width), and the statistics for normalisation."""

from collections.abc import Sequence

Size = int | tuple[int, int]
"""Pixels: the side of a square, or (height, width)."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Means of the three colours of ImageNet, for values within [0, 1]; they normalise every input."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviations of the three colours of ImageNet, for values within [0, 1]; they normalise every input."""
GREY_MEAN, GREY_STD = 0.449, 0.226
"""Means of the three values, for images of one channel."""
CHANNELS = (1, 3)


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a size."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def check_size(name: str, size: object) -> None:
    """ValueError unless ``size`` is a positive whole number or two of them."""
    numbers = size if isinstance(size, list | tuple) and len(size) == 2 else [size]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise ValueError(f"{name}: expected a positive whole number, or two, height and width, got {size!r}")


def plain_size(size: int | Sequence[int]) -> Size:
    """One number for a square, else (height, width)."""
    height, width = height_width(size)
    return height if height == width else (height, width)


def statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation with which images of one or three channels are normalised."""
    return (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((GREY_MEAN,), (GREY_STD,))
