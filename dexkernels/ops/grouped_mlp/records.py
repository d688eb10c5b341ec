"""Records shared by `grouped_mlp` and its backends.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen, S = B*K slots. Token-wise routing is
image-wise routing of ``B * N`` images of one token: the operator does this reshaping.
"""

from typing import NamedTuple

from torch import Tensor

from ...records import MLPWeights

MAX_WIDTH = 2**24 - 2**10
"""Largest D and H for kernels that compute offsets within a tile of 128 rows in 32 bits."""

MAX_COUNT = 2**31 - 2**16
"""Largest B*N*K rows, N*D elements of an image and D*H elements of a matrix. A tile may extend past the last one."""


class Slots(NamedTuple):
    """The experts and gates of the images, and the order in which the slots are computed."""

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
    """The result of a forward."""

    out: Tensor
    """``[B, N, D]``"""
    z: Tensor
    """``[S, N, H]``; fc1's outputs for the backward, in an order that only the backend knows. ``[0, N, H]`` if nothing
    is saved."""
    director_out: Tensor
    """``[B, N, D]``, the director's output for every image; ``[0, N, D]`` if the weights hold no director."""


class Saved(NamedTuple):
    """Tensors that a forward saves for its backward. The weights are the ones it used, without the director's."""

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
    """The gradients that a backward must compute."""

    x: bool = True
    gates: bool = True
    weights: bool = True


class Gradients(NamedTuple):
    """The result of a backward; None for gradients that are not needed, exact zeros for experts without slots."""

    x: Tensor | None
    gates: Tensor | None
    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_weight: Tensor | None
    fc2_bias: Tensor | None


def has_director(weights: MLPWeights, slots: Slots) -> bool:
    """Whether stacked weights ``[E + 1, ...]`` hold the director's after those of the experts."""
    return weights.fc1_weight.shape[0] == slots.num_experts + 1
