"""What `route` and its backends pass to each other.

Letters: R decisions, D width, E experts, K chosen, S = R*K slots.
"""

from typing import NamedTuple

from torch import Tensor


class Routed(NamedTuple):
    """What a forward returns."""

    p: Tensor
    """``[R, E]``; the router's probabilities."""
    gates: Tensor
    """``[R, K]``"""
    expert_indices: Tensor
    """int32 ``[R, K]``"""
    balance_loss: Tensor
    """0-dim"""
    gate_mass: Tensor
    """``[E]``"""
    slot_order: Tensor
    """int64 ``[S]``"""
    group_sizes: Tensor
    """int64 ``[E]``"""
    group_offsets: Tensor
    """int64 ``[E + 1]``"""


class Saved(NamedTuple):
    """What a forward saves for its backward."""

    p: Tensor
    gates: Tensor
    expert_indices: Tensor
    r: Tensor
    """``[R, D]``; what the router read."""
    router_weight: Tensor
    """``[E, D]``"""
    counted: Tensor | None = None
    """bool ``[R]``; the decisions that the balance loss counts; None: all. No kernel of Triton reads it."""


class RouterGrads(NamedTuple):
    """What a backward returns."""

    r: Tensor
    router_weight: Tensor
