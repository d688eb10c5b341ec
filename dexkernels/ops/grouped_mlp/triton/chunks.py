"""How the weight gradients of experts with many slots are cut into chunks: the host's side of `weight_grad_kernels`.

Letters: E experts, S = B*K slots.
"""

import torch
import triton
from torch import Tensor

from ...triton_common import Tile, experts_block
from . import weight_grad_kernels

PROGRAMS = 132
"""Programs that run at a time: the processors of an H100. A constant, so that bits do not depend on the device."""

WAVES = 3
"""Chunks that are worth a cut take at most 1 / WAVES of the time that all rows take on PROGRAMS processors."""

SLACK = 1.5
"""An expert is cut from this multiple of the average expert's slots on: uniform routing writes no parts."""

CUT = 2048
"""Elements that one program adds at a time."""


def most_slots(slots: int, num_experts: int, tiles: int) -> int:
    """Slots of a chunk at most, for gradients of ``tiles`` tiles an expert. From shapes alone: the same bits each run.

    Shorter chunks fill the last wave better, but each part is written and read in float32.
    """
    return max(int(SLACK * slots / num_experts), slots * tiles // (WAVES * PROGRAMS), 1)


class Cut:
    """The chunks of one weight gradient ``out [E, height, width]``: its grid and float32 parts, None where none is cut.

    The host does not know the split of the slots over the experts, so all counts are upper bounds.
    """

    def __init__(self, slots: int, out: Tensor, tile: Tile):
        E, height, width = out.shape
        tiles = triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.cols)
        self.out = out
        self.most: int = most_slots(slots, E, tiles)
        self.cut_experts: int = slots // (self.most + 1)
        # An expert of n > 0 slots has at most 1 + (n - 1) / most chunks, and all of them E + slots / most.
        self.grid: tuple[int] = ((E + slots // self.most) * tiles,)
        parts = self.cut_experts + slots // self.most
        self.parts: Tensor | None = None
        if self.cut_experts:
            self.parts = torch.empty((parts, height, width), dtype=torch.float32, device=out.device)

    def add_parts(self, group_offsets: Tensor) -> None:
        """``out`` of the experts that were cut, from the parts."""
        if self.parts is None:
            return
        size = self.out[0].numel()
        grid = (self.cut_experts, min(triton.cdiv(size, CUT), PROGRAMS))
        weight_grad_kernels.sum_chunks_kernel[grid](
            parts=self.parts,
            offsets=group_offsets,
            out=self.out,
            num_experts=self.out.shape[0],
            most=self.most,
            size=size,
            EXPERTS=experts_block(self.out.shape[0]),
            CUT=CUT,
        )
