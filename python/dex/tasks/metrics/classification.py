"""Metrics of classified cases as functions of how often each patient counts.

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
"""Weights that are ranked at once."""
_SUM = 1e-3
"""How far the probabilities of a case may be from adding up to 1."""


class Classified(NamedTuple):
    """Cases with known classes."""

    probabilities: Tensor
    """float64 ``[n, C]``, each row adding up to 1."""
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
        """int64 ``[n]``: the most probable class, the first one of several."""
        return torch.from_numpy(self.probabilities.numpy().argmax(1))

    def scored(self, cases: Tensor | None = None) -> Tensor:
        """bool ``[P]``: the patients of these cases (bool ``[n]``), of all without."""
        found = torch.zeros(self.number, dtype=torch.bool)
        found[self.patients if cases is None else self.patients[cases]] = True
        return found

    def by_patient(self, values: Tensor) -> Tensor:
        """float64 ``[P, ...]``: the sums over each patient's cases of ``[n, ...]``."""
        return torch.zeros(self.number, *values.shape[1:], dtype=torch.float64).index_add_(
            0, self.patients, values.double()
        )


def check(probabilities: np.ndarray, labels: np.ndarray) -> None:
    """ValueError, naming the argument, unless they are probabilities ``[n, C]`` and classes ``[n]``."""
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or probabilities.dtype.kind != "f":
        raise ValueError(
            f"probabilities: expected numbers [n, C] of two classes or more, got {probabilities.dtype} "
            f"{list(probabilities.shape)}"
        )
    if labels.shape != probabilities.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels: expected {len(probabilities)} whole numbers, one a case, got {labels.dtype} {list(labels.shape)}"
        )
    if not len(labels):
        raise ValueError("labels: expected at least one case, got none")
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities: expected finite numbers, got NaN or infinity; the model may have diverged")
    apart = float(np.abs(probabilities.sum(1) - 1).max())
    if probabilities.min() < 0 or apart > _SUM:
        raise ValueError(
            "probabilities: expected rows from 0 to 1 that add up to 1, as a softmax gives them, got a least value of "
            f"{probabilities.min():.4g} and sums up to {apart:.4g} away from 1"
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
    """The share of a class's cases that are predicted as such; their mean over the classes with a case, balanced
    accuracy, without ``of``."""
    truth = torch.nn.functional.one_hot(data.labels, data.classes)
    hits = data.by_patient(truth * (data.predicted == data.labels)[:, None])
    shown = data.by_patient(truth)
    statistic, present = _of_classes(lambda weights: (weights @ hits) / (weights @ shown), shown.sum(0) > 0, of)
    return _measure(data, statistic, present, truth.bool())


def f1(data: Classified, of: int | None = None) -> Measure:
    """2 TP / (2 TP + FP + FN) of a class; the mean over the classes with a case or a prediction without ``of``."""
    truth = torch.nn.functional.one_hot(data.labels, data.classes)
    predicted = torch.nn.functional.one_hot(data.predicted, data.classes)
    both, total = data.by_patient(truth * predicted), data.by_patient(truth + predicted)
    statistic, present = _of_classes(lambda weights: 2 * (weights @ both) / (weights @ total), total.sum(0) > 0, of)
    return _measure(data, statistic, present, (truth + predicted).bool())._replace(no_interval=_few(data, of))


def auc(data: Classified, of: int | None = None) -> Measure:
    """The area under the ROC curve of a class against the others: how probable it is that a case of the class gets a
    higher probability than another one, ties counting half. Without ``of``: of class 1 of two classes, else the mean
    over the classes that have cases and others."""
    shown = torch.bincount(data.labels, minlength=data.classes)
    present = (shown > 0) & (shown < len(data.labels))
    if of is None and data.classes == 2:
        of = 1
    wanted = [c for c in range(data.classes) if present[c] and of in (None, c)]
    ranked = [_ranked(data, c) for c in wanted]

    def statistic(weights: Tensor) -> Tensor:
        if not ranked:
            return torch.full((len(weights),), float("nan"), dtype=torch.float64)
        return torch.stack([area(weights) for area in ranked]).mean(0)

    if not wanted:
        return Measure(
            statistic, torch.zeros(data.number, dtype=torch.bool), 0, "it takes cases of the class and others"
        )
    return Measure(statistic, data.scored(), len(data.labels), _few(data, of))


def confusion(data: Classified) -> np.ndarray:
    """int64 ``[C, C]``: cases by truth (rows) and prediction."""
    flat = data.labels * data.classes + data.predicted
    return torch.bincount(flat, minlength=data.classes**2).reshape(data.classes, data.classes).numpy()


def _mean(data: Classified, values: Tensor) -> Statistic:
    sums, shown = data.by_patient(values), data.by_patient(torch.ones(len(values)))
    return lambda weights: (weights @ sums) / (weights @ shown)


def _of_classes(of_each: Statistic, present: Tensor, of: int | None) -> tuple[Statistic, Tensor]:
    """One class of ``weights -> [R, C]`` or the mean over those that are present, and which these are."""
    if of is not None:
        wanted = torch.zeros_like(present)
        wanted[of] = present[of]
        present = wanted
    return (lambda weights: of_each(weights)[:, present].mean(1)), present


def _measure(data: Classified, statistic: Statistic, present: Tensor, enters: Tensor) -> Measure:
    """enters: bool ``[n, C]``, whether a case enters a class's value."""
    cases = enters[:, present].any(1)
    return Measure(statistic, data.scored(cases), int(cases.sum()))


def _few(data: Classified, of: int | None) -> str:
    """Why a value of one class has no interval: too few patients have it, or anything else."""
    if of is None:
        return ""
    least = min(int(data.scored(cases).sum()) for cases in (data.labels == of, data.labels != of))
    return "" if least >= MIN_PATIENTS else no_interval(least)


def _ranked(data: Classified, of: int) -> Statistic:
    """The area of one class."""
    places = data.probabilities[:, of].unique(return_inverse=True)[1]
    positive = (data.labels == of).double()
    levels, patients = int(places.max()) + 1, data.patients

    def statistic(weights: Tensor) -> Tensor:
        areas = []
        for rows in weights.split(max(1, _AT_ONCE // len(places))):
            of_case = rows[:, patients]
            at = [
                torch.zeros(len(rows), levels, dtype=torch.float64).index_add_(1, places, of_case * which)
                for which in (positive, 1 - positive)
            ]
            below = at[1].cumsum(1) - at[1] / 2
            areas.append((at[0] * below).sum(1) / (at[0].sum(1) * at[1].sum(1)))
        return torch.cat(areas)

    return statistic
