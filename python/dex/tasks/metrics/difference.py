"""The difference of two models on the same cases, paired by patient and seed, with an interval and a sentence.

Shape letters: P patients, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dex.tasks.metrics.estimate import FEW_PATIENTS, Estimate, Measure, counted, estimate
from dex.tasks.metrics.evaluation import METRICS, ClassifiedCase, Evaluation, SegmentedCase
from dex.tasks.metrics.segmentation import ClassScores

Verdict = Literal["higher", "lower", "not told apart", "not measured"]


class SeedDifference(NamedTuple):
    seed: int | None
    value: float | None


class Difference(NamedTuple):
    """The metric of the first minus that of the second, mean over the seeds."""

    metric: str
    of: int | None
    """The class; None for all."""
    estimate: Estimate
    """Its interval shows how the difference varies with patients, not with seeds."""
    by_seed: tuple[SeedDifference, ...]
    verdict: Verdict
    """"higher" or "lower" if the interval excludes 0 and all seeds have the same sign."""

    def sentence(self, first: str, second: str) -> str:
        """The verdict with its numbers, for models with these names."""
        metric, estimate = METRICS[self.metric], self.estimate
        if estimate.value is None:
            return f"{metric.title} of {first} and {second} was not compared: {estimate.why}."
        number = f"{metric.title} {estimate.value:+.3f}"
        basis = counted(estimate.patients, "patient")
        if len(self.by_seed) > 1:
            agreeing = sum(1 for s in self.by_seed if s.value is not None and s.value * estimate.value > 0)
            basis += f"; {agreeing} of {len(self.by_seed)} seeds with this sign"
        if estimate.low is None:
            return f"{first} minus {second}: {number} ({basis}), without an interval: {estimate.why}."
        if estimate.patients < FEW_PATIENTS:
            basis += "; with few patients an interval is too narrow"
        numbers = f"{number} [{estimate.low:+.3f}, {estimate.high:+.3f}] ({basis})"
        if self.verdict == "not told apart":
            return f"No clear difference between {first} and {second}: {numbers}."
        better = (self.verdict == "higher") == metric.higher_is_better
        return f"{first} is {'better' if better else 'worse'} than {second}: {numbers}."


def paired_difference(
    first: Evaluation | Sequence[Evaluation],
    second: Evaluation | Sequence[Evaluation],
    metric: str,
    *,
    of: int | None = None,
) -> Difference:
    """``metric`` (of the class ``of``) of ``first`` minus that of ``second``, each a single evaluation or one per seed.

    Seeds are taken from ``Evaluation.about``; single evaluations form a pair whatever their seeds. Evaluations are
    compared per seed, and patients are drawn for all seeds at once. ValueError: seeds, tasks, cases, patients or truths
    differ between the two sides.
    """
    pairs = _pairs(first, second)
    for a, b in pairs:
        _check_alike(a, b)
    for a, _ in pairs[1:]:
        _check_alike(pairs[0][0], a)
    measures = [(a.measure(metric, of), b.measure(metric, of)) for a, b in (_matched(*pair) for pair in pairs)]

    def by_seed(weights: Tensor) -> Tensor:
        return torch.stack([a.statistic(weights) - b.statistic(weights) for a, b in measures])

    scored = torch.stack([m.scored for pair in measures for m in pair]).any(0)
    cases = max(m.cases for pair in measures for m in pair)
    mean = Measure(lambda weights: by_seed(weights).mean(0), scored, cases, measures[0][0].no_interval)
    difference = estimate(mean)
    values = by_seed(scored.double()[None])[:, 0].tolist() if scored.any() else [float("nan")] * len(pairs)
    seeds = tuple(
        SeedDifference(a.about.get("seed"), value if value == value else None)
        for (a, _), value in zip(pairs, values, strict=True)
    )
    return Difference(metric, of, difference, seeds, _verdict(difference, seeds))


def _verdict(difference: Estimate, seeds: Sequence[SeedDifference]) -> Verdict:
    if difference.low is None:
        return "not measured"
    for verdict, sign, outside in (("higher", 1, difference.low > 0), ("lower", -1, difference.high < 0)):
        if outside and all(s.value is not None and s.value * sign > 0 for s in seeds):
            return verdict
    return "not told apart"


def _pairs(
    first: Evaluation | Sequence[Evaluation], second: Evaluation | Sequence[Evaluation]
) -> list[tuple[Evaluation, Evaluation]]:
    """The two evaluations of each seed."""
    lists = [[side] if isinstance(side, Evaluation) else list(side) for side in (first, second)]
    if [len(side) for side in lists] == [1, 1]:
        return [(lists[0][0], lists[1][0])]
    sides = []
    for name, side in zip(("first", "second"), lists, strict=True):
        by_seed = {e.about.get("seed"): e for e in side}
        if not side or len(by_seed) < len(side) or (len(side) > 1 and None in by_seed):
            listed = ", ".join(str(e.about.get("seed")) for e in side) or "none"
            raise ValueError(f"{name}: expected evaluations of different seeds, got {listed}")
        sides.append(by_seed)
    if sides[0].keys() != sides[1].keys():
        listed = [", ".join(map(str, sorted(side, key=str))) for side in sides]
        raise ValueError(f"second: expected the seeds of first, {listed[0]}, got {listed[1]}")
    return [(sides[0][seed], sides[1][seed]) for seed in sorted(sides[0], key=lambda seed: (seed is None, seed))]


def _check_alike(a: Evaluation, b: Evaluation) -> None:
    for name in ("task", "kind", "classes", "tolerance"):
        if getattr(a, name) != getattr(b, name):
            raise ValueError(f"second: expected the {name} of first, {getattr(a, name)}, got {getattr(b, name)}")
    ids = [{case.id: case for case in side.cases} for side in (a, b)]
    unmatched = sorted(ids[0].keys() ^ ids[1].keys())
    if unmatched:
        raise ValueError(
            f"second: expected the cases of first; {counted(len(unmatched), 'case')} on one side only, such as "
            f"{unmatched[0]}. Evaluate both on the same split"
        )
    for name, case in ids[0].items():
        if case.patient != ids[1][name].patient or _truth(case) != _truth(ids[1][name]):
            raise ValueError(
                f"second: expected the patients and truths of first; those of {name} differ. Evaluate both with the "
                "same labels"
            )


def _matched(a: Evaluation, b: Evaluation) -> tuple[Evaluation, Evaluation]:
    """Both evaluations with surface distances only where both have them: missing hard cases must not look better."""
    if a.kind == "classification":
        return a, b
    pairs = [
        [_shared(x, y) for x, y in zip(of_a.classes, of_b.classes, strict=True)]
        for of_a, of_b in zip(a.cases, b.cases, strict=True)
    ]
    return tuple(
        side._replace(
            cases=tuple(
                case._replace(classes=tuple(pair[number] for pair in row))
                for case, row in zip(side.cases, pairs, strict=True)
            )
        )
        for number, side in enumerate((a, b))
    )


def _shared(x: ClassScores, y: ClassScores) -> tuple[ClassScores, ClassScores]:
    if x.hd95 is None or y.hd95 is None:
        return x._replace(hd95=None, nsd=None), y._replace(hd95=None, nsd=None)
    return x, y


def _truth(case: SegmentedCase | ClassifiedCase) -> object:
    if isinstance(case, ClassifiedCase):
        return case.label
    return case.unit, tuple(c.truth for c in case.classes)
