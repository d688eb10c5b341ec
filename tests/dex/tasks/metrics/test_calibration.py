import numpy as np
import pytest
import torch

from dex.tasks.metrics.calibration import BINS, ece, reliability
from dex.tasks.metrics.classification import Classified
from dex.tasks.metrics.estimate import estimate


def cases(n, over=1.0, seed=0):
    """Labels drawn from probabilities, which are then sharpened by the power ``over``."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([0.6] * 3, n)
    labels = np.array([rng.choice(3, p=row) for row in p])
    p = p**over
    return Classified(
        torch.from_numpy(p / p.sum(1, keepdims=True)), torch.from_numpy(labels), torch.arange(n) // 2, (n + 1) // 2
    )


def test_ece_is_that_of_torchmetrics():
    theirs = pytest.importorskip("torchmetrics.functional.classification", reason="needs torchmetrics")
    for over in (1.0, 3.0):
        data = cases(300, over)
        want = theirs.multiclass_calibration_error(data.probabilities, data.labels, 3, n_bins=BINS, norm="l1")
        assert reliability(data).ece == pytest.approx(float(want), abs=1e-6)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_and_to_the_one_above_in_torchmetrics():
    p = torch.tensor([[0.6, 0.4], [0.61, 0.39]], dtype=torch.float64)
    data = Classified(p, torch.tensor([0, 1]), torch.arange(2), 2)
    assert [b.cases for b in reliability(data).bins[8:10]] == [1, 1]
    theirs = pytest.importorskip("torchmetrics.functional.classification", reason="needs torchmetrics")
    want = float(theirs.multiclass_calibration_error(data.probabilities, data.labels, 2, n_bins=BINS, norm="l1"))
    assert want == pytest.approx(abs(0.5 - 0.605), abs=1e-6)  # both in one bin
    assert reliability(data).ece == pytest.approx((0.4 + 0.61) / 2)


def test_bins_hold_every_case_once():
    data = cases(200)
    got = reliability(data)
    assert sum(b.cases for b in got.bins) == 200 and got.bins[0].low == 0 and got.bins[-1].high == 1
    assert all((b.confidence is None) == (b.cases == 0) for b in got.bins)
    assert all(b.low < b.confidence <= b.high for b in got.bins if b.cases)
    total = sum(b.cases * abs(b.accuracy - b.confidence) for b in got.bins if b.cases) / 200
    assert got.ece == pytest.approx(total)


def test_chance_alone_shows_an_ece_that_only_a_miscalibrated_model_exceeds():
    right, over = (reliability(cases(400, power, seed=1)) for power in (1.0, 4.0))
    assert 0.6 < right.ece / right.by_chance < 1.6
    assert over.ece > 2.5 * over.by_chance
    assert reliability(cases(40)).by_chance > 2 * reliability(cases(4000)).by_chance


def test_ece_has_no_interval_and_says_why():
    got = estimate(ece(cases(60)))
    assert got.value > 0 and got.low is None and "chance" in got.why


def test_certain_and_right_is_0():
    data = Classified(torch.eye(3).double(), torch.arange(3), torch.arange(3), 3)
    assert reliability(data).ece == reliability(data).by_chance == 0
