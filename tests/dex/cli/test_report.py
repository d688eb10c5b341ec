"""`dex report` as a user calls it."""

import shutil
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "train" / "earlier_run" / "folder"


@pytest.fixture
def runs(tmp_path):
    return [Path(shutil.copytree(RUN, tmp_path / name)) for name in ("a", "b")]


def test_one_run_has_its_page_in_its_folder(run, runs):
    code, out, err = run("report", runs[0])
    size = (runs[0] / "report.html").stat().st_size
    assert (code, out, err) == (0, f"{runs[0]}/report.html, {size / 1000:.0f} kB\n", "")
    assert (runs[0] / "report.html").read_text().startswith("<!doctype html>")


def test_several_runs_have_theirs_here_or_where_asked(run, runs, tmp_path):
    code, out, _ = run("report", *runs)
    assert code == 0 and out.startswith("report.html, ")
    assert run("report", *runs, "--out", "pages/both.html")[0] == 0
    assert (tmp_path / "pages" / "both.html").read_bytes() == (tmp_path / "report.html").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN: expected a value, got nothing; usage: dex report RUN [RUN ...] [options]"),
        ([""], "runs, --out: expected paths, got an empty one"),
        (["a", "--out", " "], "runs, --out: expected paths, got an empty one"),
        (["nowhere"], "run nowhere: expected a run folder; nothing at nowhere"),
        (["a", "--out", "b"], "out: expected a file, got the folder b"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(arguments, message, run, runs, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert run("report", *arguments) == (2, "", f"dex report: {message}\n")
    assert sorted(tmp_path.rglob("*")) == before
