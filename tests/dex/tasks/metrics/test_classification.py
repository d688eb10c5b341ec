"""Against scikit-learn and torchmetrics, by weights of patients too."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dex.tasks.metrics import classification
from dex.tasks.metrics.classification import Classified, accuracy, auc, brier, confusion, f1, sensitivity
from dex.tasks.metrics.estimate import estimate

sklearn = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn, of the extra 'adapt'")


def cases(seed, n=60, classes=3, patients=20, levels=0):
    """Probabilities that know something, the last class rare. levels: of rounded probabilities, for ties."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.integers(0, classes + 1, n), classes - 1)
    labels[:classes] = np.arange(classes)
    logits = rng.normal(size=(n, classes)) + 1.2 * np.eye(classes)[labels]
    found = np.exp(logits) if not levels else np.ceil(levels * np.exp(logits) / np.exp(logits).max())
    return Classified(
        torch.from_numpy(found / found.sum(1, keepdims=True)),
        torch.from_numpy(labels),
        torch.from_numpy(rng.integers(0, patients, n)),
        patients,
    )


def value(measure, weights=None):
    weights = torch.ones(1, len(measure.scored), dtype=torch.float64) if weights is None else weights[None]
    return float(measure.statistic(weights)[0])


@pytest.mark.parametrize("levels", [0, 4])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_values_are_those_of_sklearn_also_when_patients_are_drawn_twice(classes, levels):
    data = cases(classes, classes=classes, levels=levels)
    truth, predicted, p = data.labels.numpy(), data.predicted.numpy(), data.probabilities.numpy()
    drawn = torch.from_numpy(np.random.default_rng(9).integers(1, 4, data.number)).double()
    for weights in (None, drawn):
        by_case = {} if weights is None else {"sample_weight": weights[data.patients].numpy()}
        assert value(accuracy(data), weights) == pytest.approx(sklearn.accuracy_score(truth, predicted, **by_case))
        assert value(sensitivity(data), weights) == pytest.approx(
            sklearn.balanced_accuracy_score(truth, predicted, **by_case)
        )
        assert value(f1(data), weights) == pytest.approx(sklearn.f1_score(truth, predicted, average="macro", **by_case))
        each = sklearn.f1_score(truth, predicted, average=None, **by_case)
        areas = [sklearn.roc_auc_score(truth == c, p[:, c], **by_case) for c in range(classes)]
        recalls = sklearn.recall_score(truth, predicted, average=None, **by_case)
        for c in range(classes):
            assert value(f1(data, c), weights) == pytest.approx(each[c])
            assert value(auc(data, c), weights) == pytest.approx(areas[c])
            assert value(sensitivity(data, c), weights) == pytest.approx(recalls[c])
        assert value(auc(data), weights) == pytest.approx(areas[1] if classes == 2 else np.mean(areas))
    if classes > 2:
        assert value(auc(data)) == pytest.approx(sklearn.roc_auc_score(truth, p, multi_class="ovr", average="macro"))
    assert (confusion(data) == sklearn.confusion_matrix(truth, predicted)).all()


def test_brier_is_sklearns_twice_that_of_two_classes():
    """Brier's own score is the sum over classes, 0 to 2; scikit-learn halves it where there are two."""
    for classes, factor in ((2, 2), (3, 1)):
        data = cases(0, classes=classes)
        p = data.probabilities.numpy()
        theirs = sklearn.brier_score_loss(data.labels.numpy(), p if classes > 2 else p[:, 1])
        assert value(brier(data)) == pytest.approx(factor * theirs)


def test_values_are_those_of_torchmetrics():
    theirs = pytest.importorskip("torchmetrics.functional.classification", reason="needs torchmetrics")
    data = cases(3)
    p, labels = data.probabilities, data.labels
    assert value(auc(data)) == pytest.approx(float(theirs.multiclass_auroc(p, labels, 3)), abs=1e-6)
    assert value(f1(data)) == pytest.approx(float(theirs.multiclass_f1_score(p, labels, 3)), abs=1e-6)
    got = float(theirs.multiclass_accuracy(p, labels, 3, average="macro"))
    assert value(sensitivity(data)) == pytest.approx(got, abs=1e-6)


def test_a_class_that_is_neither_there_nor_predicted_is_left_out_where_others_count_it_as_0():
    data = Classified(torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]), torch.tensor([0, 1]), torch.arange(2), 2)
    assert value(f1(data)) == value(sensitivity(data)) == value(auc(data)) == 1
    truth, predicted = data.labels.numpy(), data.predicted.numpy()
    with_it = sklearn.f1_score(truth, predicted, average="macro", labels=[0, 1, 2], zero_division=0)
    assert with_it == pytest.approx(2 / 3)
    for measure in (f1(data, 2), sensitivity(data, 2), auc(data, 2)):
        assert measure.cases == 0 and not measure.scored.any() and np.isnan(value(measure))


def test_a_class_that_is_predicted_and_never_there_has_f1_0():
    data = Classified(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]), torch.arange(2), 2)
    assert value(f1(data, 1)) == 0 and value(f1(data)) == pytest.approx(1 / 3)
    assert value(sensitivity(data)) == 0.5  # of class 0 alone
    assert estimate(auc(data)) == (None, None, None, 0, 0, "it takes cases of the class and others")


def test_a_tie_counts_half_and_the_first_class_is_predicted():
    data = Classified(torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1]), torch.arange(4), 4)
    assert value(auc(data)) == 0.5 and data.predicted.tolist() == [0] * 4


def test_ranks_in_parts_are_ranks_at_once(monkeypatch):
    data = cases(5)
    weights = torch.rand(7, data.number, dtype=torch.float64)
    whole = auc(data).statistic(weights)
    monkeypatch.setattr(classification, "_AT_ONCE", 1)
    assert torch.equal(auc(data).statistic(weights), whole)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.sampled_from([0, 3]), st.randoms())
def test_bounds_and_invariance(seed, classes, levels, random):
    """To the order of cases, to the names of patients, and of AUC to whatever keeps the order of probabilities."""
    data = cases(seed, n=24, classes=classes, patients=6, levels=levels)
    order = list(range(24))
    random.shuffle(order)
    renamed = torch.tensor(random.sample(range(6), 6))
    turned = Classified(data.probabilities[order], data.labels[order], renamed[data.patients][order], 6)
    for measure, top in ((accuracy, 1), (sensitivity, 1), (f1, 1), (auc, 1), (brier, 2)):
        got = value(measure(data))
        assert 0 <= got <= top and value(measure(turned)) == pytest.approx(got)
    cubed = data._replace(probabilities=data.probabilities**3)
    for c in range(classes):
        assert value(auc(cubed, c)) == pytest.approx(value(auc(data, c)))
        flipped = data._replace(probabilities=1 - data.probabilities)
        assert value(auc(flipped, c)) == pytest.approx(1 - value(auc(data, c)))


P = np.array([[0.5, 0.5], [1.0, 0.0]])
LABELS = np.array([0, 1])


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (P[0], LABELS, r"probabilities: expected numbers \[n, C\]"),
        (P[:, :1], LABELS, "probabilities: expected .* two classes or more"),
        (P.astype(int), LABELS, "probabilities: expected"),
        (P * np.nan, LABELS, "probabilities: expected finite"),
        (3 * P, LABELS, "probabilities: expected rows from 0 to 1 that sum to 1"),
        (P - [[0.5, -0.5], [0.5, -0.5]], LABELS, None),
        (P + [[0.6, -0.6]], LABELS, "probabilities: expected rows from 0 to 1"),
        (P, LABELS[:1], "labels: expected 2 integers"),
        (P, LABELS.astype(float), "labels: expected 2 integers"),
        (P, LABELS + 1, "labels: expected 0 to 1, got 1 to 2"),
        (P, LABELS - 1, "labels: expected 0 to 1, got -1 to 0"),
        (P[:0], LABELS[:0], "labels: expected at least one"),
    ],
)
def test_wrong_arguments_are_named(probabilities, labels, message):
    if message is None:
        classification.check(probabilities, labels)
        return
    with pytest.raises(ValueError, match=message):
        classification.check(probabilities, labels)


def test_a_class_of_few_patients_has_no_interval():
    """However many patients it is told from: three of forty have class 1."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], 40)
    labels = torch.tensor([1] * 3 + [0] * 20 + [2] * 17)
    data = Classified(torch.from_numpy(p), labels, torch.arange(40), 40)
    for metric in (auc, f1, sensitivity):
        few, many = estimate(metric(data, 1)), estimate(metric(data, 0))
        assert few.value is not None and few.low is None and "over 3 patients" in few.why
        assert many.low is not None
    two = Classified(torch.from_numpy(p[:, :2] / p[:, :2].sum(1, keepdims=True)), labels % 2, torch.arange(40), 40)
    assert estimate(auc(two)).low is None  # of two classes it is that of class 1
