"""`dex explain` as a user starts it; what is measured is in tests/dex/inference/test_explain_job.py."""

from pathlib import Path

import pytest

MODEL = Path(__file__).parents[1] / "train" / "earlier_run" / "embedded"
FEW = ("--masks", 2, "--train", 14, "--neighbours", 2)


def test_a_picture(run, images, tmp_path):
    code, out, err = run("explain", MODEL, images / "ct" / "001.png", *FEW)
    assert (code, err) == (0, "") and out.startswith("The masked loss is ")
    assert out.endswith("explain.html (contains the scan and training images)\n")
    page = (tmp_path / "explain.html").read_text()
    assert "<h1>001.png</h1>" in page and page.count("<img ") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["explain.html"]


def test_a_dicom_file_says_its_modality_and_no_more(run, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    files = pytest.importorskip("pydicom.data")
    data = pydicom.dcmread(files.get_testdata_file("CT_small.dcm", download=False))
    data.PatientName, data.PatientID = "Somebody^Private", "secret-42"
    data.save_as(tmp_path / "scan.dcm")
    code, out, err = run("explain", MODEL, "scan.dcm", "--out", "new/page.html", *FEW)
    assert (code, err) == (0, "") and "usual experts of CT" in out
    page = (tmp_path / "new" / "page.html").read_text()
    assert "Modality: CT." in page and "Somebody" not in page and "secret-42" not in page
    assert (tmp_path / "new" / "page.html").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((MODEL, "none.png"), "file: expected a file of the formats "),
        (("none", "none.png"), "run: expected a run folder, "),
        ((MODEL, "none.png", "--masks", "1"), "masks: expected at least 2, got 1"),
        ((MODEL, "none.png", "--out", " "), "out: expected a file, got ' '"),
        ((MODEL, "none.png", "--out", "."), "out: expected a file, got the folder ."),
        ((MODEL,), "FILE: expected a value, got nothing"),
    ],
)
def test_wrong_usage_is_one_line(run, tmp_path, arguments, message):
    code, out, err = run("explain", *arguments)
    assert (code, out) == (2, "") and err.startswith(f"dex explain: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_several_ranks_are_refused(run, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = run("explain", MODEL, "none.png")
    assert (code, err) == (2, "dex explain: WORLD_SIZE: expected 1, since dex explain runs in one process, got 2\n")
