"""Records shared by `route` and its backends.

Letters: R decisions, D width, E experts, K chosen, S = R*K slots.
"""

from typing import NamedTuple

from torch import Tensor


class Routed(NamedTuple):
    """The result of a forward."""

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
    """Tensors that a forward saves for its backward."""

    p: Tensor
    gates: Tensor
    expert_indices: Tensor
    r: Tensor
    """``[R, D]``; the router's input."""
    router_weight: Tensor
    """``[E, D]``"""
    counted: Tensor | None = None
    """bool ``[R]``; the decisions that the balance loss counts; None: all. The Triton kernels do not support it."""


class RouterGrads(NamedTuple):
    """The result of a backward."""

    r: Tensor
    router_weight: Tensor
