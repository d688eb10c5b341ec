"""Where a step cannot be captured; what replays do is in tests/step."""

import pytest
import torch

from dex.train import cuda_graph

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def any_backend_runs(monkeypatch):
    monkeypatch.setattr("dexkernels.ops.backends.why_not", lambda op, backend, feature=None: None)
    monkeypatch.setattr("dexkernels.ops.backends.architecture", lambda device: "sm_00")


@pytest.mark.parametrize(
    ("device", "ranks", "backend", "experts", "want"),
    [
        (CPU, 1, "triton", True, "expected a CUDA device, got cpu"),
        (GPU, 2, "triton", True, "expected one rank, since communication between ranks is not captured, got 2"),
        (GPU, 1, "reference", True, "expected experts that never wait for the host"),
        (GPU, 1, None, True, "expected experts that never wait for the host"),  # no results of this GPU
        (GPU, 1, "triton", True, None),
        (GPU, 1, "reference", False, None),
    ],
)
def test_what_is_in_the_way_is_named(device, ranks, backend, experts, want):
    reason = cuda_graph.why_not(device, ranks, backend, experts)
    assert reason is None if want is None else reason.startswith(want)
