"""No step waits for a GPU, and none freezes a number into its launches; shown without a GPU, by `fake_gpu.py`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="a C++ compiler makes the stand-in for a GPU, and there is none"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA: test_gpu.py is its test"),
]

UNTOUCHED = (
    "nothing",
    "micro-batches",
    "checkpointing",
    "bf16",
    "micro-batches in bf16",
    "averages and rates by depth",
    "fp16",
    "fused",
    "fused in bf16",
)

LAYERS = ("layer by token", "layer by mean, cosine", "layer, mse", "layer of a host")

STOPPED = {
    "layer reads its loss": "a value is read on the host: aten._local_scalar_dense",
    "layer reads group sizes": "a value is read on the host: aten._local_scalar_dense",
    "layer asks whether finite": "a value is read on the host: aten._local_scalar_dense",
    "model picks by a mask": "a value is read on the host: aten.index.",
    "model sets by a mask": "a value is read on the host: aten.index_put_",
    "model makes a tensor on the host": "a copy from the host that waits",
    "batch is copied from pageable memory": "a copy from the host with unpinned memory",
    "batch is waited for": "a copy from the host that waits",
    "step reads the loss": "a value is read on the host: aten._local_scalar_dense",
    "step copies the loss": "a copy to the host that waits",
    "verdict decides on the host": "a value is read on the host: aten._local_scalar_dense",
    "verdict is sent and waited for": "step 0 waits for an event of step 0",
    "verdict is sent to pageable memory": "a copy to the host with unpinned memory",
    "verdict is read at once": "step 0 waits for an event of step 0",
    "gradients are checked": "a value is read on the host: aten._local_scalar_dense",
    "directors ask for skip": "a value is read on the host: aten._local_scalar_dense",
    "slots are looked through": "a value is read on the host: aten.nonzero",
}
"""What was put into the step -> what must be found."""

FROZEN = {
    "lr": "aten._fused_adamw_",
    "noise_std": "aten.mul.Tensor",
    "momentum": "aten.full",
    "balance_weight": "aten.mul.Tensor",
    "stop": "aten.full_like",
}
"""What became a number -> the launch that must have been seen to differ from one step to the next."""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What became of the steps of every case."""
    library = tmp_path_factory.mktemp("no_gpu") / "no_gpu.so"
    include, lib = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{include}", f"-L{lib}", f"-Wl,-rpath,{lib}"]
    command = [COMPILER, *flags, HERE / "no_gpu.cpp", "-ltorch_cpu", "-lc10", "-o", library]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "fake_gpu.py", library]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads(done.stdout.splitlines()[-1])
    assert cases.keys() == {*UNTOUCHED, *LAYERS, *STOPPED, *FROZEN}
    return cases


@pytest.mark.parametrize("case", UNTOUCHED)
def test_a_step_waits_for_nothing_and_launches_the_same_whatever_the_schedule(found, case):
    assert found[case]["stopped"] is None
    assert found[case]["launches"] > 1000 and found[case]["moved"] == []
    assert (found[case]["in_bf16"] > 100) == ("bf16" in case)


@pytest.mark.parametrize("case", LAYERS)
def test_nor_does_a_layer_in_another_loop(found, case):
    assert found[case]["stopped"] is None
    assert found[case]["launches"] > 100 and found[case]["moved"] == []


@pytest.mark.parametrize("case", STOPPED)
def test_a_wait_is_found(found, case):
    assert found[case]["stopped"] is not None and STOPPED[case] in found[case]["stopped"]


@pytest.mark.parametrize("case", FROZEN)
def test_a_frozen_number_is_found(found, case):
    assert found[case]["stopped"] is None
    assert any(launch.startswith(FROZEN[case]) for launch in found[case]["moved"]), found[case]["moved"]
