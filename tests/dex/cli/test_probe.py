"""`dex probe` as a user starts it; what is computed is in tests/dex/inference/test_probe_job.py."""

import csv
from pathlib import Path

import numpy as np
import pytest

MODEL = Path(__file__).parents[1] / "train" / "earlier_run" / "embedded"


def test_a_probe_of_a_folder(images, run, tmp_path):
    options = ("--workers", 0, "--shots", 1, 2, "--draws", 2, "--seeds", 1)
    code, out, err = run("probe", MODEL, images, "--out", "probe", *options)
    assert code == 0 and err == ""
    assert out.startswith("120 images of 120 patients: ct 40, mr 40, us 40\nlinear         balanced accuracy ")
    assert len(list(csv.reader((tmp_path / "probe" / "probe.csv").open()))) == 1 + 2 + 4
    assert (tmp_path / "probe" / "curve.png").is_file()
    assert run("probe", MODEL, images, "--out", "again", *options)[1].splitlines()[:-1] == out.splitlines()[:-1]


def test_labels_of_a_table(images, run, tmp_path):
    lines = ["path,label,patient", *(f"ct/{i:03d}.png,{'ab'[i % 2]},p{i // 2 % 8}{i % 2}" for i in range(30))]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    code, out, _ = run("probe", MODEL, images, "--labels", "labels.csv", "--out", "x", "--workers", 0, "--shots")
    assert code == 0 and out.startswith("30 images of 16 patients: a 15, b 15\n")
    assert "left out: 90 images without a label" in out and not (tmp_path / "x" / "curve.png").exists()


def test_classes_of_dicom_files_and_one_that_is_broken(run, tmp_path):
    """Two folders of slices, each file of another patient; the same table by file."""
    pydicom = pytest.importorskip("pydicom")
    files = pytest.importorskip("pydicom.data")
    data = pydicom.dcmread(files.get_testdata_file("CT_small.dcm", download=False))
    rng, lines = np.random.default_rng(0), ["path,label"]
    for name, top in (("low", 300), ("high", 2000)):
        (tmp_path / "scans" / name).mkdir(parents=True)
        for i in range(4):
            data.PixelData = rng.integers(0, top, (128, 128), dtype=np.int16).tobytes()
            data.PatientID, data.SOPInstanceUID, data.SeriesInstanceUID = (f"{name}{i}", f"1.2.{i}", f"1.3.{top}.{i}")
            data.save_as(tmp_path / "scans" / name / f"{i}.dcm")
            lines.append(f"{name}/{i}.dcm,{'even' if i % 2 else 'odd'}")
    (tmp_path / "scans" / "low" / "broken.dcm").write_bytes(b"rubbish")
    options = ("--workers", 1, "--shots")
    code, out, err = run("probe", MODEL, "scans", "--out", "a", *options)
    assert (code, err) == (0, "") and out.startswith("8 images of 8 patients: high 4, low 4\n")
    assert "refused: 1 files or parts of files (unreadable 1); a.private/refused.jsonl lists them\n" in out
    (tmp_path / "labels.csv").write_text("\n".join([*lines, "gone.dcm,odd"]) + "\n")
    code, out, _ = run("probe", MODEL, "scans", "--out", "b", "--labels", "labels.csv", *options)
    assert code == 0 and out.startswith("8 images of 8 patients: even 4, odd 4\n")
    assert "labels without an image: 1 (gone.dcm)\n" in out


def test_several_ranks_are_refused(images, run, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = run("probe", MODEL, images, "--out", "x")
    assert (code, err) == (2, "dex probe: WORLD_SIZE: expected 1, since dex probe runs in one process, got 2\n")


def test_results_are_not_overwritten(images, run, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "probe.csv").write_text("earlier")
    code, _, err = run("probe", MODEL, images, "--out", "x")
    assert (code, err) == (
        2,
        "dex probe: out: expected a folder without results; x/probe.csv exists. Choose another --out\n",
    )


def test_labels_that_cannot_be_split_fail_on_one_line(images, run):
    code, _, err = run("probe", MODEL, images, "--out", "x", "--patient", "^(ct)", "--workers", 0)
    assert code == 1 and err.startswith("dex probe: labels: expected at least 2 patients of each class, got 1 of")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--labels", "empty.csv"), "labels: expected a CSV file with columns path"),
        (("--labels", "other.csv"), "labels: expected some of the 120 files or images to have one"),
        (("--labels", "one.csv"), "labels: expected at least 2 classes, got 'a' only"),
        (("--slope", "2"), "modality: expected one, since files of the formats picture do not state"),
        (("--modality", "XRY"), "modality: expected one of"),
        (("--folds", "1"), "folds: expected at least 2, got 1"),
        (("--labels", "absent.csv"), "labels: expected a CSV file; nothing at absent.csv"),
        (("--patient", "("), "patient: expected a regular expression"),
        (("--path", "both"), "path: expected one of experts, director, got 'both'"),
    ],
)
def test_wrong_input_is_one_line(options, message, images, run, tmp_path):
    for name, lines in (("empty", ""), ("other", "path,label\nx.png,a\n"), ("one", "path,label\nct/000.png,a\n")):
        (tmp_path / f"{name}.csv").write_text(lines)
    code, _, err = run("probe", MODEL, images, "--out", "x", *options)
    assert code == 2 and err.startswith(f"dex probe: {message}") and err.count("\n") == 1
