"""Every recorded run of the published system is met, in float64 and float32 (`tests/recorded/conformance.py`)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECORDED = Path(__file__).parent / "recorded"
CASES = (
    "layer_basic",
    "layer_noisy_router",
    "layer_odd_shapes",
    "layer_token_routing",
    "layer_tokens_130",
    "layer_tokens_65",
    "layer_unused_experts",
    "mae_tiny_8_steps",
)
LINE = re.compile(r"^(\S+)\.safetensors: (\d+) tensors, nearest to its bound .*, (\S+) of it, (ok|OVER)$", re.M)


@pytest.fixture(scope="module", params=["float64", "float32"])
def replay(request):
    """The finished process of one replay and its lines: case -> (tensors compared, share of the bound, verdict)."""
    command = [sys.executable, str(RECORDED / "conformance.py"), str(RECORDED), "--dtype", request.param]
    # One thread: the cases are small, and on a busy machine threads wait for each other many times as long.
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
    return process, {name: (int(n), float(share), verdict) for name, n, share, verdict in LINE.findall(process.stdout)}


@pytest.mark.parametrize("case", CASES)
def test_case_conforms(replay, case):
    process, lines = replay
    assert case in lines, process.stdout + process.stderr
    tensors, share, verdict = lines[case]
    assert verdict == "ok" and share <= 1
    assert tensors >= (200 if case.startswith("mae") else 20)


def test_no_case_falls_short_or_is_left_out(replay):
    process, lines = replay
    files = {p.stem for p in RECORDED.glob("*.safetensors")}
    assert process.returncode == 0, process.stdout + process.stderr
    assert set(lines) == files and files >= set(CASES)
    assert f"{len(files)} of {len(files)} recorded cases conform" in process.stdout
