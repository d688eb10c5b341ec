"""The table of the demo's specialisation says what its results say, and takes analysed runs of the preset only."""

import json
import subprocess
import sys
from pathlib import Path

import demo_specialisation
import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_results_say():
    command = [sys.executable, str(ROOT / "scripts/demo_specialisation.py"), "--page", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_preset_specialises_on_every_seed_as_the_page_says():
    runs = json.loads(demo_specialisation.RESULTS.read_text())
    seeds = [run for run in runs if run["changes"] in ("", "--run.seed 1", "--run.seed 2")]
    assert len(seeds) == 3
    for run in seeds:
        assert run["verdict"] == "specialised" and run["gap"]["low"] > 0 and run["beyond"]["low"] > 0


def test_other_runs_and_those_without_an_analysis_are_refused(tmp_path):
    start = {"command": ["dex", "pretrain", "--preset", "paper"]}
    (tmp_path / "run.json").write_text(json.dumps({"starts": [start]}))
    with pytest.raises(
        ValueError, match="RUN: expected a run of dex pretrain --preset demo, got dex pretrain --preset"
    ):
        demo_specialisation.measured(tmp_path)
    start["command"][3] = "demo"
    (tmp_path / "run.json").write_text(json.dumps({"starts": [start]}))
    with pytest.raises(ValueError, match="RUN: expected an analysed run"):
        demo_specialisation.measured(tmp_path)


def test_a_page_without_the_markers_is_not_changed():
    with pytest.raises(ValueError, match="specialisation.md: expected the lines"):
        demo_specialisation.with_table("# Text", [])
