"""The routing record and the order of its slots. Letters: B images, N tokens, E experts, K chosen, S slots.

A slot is one (row, choice) pair: there are ``B * K`` of them when routing is image-wise, ``B * N * K`` when it is
token-wise. Slots are numbered row-major, so slot ``s`` belongs to row ``s // K`` and is its choice ``s % K``.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The decisions of `route`. Only ``gates`` and ``balance_loss`` have a gradient."""

    gates: Tensor
    """``[B, K]`` or, token-wise, ``[B, N, K]``; renormalised weights of the chosen experts; each row sums to 1."""
    expert_indices: Tensor
    """int32, shape of ``gates``; by descending probability, ties to the lower index; distinct within a row."""
    balance_loss: Tensor
    """0-dim; ``E * sum_e mean(p_e) * stop_grad(mean(p_e))``, local to this rank."""
    gate_mass: Tensor
    """``[E]``, detached; sum of the gates given to each expert."""
    slot_order: Tensor
    """int64 ``[S]``; slots stably sorted by expert."""
    group_sizes: Tensor
    """int64 ``[E]``; number of slots of each expert."""
    group_offsets: Tensor
    """int64 ``[E + 1]``; expert ``e`` owns ``slot_order[group_offsets[e] : group_offsets[e + 1]]``."""


class SlotOrder(NamedTuple):
    """The fields of `Routing` with these names."""

    slot_order: Tensor
    group_sizes: Tensor
    group_offsets: Tensor


def sort_slots(expert_indices: Tensor, num_experts: int) -> SlotOrder:
    """The slots of ``expert_indices`` (any integer dtype and shape), stably sorted by expert."""
    flat = expert_indices.reshape(-1).long()
    slot_order = flat.argsort(stable=True)
    # A comparison, since bincount makes the host wait for a GPU.
    experts = torch.arange(num_experts, device=flat.device)
    group_sizes = (flat[:, None] == experts).sum(0)
    group_offsets = flat.new_zeros(num_experts + 1)
    group_offsets[1:] = group_sizes.cumsum(0)
    return SlotOrder(slot_order, group_sizes, group_offsets)
