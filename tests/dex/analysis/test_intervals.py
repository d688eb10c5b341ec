import pytest
import torch

from dex.analysis import intervals
from dex.analysis.intervals import balanced_accuracy, bca, bootstrap


def mean_of(values):
    values = torch.as_tensor(values, dtype=torch.float64)
    return lambda weights: (weights @ values) / weights.sum(1)


def test_the_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="needs scipy")
    import numpy as np

    values = np.random.default_rng(0).exponential(size=40)
    got = bca(mean_of(values), 40, resamples=20000)
    want = stats.bootstrap((values,), np.mean, n_resamples=20000, method="BCa", random_state=1).confidence_interval
    width = want.high - want.low
    assert got.value == pytest.approx(values.mean())
    assert abs(got.low - want.low) < 0.05 * width and abs(got.high - want.high) < 0.05 * width


def test_the_interval_covers_as_often_as_it_says():
    """Of the mean of 30 skewed numbers: between 88 and 98 of 100 at a level of 95 %."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(100):
        values = torch.empty(30, dtype=torch.float64).exponential_(generator=generator)
        got = bca(mean_of(values), 30, resamples=500)
        inside += got.low <= 1 <= got.high
    assert 88 <= inside <= 98


def test_skew_moves_both_ends():
    values = torch.tensor([0.0] * 19 + [20.0])
    got = bca(mean_of(values), 20)
    assert got.high - got.value > got.value - got.low  # a percentile interval of the mean would be nearly even


def test_images_of_a_patient_are_drawn_together():
    """100 images of 4 patients that are all right or all wrong: the interval is that of 4 patients."""
    patients = torch.arange(4).repeat_interleave(25)
    right, labels = patients % 2 == 0, torch.arange(100) % 2
    together = bca(*balanced_accuracy(right, labels, patients))
    alone = bca(*balanced_accuracy(right, labels, torch.arange(100)))
    assert together.value == alone.value == 0.5
    assert together.high - together.low > 3 * (alone.high - alone.low)


def test_classes_count_alike():
    right = torch.tensor([True] * 9 + [False])
    labels = torch.tensor([0] * 9 + [1])
    statistic, patients = balanced_accuracy(right, labels, torch.arange(10))
    assert patients == 10 and float(statistic(torch.ones(1, 10, dtype=torch.float64))) == 0.5
    without = torch.ones(1, 10, dtype=torch.float64)
    without[0, 9] = 0  # a resample without class 1
    assert statistic(without).isnan().all()
    assert bca(statistic, patients).low == 0.5  # of the resamples that hold both


def test_what_has_no_spread_is_a_point():
    assert bca(mean_of([0.25] * 8), 8) == (0.25, 0.25, 0.25)
    assert bca(mean_of([0.75]), 1) == (0.75, 0.75, 0.75)


def test_the_same_seed_gives_the_same_interval():
    values = torch.rand(20, generator=torch.Generator().manual_seed(0))
    assert bca(mean_of(values), 20, seed=3) == bca(mean_of(values), 20, seed=3) != bca(mean_of(values), 20, seed=4)


def test_patients_are_left_out_in_parts_as_at_once(monkeypatch):
    values = torch.rand(23, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = bootstrap(mean_of(values), 23)
    assert torch.allclose(whole.left_out, (values.sum() - values) / 22)
    monkeypatch.setattr(intervals, "_LEFT_OUT", 5)
    assert torch.allclose(bootstrap(mean_of(values), 23).left_out, whole.left_out)
    assert bootstrap(mean_of(values[:1]), 1).resampled.numel() == 0


@pytest.mark.parametrize(("options", "message"), [({"patients": 0}, "patients: exp"), ({"level": 1.0}, "level: exp")])
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bca(mean_of([1.0, 2.0]), **{"patients": 2} | options)
