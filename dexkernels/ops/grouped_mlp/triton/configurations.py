"""Which tiles and which path serve a call of `grouped_mlp`: tables, looked up by shapes and device alone.

Nothing is timed while a network runs: no first step stalls, and the same call has the same bits in every run.
"""

from ...triton_common import Tile
from . import _tuned

GATHER = {
    ("fc1", "half", 80): Tile(128, 128, 32, 8, 4),
    ("fc1", "half", 90): Tile(128, 128, 64, 8, 4),
    ("fc1", "float", 80): Tile(64, 64, 16, 4, 3),
    ("fc1", "float", 90): Tile(64, 64, 16, 4, 3),
    ("to_slots", "half", 80): Tile(128, 128, 32, 8, 4),
    ("to_slots", "half", 90): Tile(128, 128, 64, 8, 4),
    ("to_slots", "float", 80): Tile(64, 64, 16, 4, 3),
    ("to_slots", "float", 90): Tile(64, 64, 16, 4, 3),
    ("to_hidden_grad", "half", 80): Tile(128, 128, 32, 8, 4, halves=True),
    ("to_hidden_grad", "half", 90): Tile(128, 128, 64, 8, 4, halves=True),
    ("to_hidden_grad", "float", 80): Tile(64, 64, 16, 4, 3),
    ("to_hidden_grad", "float", 90): Tile(64, 64, 16, 4, 3),
    ("weight_grad", "half", 80): Tile(128, 128, 32, 8, 6),
    ("weight_grad", "half", 90): Tile(128, 128, 64, 8, 7),
    ("weight_grad", "float", 80): Tile(64, 64, 16, 4, 3),
    ("weight_grad", "float", 90): Tile(64, 64, 16, 4, 3),
}
"""(kernel, precision, architecture) -> tile, of the gather path. No tile needs more than 99 KB on 80, which 8.6 and 8.9
share. weight_grad counts more stages than it has buffers: in its loop the loads of slot numbers take stages of
their own."""

ALIGNED = {
    ("fc1_blocks", "half", 90): Tile(128, 256, 64, 8, 4, halves=True),
    ("to_images", "half", 90): Tile(64, 256, 64, 4, 4),
    ("to_images_even", "half", 90): Tile(128, 256, 64, 8, 4),
    ("to_images_pairs", "half", 90): Tile(128, 256, 64, 8, 4),
    ("to_slots_blocks", "half", 90): Tile(128, 256, 64, 8, 4),
    ("hidden_grad_blocks", "half", 90): Tile(128, 256, 64, 8, 4, halves=True),
    ("weight_grad_blocks", "half", 90): Tile(128, 256, 32, 8, 5),
}
"""(kernel, precision, architecture) -> tile, of the aligned path. ``to_images_even``: where an image's blocks are even
in number; ``to_images_pairs``: see `aligned.in_pairs`; all but to_images and weight_grad_blocks are two blocks high.
The depth of weight_grad_blocks is that of its gathered rows, its blocks are 64 deep; it counts more stages than it has
buffers: the loads of slot numbers take stages of their own."""

TILES = GATHER | ALIGNED

PATH = {(80, "half"): "gather", (80, "float"): "gather", (90, "half"): "gather", (90, "float"): "gather"}
"""(architecture, precision) -> the path that is taken where it applies. Only (90, half) has tiles of the aligned one,
and until they are measured on a GPU it must be asked for."""

FEW = 1024
"""Rows of an average expert below which tiles are mostly cut off and weights, not rows, are what is read."""

CLASSES = ("many", "few")


def shape_class(rows: int, num_experts: int) -> str:
    """``"few"`` or ``"many"`` rows an expert, of B*K*N ``rows`` in all."""
    return "few" if rows < FEW * num_experts else "many"


def tiles_of(kind: str) -> dict[tuple[str, str, int], Tile]:
    """`TILES`, but for what was measured to be faster in this class of shapes."""
    return TILES | {key[:3]: Tile(*tile) for key, tile in _tuned.TILES.items() if key[3] == kind}


def path_of(kind: str, precision: str, arch: int) -> str:
    """The path that was measured to be faster, or else that of `PATH`."""
    return _tuned.PATHS.get((arch, precision, kind)) or PATH[arch, precision]
