"""Recorded cases of the published system through the Triton kernels, in the interpreter, by its own process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

RECORDED = Path(__file__).parents[1] / "recorded"
# The training steps would take minutes in the interpreter: of these only the optimizer is run there.
CASES = ["layer_basic", "layer_noisy_router", "layer_odd_shapes", "layer_token_routing", "layer_unused_experts"]
ALIGNED_CASES = ["layer_tokens_130", "layer_tokens_65"]

# float32 has no tiles of the aligned path that ship; the interpreter takes any.
ALIGNED = """
import runpy, sys
from dexkernels.ops.grouped_mlp.triton import aligned, configurations
for kernel, _, _ in configurations.ALIGNED:
    tile = configurations.TILES[kernel, "half", 90]
    configurations.TILES[kernel, "float", 90] = tile._replace(cols=64, depth=32)
configurations.PATH[80, "float"] = "aligned"
launch, blocks = aligned.fc1, []
def fc1(x, weights, z, a, plan):
    blocks.append(plan.blocks)
    launch(x, weights, z, a, plan)
aligned.fc1 = fc1
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("blocks of an image on the aligned path:", blocks)
"""


def replay(folder, cases, *before):
    for case in cases:
        shutil.copy(RECORDED / f"{case}.safetensors", folder)
    done = subprocess.run(
        [sys.executable, *before, RECORDED / "conformance.py", folder, "--dtype", "float32", "--backend", "triton"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(cases)} of {len(cases)} recorded cases conform" in done.stdout
    return done.stdout


def test_recorded_cases(tmp_path):
    replay(tmp_path, CASES + ALIGNED_CASES)


def test_recorded_cases_on_the_aligned_path(tmp_path):
    """Images of one block and of two, each with remainder rows."""
    said = replay(tmp_path, ALIGNED_CASES, "-c", ALIGNED)
    assert said.endswith("blocks of an image on the aligned path: [2, 1]\n")


TRAJECTORY = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import trajectory
print(trajectory.replay(*trajectory.fused(backend="triton"), torch.float32).worst())
"""


@pytest.mark.slow
def test_recorded_steps_of_the_optimizer():
    done = subprocess.run(
        [sys.executable, "-c", TRAJECTORY, RECORDED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1
