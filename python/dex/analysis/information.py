"""Mutual information of the choice of experts and the modality, corrected for chance.

Shape letters: B images, K chosen, E experts, M modalities, L layers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis.routes import sets_of
from dex.analysis.usage import one_hot

PERMUTATIONS = 999


class Information(NamedTuple):
    """Mutual information of a choice and the modality."""

    value: float
    """``(I - mean I') / (H(modality) - mean I')`` with I' of permutations: 0 is chance, 1 determines the modality."""
    raw: float
    """I in nats, uncorrected. Independent choices also give more than 0, the more sets and the fewer images there
    are."""
    null_high: float
    """95th percentile of ``value`` with permuted modalities: chance stays below it 19 times in 20."""
    p: float
    """Share of the permutations, including the identity, whose I is at least as large."""


def information(choice: Tensor, modality: Tensor, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Information:
    """Corrected and normalised mutual information of ``choice`` and ``modality``, integers ``[B]``.

    The correction is the mean over permutations of the modality, an estimate of the expectation in adjusted mutual
    information (Vinh et al. 2010). With a single modality, or if permutations change nothing, value is 0 and p is 1.
    ValueError: no image.
    """
    if len(choice) == 0 or len(choice) != len(modality):
        raise ValueError(f"choice: expected one per image, at least one, got {len(choice)} and {len(modality)}")
    a = choice.cpu().unique(return_inverse=True)[1]
    b = modality.cpu().unique(return_inverse=True)[1]
    generator = torch.Generator().manual_seed(seed)
    raw = _mutual_information(a, b)
    null = torch.tensor(
        [_mutual_information(a, b[torch.randperm(len(b), generator=generator)]) for _ in range(permutations)]
    )
    mean, most = float(null.mean()), _entropy(b)
    room = most - mean
    if room <= 1e-12 or float(null.max() - null.min()) <= 1e-12:
        return Information(0.0, raw, 0.0, 1.0)
    p = (1 + int((null >= raw - 1e-12).sum())) / (permutations + 1)
    return Information((raw - mean) / room, raw, (float(null.quantile(0.95)) - mean) / room, p)


def distinct_sets(experts: list[Tensor]) -> list[int]:
    """Number of different expert sets in each layer; ``experts``: per layer ``[B, K_l]``."""
    return [int(sets_of(e).max()) + 1 for e in experts]


def probability_entropy(probabilities: Tensor) -> float:
    """Entropy of a router over all experts, ``mean_b H(p_b) / log E`` of ``probabilities [B, E]``: 1 is undecided, 0 is
    certain. Unlike the entropy of the chosen gates it takes unused experts into account."""
    if probabilities.shape[1] < 2:
        return 0.0
    p = probabilities.double()
    return float(-torch.special.xlogy(p, p).sum(1).mean()) / math.log(p.shape[1])


def first_agreement(one: Tensor, other: Tensor) -> float:
    """Share of images whose most probable expert is the same in two views, such as masked and whole; ``[B, K]``
    each."""
    return float((one[:, 0] == other[:, 0]).double().mean())


def overlap(experts: Tensor, modality: Tensor, modalities: int) -> Tensor:
    """Similarity of the expert sets of two modalities: mean Jaccard index over pairs of different images, ``[M, M]``.

    experts ``[B, K]``; modality int64 ``[B]``. NaN if there is no pair. ``random_overlap`` is the reference.
    """
    size = int(experts.max()) + 1
    uses = torch.zeros(len(experts), size, dtype=torch.float64).scatter_(1, experts.cpu().long(), 1.0)
    common = uses @ uses.T
    jaccard = common / (2 * experts.shape[1] - common)
    by_modality = one_hot(modality.cpu(), modalities)
    total = by_modality.T @ (jaccard - torch.diag(jaccard.diagonal())) @ by_modality
    counts = by_modality.sum(0)
    pairs = counts[:, None] * counts - torch.diag(counts)
    return torch.where(pairs > 0, total / pairs.clamp(min=1), torch.nan)


def random_overlap(num_experts: int, top_k: int) -> float:
    """Mean Jaccard index of two random sets of K of E experts."""
    ways = math.comb(num_experts, top_k)
    return sum(
        math.comb(top_k, c) * math.comb(num_experts - top_k, top_k - c) / ways * c / (2 * top_k - c)
        for c in range(1, top_k + 1)
    )


def _mutual_information(a: Tensor, b: Tensor) -> float:
    """In nats, as counted."""
    width = int(b.max()) + 1
    joint = torch.bincount(a * width + b, minlength=(int(a.max()) + 1) * width).view(-1, width).double() / len(a)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float(torch.special.xlogy(joint, joint).sum() - torch.special.xlogy(joint, apart).sum())


def _entropy(labels: Tensor) -> float:
    p = torch.bincount(labels).double() / len(labels)
    return float(-torch.special.xlogy(p, p).sum())
