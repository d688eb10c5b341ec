"""An evaluation: the scores of every case of a task, and metrics over all classes and by class, with intervals.

Shape letters: n cases, C classes, P patients.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dex.tasks.metrics import calibration, classification
from dex.tasks.metrics.classification import Classified
from dex.tasks.metrics.estimate import Estimate, Measure, estimate
from dex.tasks.metrics.segmentation import CaseScores, ClassScores, Unit, mean_dice

Kind = Literal["segmentation", "classification"]


class Metric(NamedTuple):
    title: str
    kind: Kind
    higher_is_better: bool
    of_classes: str
    """The name of its value for one class; "" if there is none."""


METRICS = {
    "dice": Metric("Dice", "segmentation", True, "Dice"),
    "hd95": Metric("HD95", "segmentation", False, "HD95"),
    "nsd": Metric("NSD", "segmentation", True, "NSD"),
    "accuracy": Metric("Accuracy", "classification", True, ""),
    "balanced_accuracy": Metric("Balanced accuracy", "classification", True, "Sensitivity"),
    "auc": Metric("AUC", "classification", True, "AUC against the others"),
    "f1": Metric("F1", "classification", True, "F1"),
    "ece": Metric("ECE", "classification", False, ""),
    "brier": Metric("Brier score", "classification", False, ""),
}
"""By name, as used in tasks and sheets."""


class SegmentedCase(NamedTuple):
    id: str
    patient: str
    unit: Unit
    classes: tuple[ClassScores, ...]


class ClassifiedCase(NamedTuple):
    id: str
    patient: str
    label: int
    probabilities: tuple[float, ...]


class Baseline(NamedTuple):
    """What a model without any knowledge of the images would score."""

    name: str
    value: float | None
    """The primary metric; None if it has no value for such a model."""


class Evaluation(NamedTuple):
    """Created and checked by ``of_segmentation``, ``of_classification`` or ``evaluation_file.read``."""

    task: str
    kind: Kind
    classes: tuple[str, ...]
    metric: str
    """The primary metric, of ``METRICS``."""
    cases: tuple[SegmentedCase | ClassifiedCase, ...]
    """Sorted by patient and id, so nothing depends on their order."""
    confusion: tuple[tuple[int, ...], ...]
    """By truth (rows) and prediction: pixels with the background first, or cases."""
    tolerance: float | None
    """Of NSD, in ``unit``."""
    about: Mapping[str, Any]
    """Facts such as run, step, checkpoint, data, mode, path, shots, seed, leak. Plain values."""

    @property
    def unit(self) -> Unit | None:
        """The unit of HD95: mm if any case has a spacing, which leaves out cases without. None for a classification."""
        if self.kind == "classification":
            return None
        return "mm" if any(case.unit == "mm" for case in self.cases) else "pixels"

    @property
    def patients(self) -> tuple[str, ...]:
        return tuple(sorted({case.patient for case in self.cases}))

    def measure(self, metric: str, of: int | None = None) -> Measure:
        """A metric, of the class ``of`` or of all, as a function of weights of ``patients``.

        ValueError: this kind of task does not have the metric, or not by class.
        """
        self._check(metric, of)
        if self.kind == "segmentation":
            return _segmentation_measure(self, metric, of)
        data = _classified(self)
        by_class = {"balanced_accuracy": classification.sensitivity, "auc": classification.auc, "f1": classification.f1}
        if metric in by_class:
            return by_class[metric](data, of)
        overall = {"accuracy": classification.accuracy, "brier": classification.brier, "ece": calibration.ece}
        return overall[metric](data)

    def estimate(self, metric: str, of: int | None = None) -> Estimate:
        """A metric with its interval over patients; arguments and errors as for ``measure``."""
        return estimate(self.measure(metric, of))

    def summary(self) -> dict[str, Estimate]:
        """Every metric of this kind of task, the primary one first."""
        names = [name for name, metric in METRICS.items() if metric.kind == self.kind]
        return {name: self.estimate(name) for name in sorted(names, key=lambda name: name != self.metric)}

    def baseline(self) -> Baseline:
        """Background only, or always the most frequent class of these cases."""
        if self.kind == "segmentation":
            missed = any(c.state in ("scored", "missed") for case in self.cases for c in case.classes)
            return Baseline("background only", 0.0 if self.metric == "dice" and missed else None)
        counts = [sum(case.label == of for case in self.cases) for of in range(len(self.classes))]
        most = counts.index(max(counts))
        always = tuple(float(of == most) for of in range(len(self.classes)))
        constant = self._replace(cases=tuple(case._replace(probabilities=always) for case in self.cases))
        value = float(constant.measure(self.metric).statistic(torch.ones(1, len(self.patients), dtype=torch.float64)))
        return Baseline(f"always {self.classes[most]}", None if math.isnan(value) else value)

    def by_class(self, metric: str) -> tuple[Estimate, ...]:
        """A metric of each class."""
        return tuple(self.estimate(metric, of) for of in range(len(self.classes)))

    def states(self, of: int) -> Counter[str]:
        """The numbers of cases of a segmentation by ``ClassScores.state`` of a class."""
        return Counter(case.classes[of].state for case in self.cases)

    def case_values(self) -> tuple[float | None, ...]:
        """The values by which cases are ranked: the mean Dice over the classes in truth or prediction, or the
        probability of the true class."""
        if self.kind == "classification":
            return tuple(case.probabilities[case.label] for case in self.cases)
        return tuple(mean_dice(case.classes) for case in self.cases)

    def reliability(self) -> calibration.Reliability:
        """The reliability of a classification."""
        return calibration.reliability(_classified(self))

    def _check(self, metric: str, of: int | None) -> None:
        names = [name for name, m in METRICS.items() if m.kind == self.kind]
        if metric not in names:
            raise ValueError(f"metric: expected one of {', '.join(names)} for a {self.kind}, got {metric!r}")
        if of is not None and not METRICS[metric].of_classes:
            raise ValueError(f"of: expected None, as {metric} has no value by class, got {of!r}")
        if of is not None and not 0 <= of < len(self.classes):
            raise ValueError(f"of: expected a class from 0 to {len(self.classes) - 1}, got {of!r}")


class Examples(NamedTuple):
    """Indices in ``Evaluation.cases`` of the cases shown on a page; they may be equal."""

    best: int
    median: int
    worst: int


def examples(evaluation: Evaluation) -> Examples | None:
    """The cases with the highest, median and lowest value of ``Evaluation.case_values``; None if no case has one."""
    values = evaluation.case_values()
    order = sorted((i for i, v in enumerate(values) if v is not None), key=lambda i: values[i])
    return Examples(order[-1], order[(len(order) - 1) // 2], order[0]) if order else None


def of_segmentation(
    task: str,
    classes: Sequence[str],
    cases: Iterable[tuple[str, str, CaseScores]],
    *,
    metric: str = "dice",
    about: Mapping[str, Any] | None = None,
) -> Evaluation:
    """The evaluation of a segmentation from (id, patient, scores) of every case.

    ValueError: no case, a repeated case, different numbers of classes or tolerances.
    """
    side = len(classes) + 1
    total, segmented, tolerances = np.zeros((side, side), np.int64), [], set()
    for name, patient, scores in cases:
        if len(scores.classes) != len(classes):
            raise ValueError(f"cases: expected scores of {len(classes)} classes, got {len(scores.classes)} of {name}")
        segmented.append(SegmentedCase(str(name), str(patient), scores.unit, scores.classes))
        total += scores.confusion
        tolerances.add(scores.tolerance)
    if len(tolerances) > 1:
        raise ValueError(f"cases: expected one tolerance of NSD, got {', '.join(map(str, sorted(tolerances)))}")
    tolerance = tolerances.pop() if tolerances else None
    confusion = _rows(total)
    return checked(
        Evaluation(task, "segmentation", tuple(classes), metric, tuple(segmented), confusion, tolerance, about or {})
    )


def of_classification(
    task: str,
    classes: Sequence[str],
    cases: Sequence[tuple[str, str]],
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    metric: str = "accuracy",
    about: Mapping[str, Any] | None = None,
) -> Evaluation:
    """The evaluation of a classification.

    cases: (id, patient) of each of the n cases. probabilities: ``[n, C]``, rows sum to 1. labels: ``[n]``, 0 to C - 1.
    ValueError: invalid arguments, or a repeated case.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    classification.check(probabilities, labels)
    if probabilities.shape[1] != len(classes):
        raise ValueError(f"probabilities: expected {len(classes)} columns, one per class, got {probabilities.shape[1]}")
    if len(cases) != len(labels):
        raise ValueError(f"cases: expected {len(labels)}, one per label, got {len(cases)}")
    classified = [
        ClassifiedCase(str(name), str(patient), int(label), tuple(row))
        for (name, patient), label, row in zip(cases, labels, probabilities.astype(np.float64).tolist(), strict=True)
    ]
    evaluation = Evaluation(task, "classification", tuple(classes), metric, tuple(classified), (), None, about or {})
    evaluation = checked(evaluation)
    return evaluation._replace(confusion=_rows(classification.confusion(_classified(evaluation))))


def checked(evaluation: Evaluation) -> Evaluation:
    """The evaluation with sorted cases. ValueError: no case, a repeated case, a metric of another kind of task."""
    if not evaluation.cases:
        raise ValueError("cases: expected at least one, got none")
    counts = Counter(case.id for case in evaluation.cases)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        more = f" and {len(repeated) - 3} others" if len(repeated) > 3 else ""
        raise ValueError(f"cases: expected each id once, got {', '.join(repeated[:3])}{more} several times")
    if len(set(evaluation.classes)) < len(evaluation.classes):
        raise ValueError(f"classes: expected each name once, got {', '.join(evaluation.classes)}")
    evaluation._check(evaluation.metric, None)
    _check_plain(evaluation.about)
    return evaluation._replace(cases=tuple(sorted(evaluation.cases, key=lambda case: (case.patient, case.id))))


def _check_plain(about: Mapping[str, Any]) -> None:
    for name, value in about.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                f"about: expected text, finite numbers and lists of them, got {value!r} for {name!r}"
            ) from None


def _rows(matrix: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, matrix.tolist()))


def _patient_numbers(evaluation: Evaluation) -> Tensor:
    """int64 ``[n]``: the patient of each case."""
    numbers = {patient: i for i, patient in enumerate(evaluation.patients)}
    return torch.tensor([numbers[case.patient] for case in evaluation.cases])


def _classified(evaluation: Evaluation) -> Classified:
    probabilities = torch.tensor([case.probabilities for case in evaluation.cases], dtype=torch.float64)
    labels = torch.tensor([case.label for case in evaluation.cases])
    return Classified(probabilities, labels, _patient_numbers(evaluation), len(evaluation.patients))


def _segmentation_measure(evaluation: Evaluation, metric: str, of: int | None) -> Measure:
    """The mean over the cases that have a value; over classes, the mean of these means."""
    classes = range(len(evaluation.classes)) if of is None else [of]
    unit = evaluation.unit
    rows = [
        [_value(case, c, metric) if metric == "dice" or case.unit == unit else math.nan for c in classes]
        for case in evaluation.cases
    ]
    values = torch.tensor(rows, dtype=torch.float64)
    numbers, patients = _patient_numbers(evaluation), len(evaluation.patients)
    defined = ~values.isnan()
    sums, counts = (
        torch.zeros(patients, len(classes), dtype=torch.float64).index_add_(0, numbers, of_case)
        for of_case in (values.nan_to_num(0.0), defined.double())
    )
    present = counts.sum(0) > 0
    sums, counts = sums[:, present], counts[:, present]
    cases = int(defined.any(1).sum())
    return Measure(lambda weights: ((weights @ sums) / (weights @ counts)).mean(1), counts.sum(1) > 0, cases)


def _value(case: SegmentedCase, of: int, metric: str) -> float:
    scores = case.classes[of]
    value = {"dice": scores.dice, "hd95": scores.hd95, "nsd": scores.nsd}[metric]
    return math.nan if value is None else value
