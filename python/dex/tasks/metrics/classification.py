"""Metrics of classified cases as functions of patient weights.

Shape letters: n cases, C classes, P patients, R resamples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dex.analysis.intervals import Statistic
from dex.tasks.metrics.estimate import MIN_PATIENTS, Measure, no_interval

_AT_ONCE = 2**22
"""Weights processed at once."""
_SUM = 1e-3
"""Tolerated deviation of a case's sum of probabilities from 1."""


class Classified(NamedTuple):
    """Cases with known classes."""

    probabilities: Tensor
    """float64 ``[n, C]``, rows sum to 1."""
    labels: Tensor
    """int64 ``[n]``, 0 to C - 1."""
    patients: Tensor
    """int64 ``[n]``, 0 to P - 1."""
    number: int
    """P."""

    @property
    def classes(self) -> int:
        return self.probabilities.shape[1]

    @property
    def predicted(self) -> Tensor:
        """int64 ``[n]``: the most probable class, the first in a tie."""
        return torch.from_numpy(self.probabilities.numpy().argmax(1))

    def scored(self, cases: Tensor | None = None) -> Tensor:
        """bool ``[P]``: the patients of ``cases`` (bool ``[n]``), by default of all cases."""
        result = torch.zeros(self.number, dtype=torch.bool)
        result[self.patients if cases is None else self.patients[cases]] = True
        return result

    def by_patient(self, values: Tensor) -> Tensor:
        """Sums of ``values [n, ...]`` over the cases of each patient: float64 ``[P, ...]``."""
        return torch.zeros(self.number, *values.shape[1:], dtype=torch.float64).index_add_(
            0, self.patients, values.double()
        )


def check(probabilities: np.ndarray, labels: np.ndarray) -> None:
    """ValueError naming the argument unless they are probabilities ``[n, C]`` and classes ``[n]``."""
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or probabilities.dtype.kind != "f":
        raise ValueError(
            f"probabilities: expected numbers [n, C] of two classes or more, got {probabilities.dtype} "
            f"{list(probabilities.shape)}"
        )
    if labels.shape != probabilities.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels: expected {len(probabilities)} integers, one per case, got {labels.dtype} {list(labels.shape)}"
        )
    if not len(labels):
        raise ValueError("labels: expected at least one case, got none")
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities: expected finite numbers, got NaN or infinity; the model may have diverged")
    deviation = float(np.abs(probabilities.sum(1) - 1).max())
    if probabilities.min() < 0 or deviation > _SUM:
        raise ValueError(
            "probabilities: expected rows from 0 to 1 that sum to 1, as from a softmax, got a minimum of "
            f"{probabilities.min():.4g} and sums that differ from 1 by up to {deviation:.4g}"
        )
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(f"labels: expected 0 to {probabilities.shape[1] - 1}, got {labels.min()} to {labels.max()}")


def accuracy(data: Classified) -> Measure:
    """The share of cases whose most probable class is the true one."""
    return Measure(_mean(data, (data.predicted == data.labels).double()), data.scored(), len(data.labels))


def brier(data: Classified) -> Measure:
    """Brier (1950): the mean over cases of the squared distance between probabilities and truth, 0 to 2."""
    truth = torch.nn.functional.one_hot(data.labels, data.classes).double()
    return Measure(_mean(data, (data.probabilities - truth).square().sum(1)), data.scored(), len(data.labels))


def sensitivity(data: Classified, of: int | None = None) -> Measure:
    """The share of a class's cases that are predicted as such; without ``of``, balanced accuracy: the mean over the
    classes with a case."""
    truth = torch.nn.functional.one_hot(data.labels, data.classes)
    hits = data.by_patient(truth * (data.predicted == data.labels)[:, None])
    counts = data.by_patient(truth)
    statistic, present = _of_classes(lambda weights: (weights @ hits) / (weights @ counts), counts.sum(0) > 0, of)
    return _measure(data, statistic, present, truth.bool())


def f1(data: Classified, of: int | None = None) -> Measure:
    """2 TP / (2 TP + FP + FN) of a class; without ``of``, the mean over the classes with a case or a prediction."""
    truth = torch.nn.functional.one_hot(data.labels, data.classes)
    predicted = torch.nn.functional.one_hot(data.predicted, data.classes)
    both, total = data.by_patient(truth * predicted), data.by_patient(truth + predicted)
    statistic, present = _of_classes(lambda weights: 2 * (weights @ both) / (weights @ total), total.sum(0) > 0, of)
    return _measure(data, statistic, present, (truth + predicted).bool())._replace(no_interval=_few(data, of))


def auc(data: Classified, of: int | None = None) -> Measure:
    """The area under the ROC curve of a class against the others: the probability that a case of the class gets a
    higher probability than another case, ties counting half. Without ``of``: of class 1 for two classes, else the mean
    over the classes with cases inside and outside."""
    counts = torch.bincount(data.labels, minlength=data.classes)
    present = (counts > 0) & (counts < len(data.labels))
    if of is None and data.classes == 2:
        of = 1
    areas = [_area(data, c) for c in range(data.classes) if present[c] and of in (None, c)]

    def statistic(weights: Tensor) -> Tensor:
        if not areas:
            return torch.full((len(weights),), float("nan"), dtype=torch.float64)
        return torch.stack([area(weights) for area in areas]).mean(0)

    if not areas:
        return Measure(
            statistic, torch.zeros(data.number, dtype=torch.bool), 0, "it takes cases of the class and others"
        )
    return Measure(statistic, data.scored(), len(data.labels), _few(data, of))


def confusion(data: Classified) -> np.ndarray:
    """int64 ``[C, C]``: cases by truth (rows) and prediction."""
    flat = data.labels * data.classes + data.predicted
    return torch.bincount(flat, minlength=data.classes**2).reshape(data.classes, data.classes).numpy()


def _mean(data: Classified, values: Tensor) -> Statistic:
    sums, counts = data.by_patient(values), data.by_patient(torch.ones(len(values)))
    return lambda weights: (weights @ sums) / (weights @ counts)


def _of_classes(by_class: Statistic, present: Tensor, of: int | None) -> tuple[Statistic, Tensor]:
    """The statistic of one class of ``weights -> [R, C]``, or the mean over the classes present; and these classes."""
    if of is not None:
        selected = torch.zeros_like(present)
        selected[of] = present[of]
        present = selected
    return (lambda weights: by_class(weights)[:, present].mean(1)), present


def _measure(data: Classified, statistic: Statistic, present: Tensor, counts: Tensor) -> Measure:
    """counts: bool ``[n, C]``, whether a case counts for the value of a class."""
    cases = counts[:, present].any(1)
    return Measure(statistic, data.scored(cases), int(cases.sum()))


def _few(data: Classified, of: int | None) -> str:
    """Why the value of one class has no interval, if too few patients are in it or outside it."""
    if of is None:
        return ""
    fewest = min(int(data.scored(cases).sum()) for cases in (data.labels == of, data.labels != of))
    return "" if fewest >= MIN_PATIENTS else no_interval(fewest)


def _area(data: Classified, of: int) -> Statistic:
    """The area under the ROC curve of one class."""
    ranks = data.probabilities[:, of].unique(return_inverse=True)[1]
    positive = (data.labels == of).double()
    levels, patients = int(ranks.max()) + 1, data.patients

    def statistic(weights: Tensor) -> Tensor:
        areas = []
        for rows in weights.split(max(1, _AT_ONCE // len(ranks))):
            of_case = rows[:, patients]
            positives, negatives = (
                torch.zeros(len(rows), levels, dtype=torch.float64).index_add_(1, ranks, of_case * selected)
                for selected in (positive, 1 - positive)
            )
            below = negatives.cumsum(1) - negatives / 2
            areas.append((positives * below).sum(1) / (positives.sum(1) * negatives.sum(1)))
        return torch.cat(areas)

    return statistic
