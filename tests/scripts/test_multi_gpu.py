"""scripts/multi_gpu.sh, rehearsed on two ranks of gloo: every step it would take on GPUs, and that it can fail."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import multi_gpu_ranks
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/multi_gpu.sh"


def script(*arguments, **environment):
    command = [str(SCRIPT), *map(str, arguments)]
    environment = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_rehearsal_on_gloo(tmp_path):
    out = tmp_path / "acceptance é"
    done = script(out, "--cpu")
    lines = (out / "summary.txt").read_text().splitlines()
    logs = "\n".join(path.read_text() for path in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs[-6000:]
    assert len(lines) == 9 and all(line.startswith("ok ") for line in lines)
    for log, signal in (("killed", "KILL"), ("signalled", "TERM")):
        text = (out / f"{log}.log").read_text()
        assert re.search(rf"^ended with [1-9]\d* after SIG{signal}$", text, re.MULTILINE), text
    assert "weights differ by at most 0.0e+00" in next(line for line in lines if "again" in line)


def test_wrong_usage(tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([tmp_path, "--cpu"], "expected a new folder"),
        ([tmp_path / "new", "--cpu", "--ranks", "1"], "expected at least 2 ranks, got 1"),
        (["--nonsense"], "expected OUT, --ranks N or --cpu, got --nonsense"),
    ):
        done = script(*arguments)
        assert done.returncode == 2 and message in done.stderr
    assert "one command" in script("--help").stdout and not (tmp_path / "new").exists()


def write(folder, rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


AGREE, LAST = {"step": 20, "ranks_agree": True}, {"step": 20, "loss": 0.9}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "expected 20 steps, got 0"),
        ([{"step": 10, "loss": 1.0}, AGREE], "expected 20 steps, got 10"),
        ([{"step": 20, "loss": float("nan")}, AGREE], "a loss is not finite"),
        ([LAST], "expected ranks with equal weights and directors, got no comparison"),
        ([AGREE, LAST, AGREE | {"ranks_agree": False}], "expected ranks with equal .*True, False"),
    ],
)
def test_a_run_that_is_not_healthy_is_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        multi_gpu_ranks.healthy(write(tmp_path / "run", rows), "20")


def test_a_healthy_run(tmp_path):
    run = write(tmp_path / "run", [{"step": 0, "ranks_agree": True}, LAST, AGREE])
    assert multi_gpu_ranks.healthy(run, "20") == "20 steps, last loss 0.9000, ranks equal in 2 comparisons"
