"""Confidence intervals by the bootstrap over patients (Efron 1987: bias-corrected and accelerated, BCa).

Images of one patient resemble each other, so patients are drawn, not images. Shape letters: P patients, R resamples.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 2000
_LEFT_OUT = 4096
"""Patients that are left out in turn at once: 20,000 of them would take 3 GB."""

Statistic = Callable[[Tensor], Tensor]
"""``weights [R, P]``, how often each resample holds each patient, ``-> [R]``; float64."""


class Interval(NamedTuple):
    value: float
    """Of the patients as they are."""
    low: float
    high: float


class Bootstrap(NamedTuple):
    """What the resamples of a statistic say."""

    value: float
    """Of the patients as they are."""
    resampled: Tensor
    """float64, sorted: the resamples whose statistic is finite; without any for one patient."""
    left_out: Tensor
    """float64: the finite ones without each patient in turn."""

    def interval(self, level: float = 0.95) -> Interval:
        """The BCa interval; where no resample differs, both ends are the value."""
        boot, value = self.resampled, self.value
        if len(boot) == 0 or boot[0] == boot[-1]:
            return Interval(value, value, value)
        # Ties count half, or a statistic of few values would be called biased.
        below = ((boot < value).double().mean() + (boot <= value).double().mean()) / 2
        bias = float(torch.special.ndtri(below.clamp(0.5 / len(boot), 1 - 0.5 / len(boot))))
        apart = self.left_out.mean() - self.left_out
        spread = float(apart.square().sum())
        acceleration = float(apart.pow(3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
        ends = []
        for share in ((1 - level) / 2, (1 + level) / 2):
            z = bias + float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))
            place = bias + z / (1 - acceleration * z)
            ends.append(float(boot.quantile(0.5 * math.erfc(-place / math.sqrt(2)))))
        return Interval(value, *ends)


def bootstrap(statistic: Statistic, patients: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Bootstrap:
    """``statistic`` of the patients, of resamples of them, and without each.

    Resamples whose statistic is not finite (a class that none of its patients has) are left out.
    ValueError: no patient.
    """
    if patients < 1:
        raise ValueError(f"patients: expected at least 1, got {patients}")
    value = float(statistic(torch.ones(1, patients, dtype=torch.float64)))
    if patients < 2:
        return Bootstrap(value, torch.empty(0), torch.empty(0))
    drawn = torch.randint(patients, (resamples, patients), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(resamples, patients, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    boot = statistic(weights)
    left_out = torch.cat([statistic(_without(begin, patients)) for begin in range(0, patients, _LEFT_OUT)])
    return Bootstrap(value, boot[boot.isfinite()].sort().values, left_out[left_out.isfinite()])


def bca(
    statistic: Statistic, patients: int, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The BCa interval of ``statistic`` over the patients; with fewer than two, or where no resample differs, both
    ends are the value. Resamples as of `bootstrap`.

    ValueError: no patient, or a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level!r}")
    return bootstrap(statistic, patients, resamples=resamples, seed=seed).interval(level)


def _without(begin: int, patients: int) -> Tensor:
    """Weights that leave out one patient each, up to `_LEFT_OUT` rows from the patient ``begin``."""
    rows = min(_LEFT_OUT, patients - begin)
    weights = torch.ones(rows, patients, dtype=torch.float64)
    weights[torch.arange(rows), torch.arange(begin, begin + rows)] = 0
    return weights


def balanced_accuracy(right: Tensor, labels: Tensor, patients: Tensor) -> tuple[Statistic, int]:
    """The statistic "mean over classes of the share of images that are right", and the number of patients.

    right: bool ``[n]``; labels: int64 ``[n]``, 0 to C - 1; patients: int64 ``[n]``, any numbers. NaN for a resample
    without an image of some class that there is.
    """
    classes, numbers = int(labels.max()) + 1, patients.unique(return_inverse=True)[1]
    count = int(numbers.max()) + 1
    hits = torch.zeros(count, classes, dtype=torch.float64)
    shown = torch.zeros(count, classes, dtype=torch.float64)
    hits.index_put_((numbers, labels), right.double(), accumulate=True)
    shown.index_put_((numbers, labels), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    present = shown.sum(0) > 0
    hits, shown = hits[:, present], shown[:, present]

    def statistic(weights: Tensor) -> Tensor:
        return ((weights @ hits) / (weights @ shown)).mean(1)

    return statistic, count
