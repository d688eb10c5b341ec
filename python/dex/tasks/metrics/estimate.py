"""A metric of a set of cases with its interval over patients, or the reason why it has none.

Images of one patient resemble each other, so patients are drawn with all their cases (`dex.analysis.intervals`).
Shape letters: P patients, R resamples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis.intervals import RESAMPLES, Statistic, bootstrap

MIN_PATIENTS = 4
"""With fewer there is no interval."""
FEW_PATIENTS = 10
"""With fewer an interval covers the truth less often than it says; docs/metrics.md has how often."""
_DEFINED = 0.5
"""Share of resamples in which the metric has to be defined."""


class Measure(NamedTuple):
    """A metric of a set of cases, as a function of how often each patient counts."""

    statistic: Statistic
    """``weights [R, P] -> [R]``, float64; NaN where it is not defined."""
    scored: Tensor
    """bool ``[P]``: patients with a case that enters it."""
    cases: int
    """That enter it."""
    no_interval: str = ""
    """Why it can have none whatever the patients; "" where it can."""


class Estimate(NamedTuple):
    """A value, its 95 % interval, and what it is of."""

    value: float | None
    """None where no case enters it."""
    low: float | None
    high: float | None
    patients: int
    """With a case that enters it."""
    cases: int
    why: str = ""
    """Why there is no interval; "" with one."""


def estimate(measure: Measure, seed: int = 0) -> Estimate:
    """The value with its BCa interval over the patients that have a score.

    There is none with fewer than `MIN_PATIENTS`, where all resamples agree (no spread says nothing of other patients),
    and where the metric is undefined in half of the resamples.
    """
    patients = int(measure.scored.sum())
    if patients == 0:
        return Estimate(None, None, None, 0, measure.cases, measure.no_interval or "no case enters it")
    value = float(measure.statistic(measure.scored.double()[None])[0])
    if not math.isfinite(value):
        return Estimate(None, None, None, patients, measure.cases, "it is not defined for these cases")

    def without(why: str) -> Estimate:
        return Estimate(value, None, None, patients, measure.cases, why)

    if measure.no_interval:
        return without(measure.no_interval)
    if patients < MIN_PATIENTS:
        return without(no_interval(patients))

    def of_scored(weights: Tensor) -> Tensor:
        whole = torch.zeros(len(weights), len(measure.scored), dtype=torch.float64)
        whole[:, measure.scored] = weights
        return measure.statistic(whole)

    found = bootstrap(of_scored, patients, seed=seed)
    if len(found.resampled) < _DEFINED * RESAMPLES:
        return without("too few patients have some class: most resamples hold none of it")
    if found.resampled[0] == found.resampled[-1]:
        return without("all patients agree, which says nothing of how others would vary")
    interval = found.interval()
    return Estimate(value, interval.low, interval.high, patients, measure.cases)


def no_interval(patients: int) -> str:
    """Why so few patients have none."""
    return f"an interval over {counted(patients, 'patient')} says nothing; it takes {MIN_PATIENTS}"


def counted(number: int, noun: str) -> str:
    """``1 patient``, ``1,250 patients``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
