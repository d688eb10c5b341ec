import math

import numpy as np
import pytest

from dex.tasks.metrics.evaluation import METRICS, examples, of_classification, of_segmentation


def test_a_segmentation_in_numbers(segmented):
    got = segmented()
    summary = got.summary()
    assert list(summary) == ["dice", "hd95", "nsd"]
    dice, lesion = got.by_class("dice"), got.states(1)
    assert lesion == {"scored": 2, "missed": 2, "spurious": 2, "empty": 6}
    values = [case.classes[1].dice for case in got.cases]
    assert dice[1].cases == 6 and dice[1].value == pytest.approx(np.mean([v for v in values if v is not None]))
    assert [v for v in values if v == 0] == [0] * 4  # missed and spurious
    assert summary["dice"].value == pytest.approx((dice[0].value + dice[1].value) / 2)
    distances = [case.classes[1].hd95 for case in got.cases if case.classes[1].hd95 is not None]
    assert got.by_class("hd95")[1].value == pytest.approx(np.mean(distances)) and len(distances) == 2
    assert got.unit == "mm" and got.tolerance == 2.0
    assert dice[0].patients == 6 and dice[0].low < dice[0].value < dice[0].high
    assert dice[1].patients == 6 and got.by_class("hd95")[1].low is None  # of two cases
    assert sum(map(sum, got.confusion)) == 12 * 24 * 24


def test_a_classification_in_numbers(classified):
    got = classified()
    summary = got.summary()
    assert list(summary) == ["auc", "accuracy", "balanced_accuracy", "f1", "ece", "brier"]
    right = [np.argmax(case.probabilities) == case.label for case in got.cases]
    assert summary["accuracy"].value == pytest.approx(np.mean(right))
    assert summary["accuracy"].patients == 24 and summary["accuracy"].cases == 48
    assert sum(map(sum, got.confusion)) == 48 and got.unit is None
    assert np.mean([e.value for e in got.by_class("balanced_accuracy")]) == pytest.approx(
        summary["balanced_accuracy"].value
    )
    assert got.reliability().ece == summary["ece"].value


def test_the_baseline_is_what_a_blind_model_scores(classified, segmented):
    assert segmented().baseline() == ("background only", 0.0)
    assert segmented()._replace(metric="hd95").baseline().value is None  # HD95 of an empty mask
    names = ("x", "y", "z")
    labels, cases = np.array([1, 1, 1, 0, 0, 2]), [(f"{i}", f"p{i}") for i in range(6)]
    got = of_classification("t", names, cases, np.full((6, 3), 1 / 3), labels)
    for metric, value in (("accuracy", 1 / 2), ("balanced_accuracy", 1 / 3), ("auc", 1 / 2), ("f1", 2 / 9)):
        name, baseline = got._replace(metric=metric).baseline()
        assert name == "always y" and baseline == pytest.approx(value)


def test_intervals_are_over_patients_not_images(classified):
    """Every case six times, as six images of its patient: the value stays, and so does its interval; as patients of
    their own they would narrow it."""
    one = classified()
    p, labels = [c.probabilities for c in one.cases], [c.label for c in one.cases]

    def six_times(patient_of):
        cases = [(f"{c.id}-{k}", patient_of(c, k)) for c in one.cases for k in range(6)]
        return of_classification("t", one.classes, cases, np.repeat(p, 6, 0), np.repeat(labels, 6)).estimate("accuracy")

    alone, together, apart = (
        one.estimate("accuracy"),
        six_times(lambda c, k: c.patient),
        six_times(lambda c, k: f"{c.id}-{k}"),
    )
    assert together.value == apart.value == pytest.approx(alone.value) and together.patients == alone.patients
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert apart.high - apart.low < 0.7 * (together.high - together.low)


def test_nothing_depends_on_the_order_of_cases(classified):
    one = classified()
    order = np.random.default_rng(1).permutation(len(one.cases))
    cases = [one.cases[i] for i in order]
    other = of_classification(
        one.task,
        one.classes,
        [(c.id, c.patient) for c in cases],
        np.array([c.probabilities for c in cases]),
        np.array([c.label for c in cases]),
        metric=one.metric,
        about=one.about,
    )
    assert other == one and other.summary() == one.summary()


def test_pictures_without_a_spacing_do_not_enter_millimetres(segmented):
    with_mm, pixels = segmented(n=6), segmented(n=12, spacing=None)
    assert pixels.unit == "pixels" and pixels.estimate("hd95").cases == 12
    mixed = with_mm._replace(cases=with_mm.cases + pixels.cases[6:])
    assert mixed.unit == "mm" and mixed.estimate("hd95") == with_mm.estimate("hd95")
    assert mixed.estimate("dice").cases == 12


def test_examples_are_the_best_the_middle_and_the_worst(segmented, classified):
    for evaluation in (segmented(), classified()):
        values, chosen = evaluation.case_values(), examples(evaluation)
        ordered = sorted(v for v in values if v is not None)
        assert values[chosen.best] == ordered[-1] and values[chosen.worst] == ordered[0]
        assert values[chosen.median] == ordered[(len(ordered) - 1) // 2]
    alone = classified(n=1)
    assert examples(alone) == (0, 0, 0)


def test_a_class_of_no_case_has_no_value_and_does_not_spoil_the_mean(segmented):
    got = segmented()
    empty = got.cases[0].classes[0]._replace(both=0, predicted=0, truth=0, hd95=None, nsd=None)
    more = got._replace(
        classes=(*got.classes, "never"),
        cases=tuple(c._replace(classes=(*c.classes, empty)) for c in got.cases),
    )
    assert more.by_class("dice")[2].value is None and more.states(2) == {"empty": 12}
    assert more.summary()["dice"] == got.summary()["dice"]


def test_what_no_evaluation_is_is_named(classified, segmented):
    one = classified()
    with pytest.raises(ValueError, match="metric: expected one of accuracy, .* for a classification, got 'dice'"):
        one.estimate("dice")
    with pytest.raises(ValueError, match="of: expected None, as accuracy has no value by class"):
        one.estimate("accuracy", 0)
    with pytest.raises(ValueError, match="of: expected a class from 0 to 2"):
        one.estimate("auc", 3)
    p, labels = np.full((2, 2), 0.5), np.array([0, 1])
    pair = [("a", "p"), ("b", "p")]
    for arguments, message in (
        ((pair[:1] * 2, p, labels), "cases: expected each id once, got a several times"),
        ((pair[:1], p, labels), "cases: expected 2, one per label, got 1"),
        ((pair, np.full((2, 3), 1 / 3), labels), "probabilities: expected 2 columns"),
    ):
        with pytest.raises(ValueError, match=message):
            of_classification("t", ("x", "y"), *arguments)
    with pytest.raises(ValueError, match="classes: expected each name once, got x, x"):
        of_classification("t", ("x", "x"), pair, p, labels)
    for value in (object(), float("nan"), np.float32(1)):
        with pytest.raises(ValueError, match="about: expected text, .* for 'step'"):
            of_classification("t", ("x", "y"), pair, p, labels, about={"step": value})
    with pytest.raises(ValueError, match="metric: expected one of"):
        of_classification("t", ("x", "y"), pair, p, labels, metric="nonsense")
    with pytest.raises(ValueError, match="cases: expected at least one"):
        of_segmentation("t", ("x",), [])
    scores = [(c.id, c.patient, c) for c in segmented().cases]
    with pytest.raises(ValueError, match="cases: expected scores of 1 classes, got 2"):
        of_segmentation("t", ("x",), scores)


def test_every_metric_says_which_way_is_better():
    assert {name for name, m in METRICS.items() if not m.higher_is_better} == {"hd95", "ece", "brier"}
    assert all(not math.isnan(len(m.title)) and m.title for m in METRICS.values())
