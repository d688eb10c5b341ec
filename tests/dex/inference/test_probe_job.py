import csv
import json
import re

import pytest

import dex
from dex.inference import probe_job
from dex.inference.collection import Note, Row, collection
from dex.inference.embed_job import Options
from dex.inference.probe_job import Label, Labels, Settings, read_labels

ROW = Row("folder/1", "group", "CT", "image", "")


def note(path, patient=False, file=""):
    return Note("folder/1", path, "image", "", patient, file)


@pytest.mark.parametrize(
    ("note", "labels", "want"),
    [
        (note("a/1.png"), Labels(), ("a", "a/1.png")),
        (note("a/p7/1.png"), Labels(), ("a", "a/p7")),
        (note("a/p7/s1/1.png"), Labels(), ("a", "a/p7")),
        (note("a/p7/1.dcm", patient=True), Labels(), ("a", "group")),
        (note("a/p7/1.dcm", patient=True), Labels(patient=re.compile(r"(p\d)")), ("a", "p7")),
        (note("1.png"), Labels({"1.png": Label("x", "")}), ("x", "1.png")),
        (note("1.png"), Labels({"1.png": Label("x", "p1")}, re.compile(r"(\d)")), ("x", "p1")),
        (note("2.png"), Labels({"1.png": Label("x", "p1")}), None),
        (note("a", file="a/1.dcm"), Labels(), ("a", "a")),
        (note("a", True, "a/1.dcm"), Labels(), ("a", "group")),
        (note("a", True, "a/1.dcm"), Labels({"a/1.dcm": Label("x", "")}), ("x", "group")),
        (note("a", True, "a/1.dcm"), Labels({"a": Label("x", "")}), ("x", "group")),
        (None, Labels(), ("CT", "group")),
        (None, Labels({"folder/1": Label("y", "")}), ("y", "group")),
    ],
)
def test_label_and_patient_of_an_image(note, labels, want):
    assert probe_job._label(ROW, note, labels) == want


def test_a_picture_in_no_class_is_named():
    with pytest.raises(ValueError, match="labels: expected a sub-folder for each class, or --labels; 1.png is in"):
        probe_job._label(ROW, note("1.png"), Labels())


def test_labels_are_read_from_csv(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text("\ufeffpath,label,patient,age\na.png,yes,p1,3\nb.png,no,,4\n", encoding="utf-8")
    labels = read_labels(file, r"^(\w)")
    assert labels.table == {"a.png": ("yes", "p1"), "b.png": ("no", "")} and labels.patient.groups == 1
    for text, message in (
        ("name,label\na,b\n", "labels: expected a CSV file with columns path .* has name, label"),
        ("", "labels: expected a CSV file .* has no line"),
        ("path,label\na,x\na,y\n", "labels: expected one line per path; .*, row 3, names a again"),
        ("path,label\na,\n", "labels: expected a label for each path; .*, row 2, has none"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labels(file, None)
    with pytest.raises(FileNotFoundError, match="labels: expected a CSV file; nothing at"):
        read_labels(tmp_path / "absent.csv", None)
    for pattern, message in (("(", "patient: expected a regular expression;"), (r"p\d", "patient: .* with a group")):
        with pytest.raises(ValueError, match=message):
            read_labels(None, pattern)


@pytest.fixture
def probed(trained, images, tmp_path):
    settings = Settings(shots=(1, 4), draws=3, seeds=2)
    return probe_job.probe(
        dex.load(trained), collection(images, tmp_path / "private"), Labels(), settings, Options(tmp_path / "out")
    )


def test_a_folder_of_classes(probed, tmp_path):
    """The pictures of a class have a colour of their own."""
    assert probed.names == ["ct", "mr", "us"] and len(probed.data.labels) == 120
    assert probed.linear.value > 0.9 and probed.linear.low <= probed.linear.value <= probed.linear.high
    assert probed.knn.value > 0.8 and len(probed.curve) == 2 * 3 * 2
    probe_job.write(probed, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "probe.csv").open()))
    assert tuple(rows[0]) == probe_job.COLUMNS and [row["probe"] for row in rows[:3]] == [
        "linear",
        "knn",
        "few-shot linear",
    ]
    assert float(rows[0]["accuracy"]) == probed.linear.value and rows[2]["low"] == ""
    assert rows[0]["patients"] == "120" and (tmp_path / "out" / "curve.png").stat().st_size > 5000
    assert probe_job.table(probed).startswith("linear         balanced accuracy ")


def test_too_few_patients_are_named(trained, images, tmp_path):
    images_of = collection(images, tmp_path / "private")
    labels = Labels(patient=re.compile(r"^(ct)"))
    with pytest.raises(ValueError, match="labels: expected at least 2 patients of each class, got 1 of class 'ct'"):
        probe_job.probe(dex.load(trained), images_of, labels, Settings(), Options(tmp_path / "out"))
    with pytest.raises(ValueError, match="labels: expected at least 2 classes, got 'one' only"):
        table = {"ct/000.png": Label("one", "")}
        probe_job.probe(dex.load(trained), images_of, Labels(table), Settings(), Options(tmp_path / "out"))


def test_labels_are_judged_before_anything_is_read(images, tmp_path, monkeypatch):
    pictures = collection(images, tmp_path / "private")
    monkeypatch.setattr("dex.inference.collection._Files.read", None)
    probe_job.check_labels(pictures, Labels())
    probe_job.check_labels(pictures, Labels({"ct/000.png": Label("a", ""), "us/001.png": Label("b", "")}))
    for labels, message in (
        (Labels({"absent.png": Label("a", "")}), "labels: expected some of the 120 files or images to have one"),
        (Labels({"ct/000.png": Label("a", ""), "x": Label("b", "")}), "labels: expected at least 2 classes, got 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            probe_job.check_labels(pictures, labels)
    with pytest.raises(ValueError, match="labels: expected a sub-folder for each class, or --labels; 000.png is in"):
        probe_job.check_labels(collection(images / "ct", tmp_path / "private"), Labels())


def test_what_was_left_out_is_said(probed, tmp_path):
    notes = [Note("folder/1", "ct/a.png", "", "unreadable: not a PNG"), Note("folder/2", "ct/b.png", "", "crash")]
    result = probed._replace(unlabelled=3, unmatched=[f"{i}.png" for i in range(7)], refused=notes)
    out = tmp_path / "out"
    probe_job.write(result, out)
    where = tmp_path / "out.private" / "refused.jsonl"
    assert probe_job.left_out(result, out) == [
        "left out: 3 images without a label",
        "labels without an image: 7 (0.png, 1.png, 2.png, 3.png, 4.png, ...)",
        f"refused: 2 files or parts of files (unreadable 1, crash 1); {where} lists them",
    ]
    assert [json.loads(line)["path"] for line in where.read_text().splitlines()] == ["ct/a.png", "ct/b.png"]
    assert where.stat().st_mode & 0o77 == 0
    assert probe_job.left_out(probed, out) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": "all"}, "features: expected one of cls, patches, got 'all'"),
        ({"folds": 1}, "folds: expected at least 2, got 1"),
        ({"shots": (4, 2)}, r"shots: expected ascending positive numbers, got \[4, 2\]"),
        ({"shots": (0,)}, "shots: expected ascending"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        probe_job.check(Settings(**settings))
