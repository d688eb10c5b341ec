from evaluations import classified, segmented

from dex.report.task_words import few, plain, signed, title_of, words_table
from dex.tasks.metrics.estimate import Estimate

WHOLE, BARE = Estimate(0.8125, 0.75, 0.875, 9, 20), Estimate(-0.25, None, None, 2, 4, "too few")
NONE = Estimate(None, None, None, 0, 0, "no case counts for it")


def test_estimates_in_words():
    assert [plain(e) for e in (WHOLE, BARE, NONE)] == ["0.812 [0.750, 0.875]", "-0.250", "–"]
    assert [signed(e) for e in (WHOLE, BARE, NONE)] == ["+0.812 [+0.750, +0.875]", "-0.250", "–"]
    assert few(9) and not few(10)


def test_units_are_part_of_a_title():
    assert title_of(segmented(), "hd95") == "HD95 (mm)" and title_of(segmented(), "nsd") == "NSD at 2 mm"
    assert title_of(segmented(spacing=None), "nsd") == "NSD at 2 pixels"
    assert title_of(classified(), "auc") == "AUC"


def test_words_are_escaped():
    assert "&lt;b&gt;" in words_table(["<b>"], [["x"]]) and "<td>a &amp; b</td>" in words_table(["h"], [["a & b"]])
