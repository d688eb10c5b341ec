import html

import pytest
from evaluations import classified, segmented

from dex.report.task_comparison import Other, compared, section
from dex.tasks.metrics.difference import paired_difference


def test_the_verdict_is_that_of_the_first_difference():
    good, bad = classified(0, 3.0), classified(0, 0.5)
    found = compared("DEX <1>", [good], Other("control", [bad]))
    verdict = paired_difference(good, bad, "auc").sentence("DEX <1>", "control")
    assert found.content.startswith(f'<p class="verdict">{html.escape(verdict, quote=True)}</p>')
    assert "<1>" not in found.content and "Second: control." in found.content
    for words in ("AUC, drusen", "Brier score", "the first", "not measured"):  # ECE has no interval
        assert words in found.content


def test_seeds_are_shown_one_by_one():
    ours, theirs = ([segmented(seed, right) for seed in (0, 1)] for right in (0.97, 0.7))
    found = compared("a", ours, Other("b", theirs)).content
    difference = paired_difference(ours, theirs, "dice")
    assert " ".join(f"{s.value:+.3f}" for s in difference.by_seed) in found and "Dice, lesion" in found


def test_a_lower_distance_is_better_whoever_comes_first():
    good, bad = segmented(0, 0.99), segmented(0, 0.6)
    got = section("bad", "good", [paired_difference(bad, good, "hd95")], good.classes).content
    assert "bad is worse than good" in html.unescape(got) and "<td>the second</td>" in got


def test_other_cases_are_refused():
    with pytest.raises(ValueError, match="second: expected the cases of first"):
        compared("a", [classified()], Other("b", [classified(n=46)]))
