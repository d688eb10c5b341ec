"""What the launches of one call share: its slots, its path, and its tiles.

Letters: B images, N tokens, D width, H hidden, E experts, K chosen, S = B*K slots, q blocks of an image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ....records import MLPWeights
from ...triton_common import MAX_ROWS, Tile, architecture, check_dtype, experts_block
from ...triton_common import precision as precision_of
from ..records import MAX_COUNT, MAX_WIDTH, Slots
from .aligned_kernels import BLOCK as BLOCK_CONSTANT
from .configurations import path_of, shape_class, tiles_of

BLOCK = BLOCK_CONSTANT.value
"""Tokens of a block of the aligned path."""

ONE_SUM = 16
"""Experts up to which the K > 1 results of an image are one sum in `aligned.to_images`; with more, images that run
beside one another share few experts, and results by slot reuse the weights better. By reckoning, not measured."""

Tiles = dict[tuple[str, str, int], Tile]
"""(kernel, precision, architecture) -> tile; see `configurations.TILES`."""


class Plan(NamedTuple):
    """How one call is computed."""

    slots: Slots
    tokens: int
    """N"""
    blocks: int
    """Blocks of an image that take the aligned path; 0 on the gather path."""
    precision: str
    arch: int
    tiles: Tiles
    tanh: bool = False
    """Whether the experts' GELU is the approximation by tanh."""

    @property
    def rest(self) -> int:
        """Tokens of an image outside of its blocks: the first ones."""
        return self.tokens - self.blocks * BLOCK

    @property
    def one_sum(self) -> bool:
        """Whether the K results of an image are one sum, on the aligned path."""
        return self.slots.top_k > 1 and self.slots.num_experts <= ONE_SUM

    @property
    def experts_block(self) -> int:
        return experts_block(self.slots.num_experts)

    def tile(self, kernel: str) -> Tile:
        return self.tiles[kernel, self.precision, self.arch]


class Product(NamedTuple):
    """A product of rows that lie by slot with their experts' weights; its results are combined by image."""

    rows_in: Tensor
    """``[S, N, depth]``, with a director ``[S + B, N, depth]``; what lies where is the path's affair."""
    weight: Tensor
    """``[E, depth, W]``, transposed ``[E, W, depth]``; a director's behind the experts'."""
    transposed: bool
    bias: Tensor | None
    """``[E, W]``"""
    gates: Tensor | None
    """``[B, K]``; None: the results are added up as they are."""
    out: Tensor
    """``[B, N, W]``"""
    director_out: Tensor | None
    """``[B, N, W]``"""


class HiddenGrads(NamedTuple):
    """What goes back through fc2 and the GELU: gradients that lie as z does, and parts of sums."""

    dz: Tensor | None
    """``[S, N, H]``"""
    gated: Tensor | None
    """``[S, N, H]``; ``g gelu(z)``"""
    gate_parts: Tensor | None
    """float32 ``[S, parts]``; see `sums.gate_grad`."""
    bias_parts: Tensor | None
    """float32 ``[S*q + tiles, H]``; see `sums.bias1_grad`."""


def make_plan(
    x: Tensor, slots: Slots, weights: MLPWeights, activation: str, path: str | None, tiles: Tiles | None
) -> Plan:
    """The plan of a call, after the checks that are this backend's own.

    ``weights``: of which the shapes alone are read. ``path``: see `choose_path`. ``tiles``: None takes those that ship.
    """
    check_dtype("x", x)
    (B, N, D), (stacked, H) = x.shape, weights.fc1_weight.shape[:2]
    if D == 0 or H == 0:
        raise ValueError(f"fc1_weight: expected D and H of at least 1, got {list(weights.fc1_weight.shape)}")
    rows = B * N * (slots.top_k + stacked - slots.num_experts)
    if rows > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows B*N*K (K + 1 with a director), got {rows}")
    if max(D, H) > MAX_WIDTH or D * H > MAX_COUNT:
        raise ValueError(
            f"fc1_weight: expected D and H of at most {MAX_WIDTH} and D*H of at most {MAX_COUNT}, got D = {D}, H = {H}"
        )
    if N * D > MAX_COUNT:
        raise ValueError(f"x: expected images of at most {MAX_COUNT} elements N*D, got {N * D}")
    kind = shape_class(slots.num_slots * N, slots.num_experts)
    tiles = tiles_of(kind) if tiles is None else tiles
    precision, arch = precision_of(x.dtype), architecture(x.device)
    preferred = path_of(kind, precision, arch)
    slots, tanh = Slots(*(t.contiguous() for t in slots)), activation == "gelu_tanh"
    if choose_path(path, preferred, N, D, H, x.dtype, has_tma(x.device)) == "gather":
        return Plan(slots, N, 0, precision, arch, tiles, tanh)
    if ("fc1_blocks", precision, 90) not in tiles:
        raise ValueError(f"path: 'aligned' cannot be taken: it has no tiles for {x.dtype}")
    # The tiles of this path are those of 90: Triton's interpreter, which has the architecture 80, takes them too.
    return Plan(slots, N, N // BLOCK, precision, 90, tiles, tanh)


def choose_path(
    path: str | None, preferred: str, tokens: int, dim: int, hidden: int, dtype: torch.dtype, tma: bool
) -> str:
    """``"gather"`` or ``"aligned"``: the path asked for, or the preferred one where it applies.

    Raises ValueError with the reason when the aligned path is asked for and can't be taken.
    """
    if path not in (None, "gather", "aligned"):
        raise ValueError(f"path: expected 'gather', 'aligned' or None, got {path!r}")
    wanted = path or preferred
    reason = why_not_aligned(tokens, dim, hidden, dtype, tma) if wanted == "aligned" else None
    if reason and path:
        raise ValueError(f"path: 'aligned' cannot be taken: {reason}")
    return "gather" if reason else wanted


def has_tma(device: torch.device) -> bool:
    """Whether kernels on ``device`` load by descriptors into the blocks of TILES; Triton's interpreter does too."""
    return device.type != "cuda" or architecture(device) == 90


def why_not_aligned(tokens: int, dim: int, hidden: int, dtype: torch.dtype, tma: bool) -> str | None:
    """Why a call can't take the aligned path; None when it can. It depends on nothing that backward sees otherwise.

    Token-wise routing comes as images of one token, so it is among those with fewer than 64.
    """
    if not tma:
        return "descriptors, and the shared memory for its tiles, need compute capability 9 to 11"
    if tokens < BLOCK:
        return f"it needs {BLOCK} tokens an image, got {tokens}"
    for name, width in (("D", dim), ("H", hidden)):
        if width * dtype.itemsize % 16:
            return f"rows must be multiples of 16 bytes, got {name} = {width} of {dtype}"
    return None
