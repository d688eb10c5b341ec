"""Calibration of probabilities: reliability by bin, and the expected calibration error (Guo et al. 2017).

Shape letters: n cases, B bins, P patients.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dex.tasks.metrics.classification import Classified
from dex.tasks.metrics.estimate import Measure

BINS = 15
"""Bins of equal width over (0, 1]; a bin includes its upper end."""
_DRAWS = 400
NO_INTERVAL = "chance raises ECE more in resamples than in the cases, so a bootstrap misleads"


class Bin(NamedTuple):
    low: float
    high: float
    cases: int
    confidence: float | None
    """Mean probability of the predicted class; None without a case."""
    accuracy: float | None


class Reliability(NamedTuple):
    bins: tuple[Bin, ...]
    ece: float
    by_chance: float
    """The mean ECE of the same number of cases with the same probabilities if these were exactly right."""


def ece(data: Classified) -> Measure:
    """The mean over cases of |accuracy - confidence| of their bin, 0 to 1."""
    confidence, right = _top(data)
    bins = torch.nn.functional.one_hot(_bin(confidence), BINS).double()
    gaps, counts = data.by_patient(bins * (right - confidence)[:, None]), data.by_patient(torch.ones(len(right)))

    def statistic(weights: Tensor) -> Tensor:
        return (weights @ gaps).abs().sum(1) / (weights @ counts)

    return Measure(statistic, data.scored(), len(right), NO_INTERVAL)


def reliability(data: Classified, seed: int = 0) -> Reliability:
    """Confidence and accuracy by bin, and the ECE by chance (consistency resampling, Bröcker & Smith 2007)."""
    confidence, right = _top(data)
    number = _bin(confidence)
    bins = []
    for b in range(BINS):
        inside = number == b
        means = [float(v[inside].mean()) if inside.any() else None for v in (confidence, right)]
        bins.append(Bin(b / BINS, (b + 1) / BINS, int(inside.sum()), *means))
    drawn = np.random.default_rng(seed).random((_DRAWS, len(right))) < confidence.numpy()
    gaps = torch.zeros(_DRAWS, BINS, dtype=torch.float64)
    gaps.index_add_(1, number, torch.from_numpy(drawn).double() - confidence)
    value = float(ece(data).statistic(torch.ones(1, data.number, dtype=torch.float64))[0])
    return Reliability(tuple(bins), value, float(gaps.abs().sum(1).mean()) / len(right))


def _top(data: Classified) -> tuple[Tensor, Tensor]:
    """The probability of the predicted class ``[n]``, and whether it is the true class."""
    return data.probabilities.max(1).values, (data.predicted == data.labels).double()


def _bin(confidence: Tensor) -> Tensor:
    """int64 ``[n]``, 0 to B - 1."""
    return ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
