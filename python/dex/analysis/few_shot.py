"""Probes cross-validated by patient, and few-shot curves.

Shape letters: n images, D width, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis.intervals import Interval, balanced_accuracy, bca
from dex.analysis.linear_probe import choose_penalty, fit
from dex.analysis.probe import knn_vote

FEW_SHOT_PENALTY = 1.0
"""A few images are not enough to choose a penalty."""


class Labelled(NamedTuple):
    """Features with known classes and patients."""

    features: Tensor
    """``[n, D]``"""
    labels: Tensor
    """int64 ``[n]``, 0 to C - 1."""
    patients: Tensor
    """int64 ``[n]``, 0 to patients - 1."""

    @property
    def classes(self) -> int:
        """C."""
        return int(self.labels.max()) + 1

    def take(self, chosen: Tensor) -> "Labelled":
        """Some of the images; ``chosen`` is an index or a mask."""
        return Labelled(self.features[chosen], self.labels[chosen], self.patients[chosen])


class Point(NamedTuple):
    """One draw of a few-shot curve."""

    shots: int
    seed: int
    draw: int
    accuracy: float
    """Mean over classes."""


def folds_of(data: Labelled, folds: int, seed: int) -> Tensor:
    """int64 ``[n]``: fold of each image, 0 to folds - 1, the same for all images of a patient.

    The patients of each class are spread evenly over the folds; a patient belongs to the class of most of its images.
    If a class has fewer patients than folds, there are only that many folds. ValueError: a class with one patient.
    """
    patients, classes = int(data.patients.max()) + 1, data.classes
    table = torch.zeros(patients, classes, dtype=torch.int64)
    table.index_put_((data.patients, data.labels), torch.ones_like(data.labels), accumulate=True)
    smallest = int((table > 0).sum(0).min())
    if smallest < 2:
        few = int((table > 0).sum(0).argmin())
        raise ValueError(f"labels: expected at least 2 patients of each class, got {smallest} of class {few}")
    folds = min(folds, smallest)
    main = table.argmax(1)
    order = torch.randperm(patients, generator=torch.Generator().manual_seed(seed))
    fold_of = torch.empty(patients, dtype=torch.int64)
    by_class = torch.cat([order[main[order] == label] for label in range(classes)])
    fold_of[by_class] = torch.arange(patients) % folds
    return fold_of[data.patients]


def linear(data: Labelled, folds: int = 5, seed: int = 0) -> Interval:
    """Cross-validated accuracy, mean over classes, of linear probes, with its interval over patients.

    The penalty of each probe is chosen by cross-validation within its training folds.
    """
    predicted, fold = torch.empty_like(data.labels), folds_of(data, folds, seed)
    for number in fold.unique().tolist():
        test = fold == number
        known = data.take(~test)
        inner = fold[~test]
        penalty = FEW_SHOT_PENALTY
        if len(inner.unique()) > 1:
            penalty = choose_penalty(known.features, known.labels, inner, data.classes)
        predicted[test] = fit(known.features, known.labels, data.classes, penalty).predict(data.features[test])
    return interval(predicted, data)


def knn(data: Labelled, k: int = 20, folds: int = 5) -> Interval:
    """As ``linear``, for ``dex.analysis.probe.knn_vote``."""
    predicted, fold = torch.empty_like(data.labels), folds_of(data, folds, 0)
    for number in fold.unique().tolist():
        test = fold == number
        known = data.take(~test)
        votes = knn_vote(known.features, known.labels, data.features[test], k)
        predicted[test] = torch.where(votes.valid, votes.labels, -1)
    return interval(predicted, data)


def few_shot(data: Labelled, shots: Sequence[int], draws: int, seeds: int, folds: int = 5) -> list[Point]:
    """Linear probes for each number of images per class, drawn from the training patients of one split per seed.

    The curve ends where a class has fewer training images than shots.
    """
    points = []
    for seed in range(seeds):
        fold = folds_of(data, folds, seed)
        known, test = data.take(fold != 0), data.take(fold == 0)
        available = int(torch.bincount(known.labels, minlength=data.classes).min())
        for count in shots:
            if count > available:
                break
            for draw in range(draws):
                chosen = _draw(known.labels, data.classes, count, seed * 2**20 + draw)
                probe = fit(known.features[chosen], known.labels[chosen], data.classes, FEW_SHOT_PENALTY)
                statistic, patients = balanced_accuracy(
                    probe.predict(test.features) == test.labels, test.labels, test.patients
                )
                value = float(statistic(torch.ones(1, patients, dtype=torch.float64)))
                points.append(Point(count, seed, draw, value))
    return points


def interval(predicted: Tensor, data: Labelled) -> Interval:
    """Accuracy, mean over classes, with its interval over patients."""
    return bca(*balanced_accuracy(predicted == data.labels, data.labels, data.patients))


def _draw(labels: Tensor, classes: int, shots: int, seed: int) -> Tensor:
    """Indices of ``shots`` random images of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == label][:shots] for label in range(classes)])
