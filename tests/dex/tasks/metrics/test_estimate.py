import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dex.tasks.metrics.estimate import MIN_PATIENTS, Measure, counted, estimate


def of_values(values, scored=None):
    """The mean over patients of one value each."""
    values = torch.as_tensor(values, dtype=torch.float64)
    scored = torch.ones(len(values), dtype=torch.bool) if scored is None else torch.tensor(scored)
    return Measure(lambda weights: (weights @ values) / weights.sum(1), scored, int(scored.sum()))


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Of 200 sets of 30 patients with Dice from Beta(8, 2), whose mean is 0.8: 95 % within two standard errors, 3 %."""
    rng = np.random.default_rng(0)
    found = [estimate(of_values(rng.beta(8, 2, 30))) for _ in range(200)]
    assert 0.91 <= np.mean([e.low <= 0.8 <= e.high for e in found]) <= 0.985


@pytest.mark.parametrize("patients", [1, 2, 3])
def test_a_few_patients_have_a_value_and_no_interval(patients):
    got = estimate(of_values(np.arange(patients) / 4))
    assert got.value == pytest.approx((patients - 1) / 8) and got.patients == patients
    assert got.low is got.high is None and f"interval over {counted(patients, 'patient')} " in got.why
    assert estimate(of_values(np.arange(MIN_PATIENTS) / 4)).why == ""


def test_patients_without_a_score_are_not_drawn():
    values = np.random.default_rng(0).random(9)
    alone = estimate(of_values(values))
    among = estimate(of_values(np.concatenate([values, [100.0, 100.0]]), [True] * 9 + [False] * 2))
    assert among == alone and among.patients == 9


def test_no_spread_is_no_certainty():
    got = estimate(of_values([1.0] * 20))
    assert got.value == 1 and got.low is None and "agree" in got.why


def test_what_resamples_seldom_hold_has_no_interval():
    """A mean over four classes, each of one patient of twenty: few resamples hold them all."""
    values = torch.rand(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shown = torch.eye(20, 4, dtype=torch.float64)

    def statistic(weights):
        return ((weights @ (values * shown)) / (weights @ shown)).mean(1)

    got = estimate(Measure(statistic, torch.ones(20, dtype=torch.bool), 20))
    assert got.value is not None and got.low is None and "most resamples" in got.why


def test_nothing_scored_is_no_value():
    got = estimate(of_values([0.0, 1.0], [False, False]))
    assert got == (None, None, None, 0, 0, "no case counts for it")
    undefined = estimate(of_values([float("nan")] * 5))
    assert undefined.value is undefined.low is None and "undefined" in undefined.why


def test_a_metric_may_forbid_an_interval():
    got = estimate(of_values(np.random.default_rng(0).random(30))._replace(no_interval="a reason"))
    assert got.value is not None and got.low is None and got.why == "a reason"


def test_counted():
    assert [counted(n, "patient") for n in (1, 2, 1250)] == ["1 patient", "2 patients", "1,250 patients"]


@pytest.mark.slow
def test_the_documentation_says_how_often_intervals_cover():
    """The row of mean Dice in docs/metrics.md, within three standard errors of 400 and of 4,000 sets."""
    page = (Path(__file__).parents[4] / "docs/metrics.md").read_text(encoding="utf-8")
    patients, dice = (re.search(rf"^\| {name} \|(.*)\|$", page, flags=re.M)[1] for name in ("patients", "mean Dice"))
    stated = {int(n): float(p.strip(" %")) / 100 for n, p in zip(patients.split("|"), dice.split("|"), strict=True)}
    assert set(stated) >= {4, 10, 30}
    rng = np.random.default_rng(1)
    for number in (4, 10, 30):
        found = [estimate(of_values(rng.beta(8, 2, number))) for _ in range(400)]
        share = np.mean([e.low <= 0.8 <= e.high for e in found if e.low is not None])
        error = (stated[number] * (1 - stated[number]) * (1 / 400 + 1 / 4000)) ** 0.5
        assert abs(share - stated[number]) < 3 * error
