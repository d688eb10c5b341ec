"""What candidates took in turns is what pytest-benchmark reports of them."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_entries_have_the_samples_the_group_and_the_ratios(request, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tiny", f"--benchmark-json={out}"]
    run = subprocess.run(
        [*command, "benchmarks/test_group_ema_cpu.py"],
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    entries = {b["extra_info"]["candidate"]: b for b in json.loads(out.read_text())["benchmarks"]}
    assert list(entries) == ["group_ema_", "stack", "copy"]
    assert {b["group"] for b in entries.values()} == {"test_group_ema"}
    medians = {name: b["stats"]["median"] for name, b in entries.items()}
    assert all(len(b["stats"]["data"]) == 2 and min(b["stats"]["data"]) > 0 for b in entries.values())
    for baseline, name in (("stack, multiply, sum", "stack"), ("copy of as many bytes", "copy")):
        ratio = entries["group_ema_"]["extra_info"][f"ratio to {baseline}"]
        assert ratio == pytest.approx(medians[name] / medians["group_ema_"])
    assert "test_group_ema stack" in run.stdout and "Median" in run.stdout and "StdDev" not in run.stdout
