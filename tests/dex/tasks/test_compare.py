"""Two runs on tasks: what is made once, paired how, and when no verdict is given."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dex.tasks import compare
from dex.tasks.compare import Side
from dex.tasks.compute import Compute
from dex.tasks.metrics.evaluation import of_classification
from dex.tasks.sheet import Sheet

COST = Compute("DEX", 10, 80, 1000, 500, 10**9, 0, "abc")
A, B = Side("DEX", Path("a"), "1", COST), Side("control", Path("b"), "2", COST._replace(name="control"))


@pytest.fixture
def cheap(quick):
    return replace(quick, epochs=2)


@pytest.mark.slow
def test_both_sides_are_fine_tuned_once_and_compared(pretrained, shade_data, cheap, tmp_path, monkeypatch):
    """The control: the same architecture from a random start."""
    task = compare.prepared(shade_data)
    a, b = compare.side("DEX", pretrained), compare.side("random", pretrained, "random")
    made, finetune = [], compare.finetune
    monkeypatch.setattr(compare, "finetune", lambda *args, **kw: made.append(args[3].name) or finetune(*args, **kw))
    for _ in range(2):
        sides = [
            [
                compare.outcome(one, task, compare.settings_of(one, cheap, seed), tmp_path, discard=True)
                for seed in (0, 1)
            ]
            for one in (a, b)
        ]
    assert made == ["DEX-seed-0", "DEX-seed-1", "random-seed-0", "random-seed-1"]
    rows = Sheet(tmp_path / compare.SHEET).rows()
    assert [(row.key.seed, row.run) for row in rows] == [
        (0, "run"),
        (1, "run"),
        (0, "random start"),
        (1, "random start"),
    ]
    assert len({row.key.data for row in rows}) == 1 and rows[0].key.settings != rows[2].key.settings
    assert not list(tmp_path.glob("*/*/checkpoints"))
    result = compare.compared("shades", *sides)
    patients = len(sides[0][0].patients)
    assert result.reasons == (f"{patients} test patients, fewer than 10", "2 seeds, fewer than 3")
    values = [s.value for s in result.difference.by_seed]
    metric = shade_data.task.metric
    assert values == pytest.approx(
        [x.estimate(metric).value - y.estimate(metric).value for x, y in zip(*sides, strict=True)]
    )
    compare.write_result(tmp_path / compare.RESULT, a, b, [result])
    said = json.loads((tmp_path / compare.RESULT).read_text())
    assert said["verdict"].startswith("No verdict: the sample is too small (2 seeds, fewer than 3; ")
    assert "Compute is not equal (images seen: 48 and 0" in said["compute_says"][0]


def evaluation(right, seed, patients=20):
    """Of a classification with two classes, a case a patient; ``right``: the probability of the truth by case."""
    rows = [(p, 1 - p) if i % 2 else (1 - p, p) for i, p in enumerate(right)]
    whose = [(f"case-{i}", f"patient-{i % patients}") for i in range(len(right))]
    labels = [0 if i % 2 else 1 for i in range(len(right))]
    import numpy as np

    return of_classification(
        "t", ("a", "b"), whose, np.array(rows), np.array(labels), metric="accuracy", about={"seed": seed}
    )


def sides_of(first, second, patients=20, seeds=3):
    return [[evaluation(side, seed, patients) for seed in range(seeds)] for side in (first, second)]


def test_a_verdict_in_a_sentence():
    good, bad = [0.9] * 38 + [0.2] * 2, [0.9] * 14 + [0.2] * 26
    better = compare.compared("one", *sides_of(good, bad))
    same = compare.compared("two", *sides_of(good, good))
    assert better.reasons == () and better.difference.verdict == "higher"
    assert compare.verdict(A, B, [better, same]) == (
        "DEX is better than control on 1 of 2 tasks, worse on 0, without a clear difference on 1."
    )
    small = compare.compared("three", *sides_of(good, bad, patients=4))
    assert small.reasons == ("4 test patients, fewer than 10",)
    assert "1 more has too small a sample for a verdict" in compare.verdict(B, A, [better, small])
    few = compare.compared("four", *sides_of(good, bad, seeds=2))
    assert compare.verdict(A, B, [small, few]) == (
        "No verdict: the sample is too small (2 seeds, fewer than 3; 4 test patients, fewer than 10)."
    )


def test_a_lower_metric_may_be_the_better_one():
    good, bad = [0.9] * 38 + [0.2] * 2, [0.9] * 14 + [0.2] * 26
    first, second = ([e._replace(metric="brier") for e in side] for side in sides_of(good, bad))
    result = compare.compared("one", first, second)
    assert result.difference.verdict == "lower"
    assert compare.verdict(A, B, [result]).startswith("DEX is better than control on 1 of 1")


def test_unequal_compute_is_part_of_the_verdict():
    other = B._replace(compute=COST._replace(images=160, steps=20, operations=2 * 10**9))
    result = compare.compared("one", *sides_of([0.9] * 40, [0.2] * 40))
    said = compare.verdict(A, other, [result])
    assert "Compute is not equal (images seen: 80 and 160; steps: 10 and 20; operations of pretraining" in said


def test_runs_that_are_the_same_are_refused(pretrained, tmp_path):
    with pytest.raises(ValueError, match="B: expected another run than A"):
        compare.sides(pretrained, pretrained)
    with pytest.raises(FileNotFoundError, match="run: expected a run folder"):
        compare.sides(pretrained, tmp_path / "absent")


def test_the_leak_check_runs_once_for_a_set(shade_data, monkeypatch):
    asked = []

    def of_run(data, run, sides):
        asked.append((run, sides))
        return compare.leakage.not_checked("of a test")

    monkeypatch.setattr(compare.leakage, "of_run", of_run)
    said = compare.leaks(compare.Prepared(shade_data, ""), (A, B))
    assert said == {"DEX": "not checked because of a test", "control": "not checked because of a test"}
    assert asked == [(A.run, ("test",))]
    compare.leaks(compare.Prepared(shade_data, ""), (A, B._replace(compute=COST._replace(data="other"))))
    assert len(asked) == 3


def test_a_sheet_of_other_columns_is_refused(tmp_path):
    compare.open_sheet(tmp_path)
    (tmp_path / compare.SHEET).write_text("a,b\n")
    with pytest.raises(ValueError, match="sheet: expected the columns of this version"):
        compare.open_sheet(tmp_path)


def test_other_data_are_refused(shade_data, tmp_path, shades):
    task = compare.prepared(shade_data)
    compare._same_data(tmp_path / "shades/data.sha256", task)
    compare._same_data(tmp_path / "shades/data.sha256", compare.prepared(shade_data))
    reworded = shade_data._replace(task=replace(shade_data.task, title="Another title"))
    compare._same_data(tmp_path / "shades/data.sha256", compare.prepared(reworded))
    fewer = compare.prepared(shade_data._replace(cases=shade_data.cases[1:]))
    with pytest.raises(ValueError, match="data: expected the images, masks and splits of shades"):
        compare._same_data(tmp_path / "shades/data.sha256", fewer)


def test_the_fingerprint_is_of_every_byte(shade_data, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(shade_data.cases[0].image.read_bytes())
    data = shade_data._replace(cases=(shade_data.cases[0]._replace(image=copy), *shade_data.cases[1:]))
    before = compare._fingerprint(data)
    copy.write_bytes(copy.read_bytes() + b"x")
    assert compare._fingerprint(data) != before


def test_a_task_without_test_cases_is_refused(shade_data):
    cases = tuple(case for case in shade_data.cases if case.split != "test")
    with pytest.raises(ValueError, match="data: expected test cases of"):
        compare.prepared(shade_data._replace(cases=cases))


def test_a_fine_tuning_that_fails_is_named(pretrained, shade_data, cheap, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "finetune", lambda *_, **keywords: 3)
    one, task = compare.side("DEX", pretrained), compare.prepared(shade_data)
    with pytest.raises(compare.Failed, match="exit code 3") as failed:
        compare.outcome(one, task, cheap, tmp_path)
    assert failed.value.code == 3 and not (tmp_path / compare.SHEET).exists()
