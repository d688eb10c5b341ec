"""`dex analyse` as a user starts it; what is measured is in tests/dex/inference/test_analyse_job.py."""

import csv
import json
import signal
import time
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[1] / "train" / "earlier_run" / "embedded"
FEW = ("--images", 14, "--probed", 20)


def test_a_page_and_its_files(run, tmp_path):
    code, out, err = run("analyse", MODEL, "--out", "x", "--only", "swap", "routing", *FEW)
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "x" / "findings.json").read_text())
    assert out.splitlines()[0] == record["verdict"]["text"] and out.endswith("x/index.html\n")
    assert "14 held-out images of the data set embedded; 95 % intervals over their " in out
    names = {p.name for p in (tmp_path / "x").iterdir()}
    assert names == {"index.html", "findings.json", *record["files"]}
    assert {"swap.svg", "swap.csv", "experts.svg", "routing.csv", "overlap.svg", "heldout.csv"} <= names
    first = (tmp_path / "x" / "index.html").read_bytes()
    code, _, _ = run("analyse", MODEL, "--out", "x", "--only", "swap", *FEW)
    assert code == 0 and (tmp_path / "x" / "index.html").read_bytes() != first
    left = {p.name for p in (tmp_path / "x").iterdir()}
    assert left == {"index.html", "findings.json", "swap.svg", "swap.csv", "heldout.csv"}  # none of the earlier one


def test_heldout_alone_is_a_table(run, tmp_path):
    code, out, err = run("analyse", MODEL, "--only", "heldout")
    lines = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "") and lines[0] == ["step", "3"] and lines[1][0] == "CT" and lines[-2][0] == "all"
    assert list(tmp_path.iterdir()) == [] and not (MODEL / "analysis").exists()
    assert run("analyse", MODEL, "--only", "heldout", "--out", "y")[0] == 0
    rows = list(csv.DictReader((tmp_path / "y" / "heldout.csv").open()))
    assert f"{float(rows[0]['loss']):.4f}" == lines[1][1]


def test_files_of_others_are_left_alone(run, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("mine")
    (tmp_path / "x" / "findings.json").write_text('{"format": "dex-analysis", "files": ["../outside.csv", "gone.csv"]}')
    (tmp_path / "outside.csv").write_text("mine")
    (tmp_path / "x" / "gone.csv").write_text("of an earlier analysis")
    assert run("analyse", MODEL, "--out", "x", "--only", "heldout")[0] == 0
    assert (tmp_path / "x" / "thesis.tex").exists() and (tmp_path / "outside.csv").exists()
    assert not (tmp_path / "x" / "gone.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((MODEL, "--only", "heatmap"), "only: expected some of heldout, routing, swap, "),
        ((MODEL, "--images", "0"), "images: expected at least 1, got 0"),
        ((MODEL, "--checkpoints", "-3"), "checkpoints: expected all, last, or a number of at least 1, got '-3'"),
        ((MODEL, "--out", ""), "out: expected a folder, got ''"),
        ((MODEL, "--out", MODEL / "run.json"), "out: expected a folder, got the file "),
        ((MODEL, "--data", "none"), "data: expected a folder of images or shards, found nothing at 'none'"),
        ((MODEL / "checkpoints" / "step-00000003",), "out: expected --out DIR, since "),
        (("nothing",), "run: expected a run folder, "),
    ],
)
def test_wrong_usage_is_one_line(run, tmp_path, arguments, message):
    code, out, err = run("analyse", *arguments)
    assert (code, out) == (2, "") and err.startswith(f"dex analyse: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint(run, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text((MODEL / "config.yaml").read_text())
    code, _, err = run("analyse", "r")
    assert code == 2 and err.startswith("dex analyse: run: expected a run with a checkpoint; r has none yet")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_midway_nothing_is_written(dex_process, tmp_path, number):
    process = dex_process("analyse", MODEL, "--out", tmp_path / "x", cwd=tmp_path)
    time.sleep(0.5)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if _handles(process.pid, number):
            process.send_signal(number)
            break
        time.sleep(0.05)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75 and err.strip().endswith("dex analyse: stopped; nothing is written")
    assert list(tmp_path.iterdir()) == []


def _handles(pid, number):
    """Whether the process catches SIGTERM itself: it has begun to measure."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_several_ranks_are_refused(run, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = run("analyse", MODEL)
    assert (code, err) == (2, "dex analyse: WORLD_SIZE: expected 1, since dex analyse runs in one process, got 2\n")
