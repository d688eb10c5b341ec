"""Which tiles and which path serve a call of `grouped_mlp`: a table, looked up by shapes and device alone.

Nothing is timed while a network runs: no first step stalls, and the same call has the same bits in every run.
"""

import torch

from . import _tuned
from .common import Tile, architecture, precision

FEW = 1024
"""Rows of an average expert below which tiles are mostly cut off and weights, not rows, are what is read."""

CLASSES = ("many", "few")


def shape_class(rows: int, num_experts: int) -> str:
    """``"few"`` or ``"many"`` rows an expert, of B*K*N ``rows`` in all."""
    return "few" if rows < FEW * num_experts else "many"


def tiles_of(kind: str, tiles: dict[tuple[str, str, int], Tile]) -> dict[tuple[str, str, int], Tile]:
    """``tiles``, but for what was measured to be faster in this class of shapes."""
    return tiles | {key[:3]: Tile(*tile) for key, tile in _tuned.TILES.items() if key[3] == kind}


def path_of(kind: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """The path that was measured to be faster; None where neither was."""
    return _tuned.PATHS.get((architecture(device), precision(dtype), kind))
