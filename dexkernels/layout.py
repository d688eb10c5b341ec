"""The shapes in which hosts pass images: tokens, maps, or windows. A `DEXLayer` computes with ``[B, N, D]``.

Letters: B images, N tokens, D width, H and W height and width of a map, P windows of an image.
"""

from typing import NamedTuple

from torch import Tensor

from . import checks
from .choices import LayoutName

LAYOUTS: dict[LayoutName, str] = {
    "tokens": "[B, N, D]",
    "channels_last": "[B, H, W, D]",
    "channels_first": "[B, D, H, W]",
}
"""Layout -> the shape that a host passes."""


class Layout(NamedTuple):
    """How a host passes its images."""

    name: LayoutName = "tokens"
    """One of `LAYOUTS`."""
    windows: int = 1
    """P: an image is P consecutive entries of the first dimension, ``[B * P, ...]``."""

    def check(self, x: Tensor, dim: int) -> None:
        """Raise ValueError unless ``x`` has this layout and width ``dim``."""
        if self.name == "tokens":
            checks.check_x(x, dim)
        else:
            width = 3 if self.name == "channels_last" else 1
            if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[width] != dim:
                expected = LAYOUTS[self.name].replace("D", str(dim))
                raise ValueError(f"x: expected {expected} with layout={self.name!r}, got {checks.describe(x)}")
        if self.windows > 1 and x.shape[0] % self.windows:
            raise ValueError(
                f"x: expected a first dimension that is a multiple of windows={self.windows}, the consecutive windows "
                f"of an image, got {checks.shape_of(x)}"
            )

    def images(self, x: Tensor) -> Tensor:
        """The host's x as ``[B, N, D]``; N counts the tokens of all windows of an image."""
        if self.name == "channels_first":
            x = x.flatten(2).transpose(1, 2)
        elif self.name == "channels_last":
            x = x.flatten(1, 2)
        return x if self.windows == 1 else x.reshape(x.shape[0] // self.windows, self.windows * x.shape[1], x.shape[2])

    def restore(self, y: Tensor, like: Tensor) -> Tensor:
        """``y [B, N, D]`` in the shape of the host's ``like``."""
        if self.name == "tokens" and self.windows == 1:
            return y
        if self.name != "channels_first":
            return y.reshape(like.shape)
        D, H, W = like.shape[1:]
        return y.reshape(like.shape[0], H, W, D).permute(0, 3, 1, 2)

    def token_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        """The mask of a host's x, in the shape of x without D, as ``[B, N]``. ValueError for another shape."""
        shape = x.shape[:-1] if self.name != "channels_first" else (x.shape[0], *x.shape[2:])
        checks.check_mask("token_mask", mask, tuple(shape), x)
        mask = mask.flatten(1)
        return mask.reshape(mask.shape[0] // self.windows, self.windows * mask.shape[1])
