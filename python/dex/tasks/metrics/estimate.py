"""A metric over a set of cases with its interval over patients, or the reason why it has none.

Images of one patient resemble each other, so the bootstrap draws patients with all their cases
(``dex.analysis.intervals``).
Shape letters: P patients, R resamples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis.intervals import RESAMPLES, Statistic, bootstrap

MIN_PATIENTS = 4
"""Patients needed for an interval."""
FEW_PATIENTS = 10
"""With fewer patients the coverage of intervals is below 95 %; docs/metrics.md has figures."""
_DEFINED = 0.5
"""Share of resamples in which the metric must be defined."""


class Measure(NamedTuple):
    """A metric over a set of cases, as a function of patient weights."""

    statistic: Statistic
    """``weights [R, P] -> [R]``, float64; NaN if undefined."""
    scored: Tensor
    """bool ``[P]``: patients with a case that counts."""
    cases: int
    """Number of cases that count."""
    no_interval: str = ""
    """Why the metric can have no interval with any patients; "" if it can."""


class Estimate(NamedTuple):
    """A value with its 95 % interval and its numbers of patients and cases."""

    value: float | None
    """None if no case counts."""
    low: float | None
    high: float | None
    patients: int
    """Patients with a case that counts."""
    cases: int
    why: str = ""
    """Why there is no interval; "" if there is one."""


def estimate(measure: Measure, seed: int = 0) -> Estimate:
    """The value with its BCa interval over the patients that have a score.

    There is no interval with fewer than ``MIN_PATIENTS``, if all resamples are equal (which says nothing about other
    patients), or if the metric is undefined in half of the resamples.
    """
    patients = int(measure.scored.sum())
    if patients == 0:
        return Estimate(None, None, None, 0, measure.cases, measure.no_interval or "no case counts for it")
    value = float(measure.statistic(measure.scored.double()[None])[0])
    if not math.isfinite(value):
        return Estimate(None, None, None, patients, measure.cases, "it is undefined for these cases")

    def without(why: str) -> Estimate:
        return Estimate(value, None, None, patients, measure.cases, why)

    if measure.no_interval:
        return without(measure.no_interval)
    if patients < MIN_PATIENTS:
        return without(no_interval(patients))

    def of_scored(weights: Tensor) -> Tensor:
        all_weights = torch.zeros(len(weights), len(measure.scored), dtype=torch.float64)
        all_weights[:, measure.scored] = weights
        return measure.statistic(all_weights)

    result = bootstrap(of_scored, patients, seed=seed)
    if len(result.resampled) < _DEFINED * RESAMPLES:
        return without("too few patients have some class: most resamples lack it")
    if result.resampled[0] == result.resampled[-1]:
        return without("all patients agree, which says nothing about the spread of others")
    interval = result.interval()
    return Estimate(value, interval.low, interval.high, patients, measure.cases)


def no_interval(patients: int) -> str:
    """Why there is no interval with few patients."""
    return f"an interval over {counted(patients, 'patient')} says nothing; at least {MIN_PATIENTS} are needed"


def counted(number: int, noun: str) -> str:
    """``1 patient``, ``1,250 patients``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
