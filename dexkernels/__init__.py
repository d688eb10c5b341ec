"""Kernels and layer of Director-Experts networks. Needs torch and numpy; `dex` is the training system on top of it."""

from . import optim
from ._version import __version__
from .collect import AuxCollector, collect_aux
from .layer import Aux, DEXLayer
from .masking import mask_tokens
from .ops.align_loss import align_loss
from .ops.group_ema import group_ema_
from .ops.grouped_mlp import grouped_mlp
from .ops.route import route
from .routing import Routing
from .shadows import hold_weights
from .sharding import shard
from .upcycle import to_dense_, upcycle_
from .verification.run import verify

__all__ = [
    "Aux",
    "AuxCollector",
    "DEXLayer",
    "Routing",
    "__version__",
    "align_loss",
    "collect_aux",
    "group_ema_",
    "grouped_mlp",
    "hold_weights",
    "mask_tokens",
    "optim",
    "route",
    "shard",
    "to_dense_",
    "upcycle_",
    "verify",
]
