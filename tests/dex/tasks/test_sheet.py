import csv
import errno
import fcntl
import functools
import multiprocessing
import os
import stat
import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from killing import killed_at

from dex.tasks import sheet as module
from dex.tasks.metrics.evaluation import of_classification
from dex.tasks.sheet import COLUMNS, Key, Row, Score, Sheet

KEY = Key("fives", "a1b2", "c3d4", "full", "experts", None, 0)
SCORES = {"dice": Score(0.8123456789012345, 0.7, 0.9, 12), "hd95": Score(3.5, None, None, 3)}
ROW = Row(KEY, "run 1", "e5f6", "dice", 20, "no copy", 12.5, "dexkernels 0.1.0", SCORES)


def seeded(seed):
    return ROW._replace(key=KEY._replace(seed=seed))


def test_rows_come_back_in_their_types(tmp_path):
    sheet = Sheet(tmp_path / "a folder" / "sheet.csv")
    assert sheet.rows() == [] and not sheet.done(KEY)
    other = Row(
        KEY._replace(shots=5, settings="e5"),
        "",
        "",
        "auc",
        3,
        "not checked",
        None,
        "",
        {"auc": Score(None, None, None, 0)},
    )
    assert sheet.add(ROW) and sheet.add(other)
    assert sheet.rows() == [ROW, other]
    assert sheet.done(KEY) and sheet.done(other.key) and not sheet.done(KEY._replace(seed=1))
    read = next(csv.DictReader(sheet.path.open(encoding="utf-8")))
    assert read["dice"] == "0.8123456789012345" and read["hd95_low"] == "" and read["dice_patients"] == "12"


def test_a_row_that_is_there_stays(tmp_path):
    sheet = Sheet(tmp_path / "s.csv")
    assert sheet.add(ROW)
    before = sheet.path.read_bytes()
    assert not sheet.add(ROW._replace(seconds=1.0)) and sheet.path.read_bytes() == before


@settings(max_examples=25, deadline=None)
@example("a\rb", 0, 0.0)
@example("a\r\nb\n", 0, 0.0)
@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_any_text_and_number_comes_back(tmp_path_factory, text, seed, value):
    sheet = Sheet(tmp_path_factory.mktemp("s") / "s.csv")
    row = ROW._replace(run=text, leak=text, seconds=value, key=KEY._replace(seed=seed, task=text))
    sheet.add(row)
    sheet.add(seeded(seed + 1))
    assert sheet.rows()[0] == row and len(sheet.rows()) == 2


def test_a_name_of_a_file_that_is_no_text_comes_back(tmp_path):
    sheet = Sheet(tmp_path / "s.csv")
    row = ROW._replace(run=os.fsdecode(b"r\xffn"))
    sheet.add(row)
    assert sheet.rows() == [row]


def fill(path, seeds):
    for seed in seeds:
        Sheet(path).add(seeded(seed))


def test_processes_and_threads_at_once_lose_no_row(tmp_path):
    path = tmp_path / "s.csv"
    parts = [range(0, 12), range(6, 18), range(20, 26)]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(path, part)) for part in parts[:2]]
    workers += [threading.Thread(target=fill, args=(path, part)) for part in (parts[2], parts[2])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(row.key.seed for row in Sheet(path).rows()) == [*range(18), *range(20, 26)]


def test_a_process_that_is_killed_anywhere_leaves_the_old_rows_or_the_new(tmp_path):
    path = tmp_path / "s.csv"
    Sheet(path).add(ROW)
    killed = 0
    while killed_at(killed, ("open", "fsync", "replace", "close"), functools.partial(Sheet(path).add, seeded(1))):
        rows = Sheet(path).rows()
        assert rows in ([ROW], [ROW, seeded(1)])
        killed += 1
        if len(rows) == 2:  # what was killed after the rename did its work: begin again
            path.unlink()
            Sheet(path).add(ROW)
    assert killed >= 4 and Sheet(path).rows() == [ROW, seeded(1)]
    assert Sheet(path).add(seeded(2)) and {p.name for p in tmp_path.iterdir()} == {"s.csv", ".s.csv.lock"}


def test_a_sheet_that_stays_locked_is_named(tmp_path):
    sheet = Sheet(tmp_path / "s.csv", wait=0.05)
    with Sheet(sheet.path)._locked(), pytest.raises(ValueError, match=r"sheet: expected .*s\.csv to become free"):
        sheet.add(ROW)
    assert sheet.add(ROW)


def test_without_locks_nothing_is_written(tmp_path, monkeypatch):
    def without(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(ValueError, match="sheet: expected a file system with locks"):
        Sheet(tmp_path / "s.csv").add(ROW)
    assert not (tmp_path / "s.csv").exists()


def lines(*rows):
    return "\n".join(",".join(row) for row in rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(COLUMNS[1:]), r"sheet: .* s\.csv without task; choose another file"),
        (lines((*COLUMNS, "colour")), r"s\.csv with colour"),
        (lines((*COLUMNS[:-1], "colour")), f"without {COLUMNS[-1]} and with colour"),
        (lines((*COLUMNS, "task")), "with a repeated column"),
        ("", "without task, checkpoint, .* and .* more"),
        ("\x89PNG\0\n", "sheet: expected"),
        (lines(COLUMNS, ["fives", "a"]), r"sheet: expected \d+ cells in line 2 of .*s\.csv, got 2"),
        (lines(COLUMNS, [*[""] * 6, "x", *[""] * (len(COLUMNS) - 7)]), "seed: expected a whole .* line 2"),
        (lines(COLUMNS, [*[""] * 6, "1", *[""] * (len(COLUMNS) - 7)]), "cases: expected a whole number in line 2"),
    ],
)
def test_another_sheet_is_refused_and_left_as_it_is(tmp_path, content, message):
    path = tmp_path / "s.csv"
    path.write_text(content)
    for act in (Sheet(path).rows, lambda: Sheet(path).done(KEY), lambda: Sheet(path).add(ROW)):
        with pytest.raises(ValueError, match=message.replace(" s\\.csv", r" .*s\.csv")):
            act()
    assert path.read_text() == content


def test_a_folder_is_no_sheet(tmp_path):
    with pytest.raises(ValueError, match="sheet: expected a CSV file"):
        Sheet(tmp_path).rows()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW._replace(run=None), "run: expected text, got None"),
        (ROW._replace(seconds="1"), "seconds: expected a number, got '1'"),
        (ROW._replace(seconds=float("nan")), "seconds: expected a finite number, got 'nan'"),
        (ROW._replace(key=KEY._replace(seed=True)), "seed: expected a whole number, got True"),
        (ROW._replace(key=KEY._replace(seed=None)), "seed: expected a whole number, got ''"),
        (ROW._replace(leak="a\0b"), "leak: expected text without a zero byte"),
        (ROW._replace(scores={"iou": Score(1.0, None, None, 1)}), "scores: expected metrics among .* got iou"),
        (ROW._replace(scores={"dice": Score(float("inf"), None, None, 1)}), "dice: expected a finite number"),
    ],
)
def test_values_that_no_sheet_holds_are_named_before_anything_is_written(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        Sheet(tmp_path / "s.csv").add(row)
    assert list(tmp_path.iterdir()) == []


def test_what_a_table_program_saved_is_read_and_rights_stay(tmp_path):
    sheet = Sheet(tmp_path / "s.csv")
    sheet.add(ROW)
    text = sheet.path.read_text()
    sheet.path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    sheet.path.chmod(0o640)
    assert sheet.rows() == [ROW] and sheet.add(seeded(1)) and len(sheet.rows()) == 2
    assert stat.S_IMODE(sheet.path.stat().st_mode) == 0o640


def test_a_link_to_a_sheet_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "s.csv"
    link.symlink_to(tmp_path / "real" / "sheet.csv")
    assert Sheet(link).add(ROW) and link.is_symlink() and Sheet(link).rows() == [ROW]


def test_the_row_of_an_evaluation():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 20)
    p = rng.dirichlet([1, 1], 20)
    about = {"checkpoint": "f1", "seed": 3, "run": "r"}
    evaluation = of_classification("t", ("x", "y"), [(f"c{i}", f"p{i}") for i in range(20)], p, labels, about=about)
    key = KEY._replace(task="t", seed=3)
    row = module.row_of(evaluation, key, seconds=2.0, versions="v")
    assert row.key == key and (row.run, row.finetuned, row.leak) == ("r", "f1", "not checked")
    want = evaluation.summary()["accuracy"]
    assert row.scores["accuracy"] == (want.value, want.low, want.high, want.patients) and row.cases == 20
    assert set(row.scores) == {"accuracy", "balanced_accuracy", "auc", "f1", "ece", "brier"}
    with pytest.raises(ValueError, match="key: expected the task of the evaluation, 't', got 'fives'"):
        module.row_of(evaluation, KEY)
    with pytest.raises(ValueError, match="key: expected the seed of the evaluation, 3, got 0"):
        module.row_of(evaluation, key._replace(seed=0))
