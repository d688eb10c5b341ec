"""`dex prepare`: what is held out, tables of files, and what is said of both."""

import hashlib
import re
from pathlib import Path

import pytest

from dex.data import ShardDataset

pytestmark = pytest.mark.usefixtures("inline_workers")

X_RAY = ("--modality", "X-ray", "--size", 64, "--out")


def held_out(out):
    found = re.search(r"^held out: ([\d,]+) images?", out, re.MULTILINE)
    return int(found[1].replace(",", ""))


def digest(out):
    return hashlib.sha256((Path(out) / "manifest.json").read_bytes()).hexdigest()


def test_folders_that_are_no_patients_are_parted_and_it_is_said(run, tmp_path, pictures):
    pictures(tmp_path / "scans", 40, patients=2)
    code, out, err = run("prepare", "scans", *X_RAY, "set")
    assert (code, err) == (0, "")
    assert 1 <= held_out(out) <= 6 and held_out(out) == len(ShardDataset(tmp_path / "set").split("val"))
    assert f"train:    {40 - held_out(out)} images of {40 - held_out(out)} files" in out
    (note,) = [line for line in out.splitlines() if line.startswith("note: folder: 2 patients")]
    assert "split by file" in note and "--patient" in note and "--split FILE" in note
    assert "split by file" in (tmp_path / "set" / "card.html").read_text()
    # the user knows better: folders are patients
    code, out, _ = run("prepare", "scans", "--patient", "folder", *X_RAY, "by-folder")
    assert code == 0 and held_out(out) == 20 and "held out: 20 images (50.0 %) of 1 patient" in out
    assert "note: folder: 50 % of the images are held out: 5 % cannot be met" in out
    code, out, _ = run("prepare", "scans", "--val-share", 0, *X_RAY, "none")
    assert code == 0 and held_out(out) == 0 and "note: folder:" not in out
    code, _, err = run("prepare", "scans", "--val-share", 2, *X_RAY, "out")
    assert code == 2 and "val_share: expected a share, 0 to 1, got 2.0" in err


def test_patterns_and_sides(run, tmp_path, pictures):
    pictures(tmp_path / "scans", 40, patients=2)
    code, out, _ = run("prepare", "scans", "--patient", r"/\d*(\d)\.png$", *X_RAY, "set")
    assert (
        code == 0
        and held_out(out) == 4
        and "of 1 patient" in out
        and "of 9 patients" in out
        and "note: folder:" not in out
    )
    (tmp_path / "sides.csv").write_text("path,split\np0/0000.png,val\np1/0001.png,val\n")
    code, out, _ = run("prepare", "scans", "--split", "sides.csv", *X_RAY, "given")
    assert code == 0 and held_out(out) == 2 and "note: folder:" not in out
    (tmp_path / "sides.csv").write_text("path,split\np0/0000.png,val\nnone.png,val\n")
    code, out, err = run("prepare", "scans", "--split", "sides.csv", *X_RAY, "wrong")
    assert (code, out) == (2, "") and "sides.csv: line 3: expected paths or patients of the source" in err
    assert not (tmp_path / "wrong.private").exists()


def test_a_table_from_the_command_line(run, tmp_path, pictures):
    pictures(tmp_path / "scans", 12)
    rows = [f"{path.relative_to(tmp_path)};P{k // 3};{k}" for k, path in enumerate(sorted(tmp_path.rglob("*.png")))]
    (tmp_path / "list.csv").write_text("\ufeffFile;Subject;Age\n" + "\n".join(rows) + "\n", "utf-8")
    code, out, err = run("prepare", "list.csv", *X_RAY, "set")
    assert (code, err) == (0, "") and "table: passed over columns (Age): 1" in out
    assert "of 1 patient" in out and len(ShardDataset(tmp_path / "set")) == 12
    code, out, _ = run("prepare", "list.csv", "--patient", "age", *X_RAY, "by-age")
    assert code == 0 and "of 11 patients" in out
    again = digest("set")
    code, _, _ = run("prepare", "list.csv", *X_RAY, "set")
    assert code == 0 and digest("set") == again
    code, _, err = run("prepare", "list.csv", "--out", "out")
    assert code == 2 and "expected files whose modality a header or the command names, got 12 .png of none" in err
    code, _, err = run("prepare", "list.csv", "--patient", "who", *X_RAY, "out")
    assert code == 2 and "patient: expected a column of list.csv (File, Subject, Age)" in err
    code, _, err = run("prepare", "none.csv", *X_RAY, "out")
    assert code == 2 and "none.csv: expected a table" in err


def test_webdataset_reads_a_set(run, tmp_path, pictures):
    webdataset = pytest.importorskip("webdataset")
    pictures(tmp_path / "scans", 12)
    assert run("prepare", "scans", *X_RAY, "set")[0] == 0
    shards = [str(path) for path in sorted((tmp_path / "set").glob("*.tar"))]
    read = webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("__key__", "jpg", "json")
    samples, ours = list(read), ShardDataset(tmp_path / "set")
    assert [said["id"] for _, _, said in samples] == [ours.sample_id(k) for k in range(12)]
    for number, (_, image, said) in enumerate(samples):
        assert (image == ours[number].image.permute(1, 2, 0).numpy()).all() and said["modality"] == "X-ray"
    assert {said["split"] for _, _, said in samples} == {"train", "val"}
