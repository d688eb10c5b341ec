"""`dexkernels.verify` from end to end, with Triton's interpreter in the place of a GPU and processes of its own.

The interpreter multiplies bf16 wrongly: that must be seen, and float32 be right.
"""

import pytest
import torch

import dexkernels
from dexkernels.verification import run
from dexkernels.verification.identity import INTERPRETER
from dexkernels.verification.record import FOLDER, Sizes, load

SIZES = Sizes(2, 5, 16, 32, 3, 2)


@pytest.fixture(autouse=True)
def small(request, tmp_path, monkeypatch):
    if request.config.getoption("--device") != "cpu" or torch.cuda.is_available():
        pytest.skip("Triton's interpreter, on the CPU, takes the place of a GPU")
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for the processes that run the kernels
    monkeypatch.setattr(run, "SMALL", (SIZES,))
    monkeypatch.setattr(run, "ROUNDS", 2)
    monkeypatch.setattr(run, "JOBS", 1)


def test_in_the_interpreter_float32_is_right_and_bf16_wrong(monkeypatch):
    monkeypatch.setattr(run, "DTYPES", {"route": (torch.float32,), "grouped_mlp": (torch.bfloat16, torch.float32)})
    lines = []
    found = dexkernels.verify(SIZES, device="cpu", seconds=500, say=lines.append)
    states = {c[:3]: c.state for c in found.checks if c.backend != "cuda"}
    assert states["route", "triton", "float32"] == states["grouped_mlp", "triton", "float32"] == "right"
    assert states["grouped_mlp", "triton", "bfloat16"] == "wrong", lines
    assert {t[:3] for t in found.times} == {("route", "triton", "float32"), ("grouped_mlp", "triton", "float32")}
    assert found.identity.gpu == INTERPRETER and load(found.identity)[0] == found
    assert "WRONG OR FAILED: grouped_mlp triton bfloat16" in "\n".join(run.summary(found))
