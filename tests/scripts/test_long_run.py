"""The page about the long run says what was measured, and that run neither leaked, drifted nor hid an unused expert."""

import json
import subprocess
import sys
from pathlib import Path

import long_run
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found():
    return json.loads((ROOT / "benchmarks/results/long-run/two-ranks.json").read_text())


def test_the_page_is_what_the_results_say():
    command = [sys.executable, str(ROOT / "scripts/long_run.py"), "--page", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_leak_no_drift_nothing_unnoticed(found):
    steps = found["rows"][-1]["step"]
    assert steps >= 2000 and found["start"]["ranks"] == 2
    assert not any(row.get("skipped") for row in found["rows"])
    agree = [row["ranks_agree"] for row in found["rows"] if "ranks_agree" in row]
    assert len(agree) >= 6 and all(agree)
    assert len(found["memory"]) > 50 and max(long_run.growth(found)) < 1.05
    losses = [row["val_loss"] for row in found["rows"] if "val_loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    events = [e for e in found["events"] if e["event"] == "unused experts"]
    warned = {(e["layer"], expert) for e in events for expert in e["dead"] + e["nearly_dead"]}
    *_, trained = (row["usage_min_share"] for row in found["rows"] if row.get("usage_min_share"))
    for layer, expert in long_run.unused_at_the_end(found):  # By held-out images; training images may use it.
        assert (layer, expert) in warned or trained[layer] > 0


def test_what_the_page_would_say_of_a_leak(found):
    """A rank that grows, and an expert that nobody warned of, are seen."""
    steps = found["rows"][-1]["step"]
    leaking = [{"step": look["step"], "memory_mb": [500, 500 + look["step"] / steps * 100]} for look in found["memory"]]
    first, second = long_run.growth(found | {"memory": leaking})
    assert first == 1 and 1.05 < second < 1.2
    *_, last = (row for row in found["rows"] if "val_expert_mass" in row)
    mass = {name: [[0.0, *layer[1:]] for layer in layers] for name, layers in last["val_expert_mass"].items()}
    changed = [row if row is not last else row | {"val_expert_mass": mass} for row in found["rows"]]
    seen = long_run.unused_at_the_end(found | {"rows": changed})
    assert [0, 0] in seen and len(seen) >= len(last["val_expert_mass"]["CT"])
