"""`dex probe` as a user starts it; what is computed is in tests/dex/inference/test_probe_job.py."""

import csv
from pathlib import Path

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


def test_labels_that_cannot_be_split_fail_on_one_line(images, run):
    code, _, err = run("probe", MODEL, images, "--out", "x", "--patient", "^(ct)", "--workers", 0)
    assert code == 1 and err.startswith("dex probe: labels: expected at least 2 patients of each class, got 1 of")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--folds", "1"), "folds: expected at least 2; got 1"),
        (("--labels", "absent.csv"), "labels: expected a CSV file; nothing at absent.csv"),
        (("--patient", "("), "patient: expected a regular expression"),
        (("--path", "both"), "argument --path: invalid choice"),
    ],
)
def test_wrong_input_is_one_line(options, message, images, run):
    code, _, err = run("probe", MODEL, images, "--out", "x", *options)
    assert code == 2 and err.startswith(f"dex probe: {message}") and err.count("\n") == 1
