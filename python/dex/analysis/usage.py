"""Use of experts: gate mass by modality, balance of the load, unused experts.

Shape letters: B images, K chosen, E experts, M modalities.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class UnusedExperts(NamedTuple):
    """Experts of one layer that are hardly used."""

    dead: tuple[int, ...]
    """Without a slot."""
    nearly_dead: tuple[int, ...]
    """With less than a tenth of an even share, 0.1 / E."""


def expert_by_modality(
    gates: Tensor, expert_indices: Tensor, modality: Tensor, num_experts: int, num_modalities: int
) -> Tensor:
    """Gate mass ``[M, E]`` that the images of each modality give to each expert; float64.

    gates, expert_indices: ``[B, K]``; modality: int64 ``[B]``. Deterministic on every device.
    """
    per_image = torch.zeros(gates.shape[0], num_experts, dtype=torch.float64, device=gates.device)
    per_image.scatter_(1, expert_indices.long(), gates.detach().double())  # The experts of an image are distinct
    return one_hot(modality, num_modalities).T @ per_image


def one_hot(index: Tensor, size: int) -> Tensor:
    """One-hot encoding of ``index [B]``, float64 ``[B, size]``."""
    return (index[:, None] == torch.arange(size, device=index.device)).double()


def usage_entropy(counts: Tensor) -> float:
    """Balance of the load ``counts [E]``: its entropy over log E; 1 is even, 0 if one expert gets everything."""
    total = counts.sum().item()
    if total == 0 or counts.numel() < 2:
        return 1.0
    share = counts.double() / total
    return float(-(share * share.clamp_min(1e-300).log()).sum() / math.log(counts.numel()))


def gate_entropy(gates: Tensor) -> Tensor:
    """Mean entropy of the rows of ``gates [B, K]`` over log K, 0-dim float64: 1 for equal gates, 0 if one expert has
    all of the gate mass or K = 1.
    """
    if gates.shape[-1] < 2:
        return gates.new_zeros((), dtype=torch.float64)
    share = gates.detach().double()
    return -torch.special.xlogy(share, share).sum(-1).mean() / math.log(gates.shape[-1])


def min_share(counts: Tensor) -> float:
    """Share of the least used expert in ``counts [E]``; 0 if all counts are 0."""
    return float(counts.min() / counts.sum().clamp_min(1))


def unused_experts(counts: Tensor) -> UnusedExperts:
    """Experts with no slot, or with less than a tenth of an even share; ``counts [E]`` has the slots of each."""
    even = counts.sum().item() / counts.numel()
    slots = counts.tolist()
    return UnusedExperts(
        tuple(e for e, n in enumerate(slots) if n == 0), tuple(e for e, n in enumerate(slots) if 0 < n < 0.1 * even)
    )
