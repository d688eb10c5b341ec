"""Kernels and layer of Director-Experts networks. Needs torch and numpy; `dex` is the training system on top of it."""

from ._version import __version__
from .layer import Aux, DEXLayer
from .ops import align_loss, group_ema_, grouped_mlp, route
from .routing import Routing

__all__ = ["Aux", "DEXLayer", "Routing", "__version__", "align_loss", "group_ema_", "grouped_mlp", "route"]
