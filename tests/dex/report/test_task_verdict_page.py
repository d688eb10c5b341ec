"""The page of a comparison: what it says, and that hostile names stay text."""

from pathlib import Path

from evaluations import classified

from dex.report import task_verdict_page
from dex.tasks import compare
from dex.tasks.compare import Side
from dex.tasks.compute import Compute

COST = Compute("DEX", 10, 80, 1000, 500, 10**10, 10**8, "abc")
A = Side("DEX", Path("a"), "1", COST)
B = Side("<b>control</b>", Path("b"), "2", COST._replace(name="control", images=160, director=0))


def tasks():
    better = [[classified(seed, strength) for seed in range(3)] for strength in (3.0, 0.5)]
    few = [[classified(seed, strength, n=8) for seed in range(3)] for strength in (3.0, 0.5)]
    return [compare.compared("octdl", *better, {"DEX": "none found in 48 images"}), compare.compared("few", *few)]


def test_verdict_tasks_and_costs(tmp_path):
    results = tasks()
    task_verdict_page.write(tmp_path / "report.html", A, B, results)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    verdict = compare.verdict(A, B, results)
    assert verdict.startswith("DEX is better than <b>control</b> on 1 of 1 tasks")
    assert "1 more has too small a sample" in verdict and "Compute is not equal (images seen: 80 and 160" in verdict
    assert verdict.replace("<b>", "&lt;b&gt;").replace("</b>", "&lt;/b&gt;") in page
    assert "<b>control</b>" not in page
    assert "no verdict: 4 test patients, fewer than 10" in page
    for value in results[0].values:
        assert f"{value:.3f}" in page
    assert "Directors take 1% of the operations" in page and "images seen" in page
    assert "Test images in the pretraining set of DEX: none found in 48 images." in page
    assert page.count('id="task-') == 2
