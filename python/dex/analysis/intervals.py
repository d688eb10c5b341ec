"""Confidence intervals by the bootstrap over patients (Efron 1987: bias-corrected and accelerated, BCa).

Patients are resampled instead of images, since images of one patient resemble each other. Shape letters: P patients, R
resamples.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 2000
_LEFT_OUT = 4096
"""Leave-one-out statistics computed at once: 20,000 patients at once would take 3 GB."""

Statistic = Callable[[Tensor], Tensor]
"""``weights [R, P]``, the count of each patient in each resample, ``-> [R]``; float64."""


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    """Of the original patients."""
    low: float
    high: float


class Bootstrap(NamedTuple):
    """A statistic with its bootstrap and jackknife distributions."""

    value: float
    """Of the original patients."""
    resampled: Tensor
    """float64, sorted: finite values of the resamples; empty for one patient."""
    left_out: Tensor
    """float64: finite values without each patient in turn."""

    def interval(self, level: float = 0.95) -> Interval:
        """The BCa interval; both ends are the value if all resamples agree."""
        boot, value = self.resampled, self.value
        if len(boot) == 0 or boot[0] == boot[-1]:
            return Interval(value, value, value)
        # Ties count half; otherwise a statistic with few values would appear biased.
        below = ((boot < value).double().mean() + (boot <= value).double().mean()) / 2
        bias = float(torch.special.ndtri(below.clamp(0.5 / len(boot), 1 - 0.5 / len(boot))))
        deviation = self.left_out.mean() - self.left_out
        spread = float(deviation.square().sum())
        acceleration = float(deviation.pow(3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
        ends = []
        for share in ((1 - level) / 2, (1 + level) / 2):
            z = bias + float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))
            adjusted = bias + z / (1 - acceleration * z)
            ends.append(float(boot.quantile(0.5 * math.erfc(-adjusted / math.sqrt(2)))))
        return Interval(value, *ends)


def bootstrap(statistic: Statistic, patients: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Bootstrap:
    """``statistic`` of all patients, of resamples of them, and without each patient.

    Resamples whose statistic is not finite (none of their patients has some class) are left out.
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
    """The BCa interval of ``statistic`` over the patients, see ``bootstrap``; both ends are the value with one patient
    or if all resamples agree.

    ValueError: no patient, or a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level!r}")
    return bootstrap(statistic, patients, resamples=resamples, seed=seed).interval(level)


def _without(begin: int, patients: int) -> Tensor:
    """Weights of up to ``_LEFT_OUT`` rows; each leaves out one patient, starting with ``begin``."""
    rows = min(_LEFT_OUT, patients - begin)
    weights = torch.ones(rows, patients, dtype=torch.float64)
    weights[torch.arange(rows), torch.arange(begin, begin + rows)] = 0
    return weights


def mean_over_groups(values: Tensor, groups: Tensor) -> Interval:
    """Mean of ``values [n]`` with its BCa interval over ``groups``, int64 ``[n]``, any numbers."""
    numbers = groups.unique(return_inverse=True)[1]
    count = int(numbers.max()) + 1
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, numbers, values.double())
    images = torch.bincount(numbers, minlength=count).double()
    return bca(lambda weights: (weights @ total) / (weights @ images), count)


def balanced_accuracy(right: Tensor, labels: Tensor, patients: Tensor) -> tuple[Statistic, int]:
    """The mean over classes of the accuracy, as a statistic, and the number of patients.

    right: bool ``[n]``; labels: int64 ``[n]``, 0 to C - 1; patients: int64 ``[n]``, any numbers. NaN for a resample
    without images of some class.
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
