import numpy as np
import pytest

from dex.tasks.metrics.difference import paired_difference


def test_pairing_narrows_what_patients_share(classified):
    """Two models of one strength on the same cases: the interval of their difference holds 0."""
    a, b = classified(0, 2.0), classified(1, 2.0)
    got = paired_difference(a, b, "accuracy")
    assert got.estimate.value == pytest.approx(a.estimate("accuracy").value - b.estimate("accuracy").value)
    assert got.estimate.low < 0 < got.estimate.high and got.verdict == "not told apart"
    assert "No clear difference between DEX and control" in got.sentence("DEX", "control")


def test_the_interval_is_scipys_of_paired_patients(classified):
    """Every patient has two cases, so that accuracy is the mean over patients of theirs."""
    stats = pytest.importorskip("scipy.stats", reason="needs scipy, of the extra 'adapt'")
    a, b = classified(0, 1.5, n=80), classified(1, 1.0, n=80)
    right = [[np.argmax(c.probabilities) == c.label for c in e.cases] for e in (a, b)]
    sides = [np.reshape(r, (40, 2)).mean(1) for r in right]

    def difference(x, y, axis):
        return x.mean(axis) - y.mean(axis)

    how = {"paired": True, "method": "BCa", "n_resamples": 9999, "random_state": 0}
    want = stats.bootstrap(sides, difference, **how).confidence_interval
    got = paired_difference(a, b, "accuracy").estimate
    width = want.high - want.low
    assert got.value == pytest.approx(difference(*sides, 0))
    assert abs(got.low - want.low) < 0.1 * width and abs(got.high - want.high) < 0.1 * width


def test_a_better_model_is_better_whichever_way_the_metric_counts(classified):
    good, bad = classified(0, 3.0), classified(0, 0.5)
    for metric, verdict in (("auc", "higher"), ("brier", "lower")):
        got = paired_difference(good, bad, metric)
        assert got.verdict == verdict and got.sentence("DEX", "control").startswith("DEX is better than control")
        turned = paired_difference(bad, good, metric)
        assert turned.sentence("control", "DEX").startswith("control is worse than DEX")
        assert turned.estimate.value == -got.estimate.value
        assert (turned.estimate.low, turned.estimate.high) == pytest.approx((-got.estimate.high, -got.estimate.low))
    by_class = paired_difference(good, bad, "auc", of=1)
    assert by_class.of == 1
    assert by_class.estimate.value == pytest.approx(good.estimate("auc", 1).value - bad.estimate("auc", 1).value)


def test_a_model_does_not_differ_from_itself(classified):
    got = paired_difference(classified(), classified(), "auc")
    assert got.estimate.value == 0 and got.verdict == "not measured" and "without an interval" in got.sentence("A", "B")


def test_seeds_are_paired_with_each_other(classified):
    good, bad = ([classified(seed, strength) for seed in (0, 1, 2)] for strength in (3.0, 0.5))
    got = paired_difference(good, bad[::-1], "accuracy")
    alone = [paired_difference(a, b, "accuracy").estimate.value for a, b in zip(good, bad, strict=True)]
    assert [s.value for s in got.by_seed] == pytest.approx(alone) and [s.seed for s in got.by_seed] == [0, 1, 2]
    assert got.estimate.value == pytest.approx(sum(alone) / 3) and got.verdict == "higher"
    assert "3 of 3 seeds with this sign" in got.sentence("DEX", "control")


def test_seeds_that_disagree_tell_nothing_apart(classified):
    """Two seeds far above and one a little below: the interval leaves out 0, the seeds do not agree."""
    a = [classified(0, 4.0), classified(1, 4.0), classified(2, 1.0)]
    b = [classified(0, 0.0), classified(1, 0.0), classified(2, 1.2)]
    got = paired_difference(a, b, "accuracy")
    assert got.by_seed[2].value < 0 < got.estimate.low and got.verdict == "not told apart"
    assert "2 of 3 seeds with this sign" in got.sentence("A", "B")


def test_distances_are_compared_where_both_models_find_the_class(segmented):
    """One that misses every hard case would otherwise look nearer."""
    a = segmented()
    hard = max(range(len(a.cases)), key=lambda i: a.cases[i].classes[0].hd95)
    case = a.cases[hard]
    missed = case.classes[0]._replace(both=0, predicted=0, hd95=None, nsd=None)
    b = a._replace(cases=tuple(c._replace(classes=(missed, c.classes[1])) if c is case else c for c in a.cases))
    assert b.estimate("hd95", 0).value < a.estimate("hd95", 0).value
    got = paired_difference(b, a, "hd95", of=0)
    assert got.estimate.value == 0 and got.estimate.cases == len(a.cases) - 1
    assert paired_difference(b, a, "dice", of=0).estimate.value < 0


def test_three_patients_have_no_verdict(segmented):
    a, b = segmented(0, 0.99, n=6), segmented(1, 0.6, n=6)
    got = paired_difference(a, b, "dice")
    assert got.estimate.value > 0 and got.verdict == "not measured" and "3 patients" in got.sentence("A", "B")


def test_an_interval_over_few_patients_is_called_too_narrow(segmented, classified):
    few = paired_difference(segmented(0, 0.99), segmented(1, 0.6), "dice")
    assert few.estimate.patients == 6 and "(6 patients; with few patients an interval is too narrow)" in few.sentence(
        "A", "B"
    )
    assert "narrow" not in paired_difference(classified(0, 3.0), classified(0, 0.5), "auc").sentence("A", "B")


def test_sides_that_are_not_of_the_same_cases_are_refused(classified, segmented):
    a = classified()
    for b, message in (
        (classified(n=46), "second: expected the cases of first; 2 cases on one side only, such as case-046"),
        (a._replace(task="other"), "second: expected the task of first, octdl, got other"),
        (segmented(), "second: expected the task"),
        (a._replace(cases=(a.cases[0]._replace(label=(a.cases[0].label + 1) % 3), *a.cases[1:])), "truths of first"),
        (a._replace(cases=(a.cases[0]._replace(patient="another"), *a.cases[1:])), "patients and truths"),
    ):
        with pytest.raises(ValueError, match=message):
            paired_difference(a, b, "accuracy")
    with pytest.raises(ValueError, match="second: expected the seeds of first, 0, 1, got 0, 2"):
        paired_difference([classified(0), classified(1)], [classified(0), classified(2)], "auc")
    with pytest.raises(ValueError, match="first: expected evaluations of different seeds, got 1, 1"):
        paired_difference([classified(1), classified(1)], [classified(1), classified(2)], "auc")
    with pytest.raises(ValueError, match="second: expected evaluations of different seeds, got none"):
        paired_difference([classified(1)], [], "auc")
    with pytest.raises(ValueError, match="metric: expected"):
        paired_difference(a, a, "dice")
