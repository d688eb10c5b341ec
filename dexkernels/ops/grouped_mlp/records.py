"""What `grouped_mlp` and its backends pass to each other.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen, S = B*K slots. Token-wise routing is
image-wise routing of ``B * N`` images of one token: the operator does that reshaping.
"""

from typing import NamedTuple

from torch import Tensor

from ...records import MLPWeights

MAX_WIDTH = 2**24 - 2**10
"""D and H up to which kernels that count in 32 bits can compute: offsets within a tile of 128 rows are such."""

MAX_COUNT = 2**31 - 2**16
"""The same of rows B*N*K, of an image's N*D elements and of a matrix's D*H. A tile may reach past the last one."""


class Slots(NamedTuple):
    """Which experts the images are sent to, by how much, and in which order the slots are computed."""

    gates: Tensor
    """``[B, K]``"""
    slot_order: Tensor
    """int64 ``[S]``; slots sorted by expert."""
    group_offsets: Tensor
    """int64 ``[E + 1]``; expert ``e`` owns ``slot_order[group_offsets[e] : group_offsets[e + 1]]``."""

    @property
    def num_slots(self) -> int:
        return self.slot_order.shape[0]

    @property
    def num_experts(self) -> int:
        return self.group_offsets.shape[0] - 1

    @property
    def top_k(self) -> int:
        return self.gates.shape[1]


class Result(NamedTuple):
    """What a forward returns."""

    out: Tensor
    """``[B, N, D]``"""
    z: Tensor
    """``[S, N, H]``; fc1's outputs, for the backward of the same backend, which alone knows what lies where in it.
    ``[0, N, H]`` when nothing is to be saved."""
    director_out: Tensor
    """``[B, N, D]``, the director's output of every image; ``[0, N, D]`` when the weights hold none."""


class Saved(NamedTuple):
    """What a forward saves for its backward. The weights are those it computed with, of the E experts alone."""

    x: Tensor
    """``[B, N, D]``"""
    gates: Tensor
    slot_order: Tensor
    group_offsets: Tensor
    fc1_weight: Tensor
    """``[E, H, D]``"""
    fc2_weight: Tensor
    """``[E, D, H]``"""
    fc2_bias: Tensor
    """``[E, D]``"""
    z: Tensor

    @property
    def slots(self) -> Slots:
        return Slots(self.gates, self.slot_order, self.group_offsets)


class Needs(NamedTuple):
    """Which gradients a backward is asked for."""

    x: bool = True
    gates: bool = True
    weights: bool = True


class Gradients(NamedTuple):
    """What a backward returns; None for what is not needed. Of the experts without slots exact zeros."""

    x: Tensor | None
    gates: Tensor | None
    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_weight: Tensor | None
    fc2_bias: Tensor | None


def has_director(weights: MLPWeights, slots: Slots) -> bool:
    """Whether stacked weights hold the director's too, ``[E + 1, ...]``, behind those of the experts."""
    return weights.fc1_weight.shape[0] == slots.num_experts + 1
