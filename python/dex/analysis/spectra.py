"""The spectrum of features: how many directions they use, and whether they point in one direction.

Shape letters: n features, D width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Spectrum(NamedTuple):
    """The spectrum of features ``[n, D]``."""

    singular_values: Tensor
    """float64 ``[min(n, D)]``, descending, of the centred features."""
    rankme: float
    """``exp(H(s / sum s))`` of the singular values s, RankMe (Garrido et al. 2023) of the centred features."""
    effective_rank: float
    """``(sum s^2)^2 / sum s^4``: the participation ratio of the variances; 1 to min(n, D)."""
    cosine: float
    """Mean cosine of two different features: 1 if all have the same direction, which a common offset suffices for."""
    centred_cosine: float
    """The same after the mean is subtracted."""


def spectrum(features: Tensor) -> Spectrum:
    """The spectrum of ``features [n, D]``. Equal features have rank 0. ValueError: n is less than 2."""
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features: expected at least two rows [n, D], got {list(features.shape)}")
    x = features.detach().cpu().double()
    centred = x - x.mean(0)
    s = torch.linalg.svdvals(centred)
    total = s.sum()
    if total <= 1e-12 * max(float(x.abs().sum()), 1e-300):
        return Spectrum(s, 0.0, 0.0, _mean_cosine(x), 0.0)
    share, power = s / total, s.square()
    rank = float(torch.exp(-torch.special.xlogy(share, share).sum()))
    return Spectrum(s, rank, float(power.sum().square() / power.square().sum()), _mean_cosine(x), _mean_cosine(centred))


def _mean_cosine(x: Tensor) -> float:
    """Mean over pairs of different rows: ``(||sum u||^2 - n) / (n (n - 1))`` of the unit rows u."""
    units, n = F.normalize(x, dim=1), len(x)
    return float((units.sum(0).square().sum() - units.square().sum()) / (n * (n - 1)))
