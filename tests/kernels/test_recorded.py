"""Recorded layer cases of the published system through the Triton kernels, in the interpreter, by its own process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

RECORDED = Path(__file__).parents[1] / "recorded"
# The larger ones take minutes in the interpreter.
CASES = ["layer_basic", "layer_noisy_router", "layer_token_routing", "layer_unused_experts"]


def test_recorded_cases(tmp_path):
    for case in CASES:
        shutil.copy(RECORDED / f"{case}.safetensors", tmp_path)
    done = subprocess.run(
        [sys.executable, RECORDED / "conformance.py", tmp_path, "--dtype", "float32", "--backend", "triton"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CASES)} of {len(CASES)} recorded cases conform" in done.stdout
