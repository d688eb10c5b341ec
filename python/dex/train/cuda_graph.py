"""Capture the device part of a training step as a CUDA graph and replay it."""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dexkernels.ops import backends

WARM_STEPS = 3
"""Steps before the captured one; they compile kernels and allocate moments, which must not be part of a replay."""
STATUS = "not yet run on a GPU"
"""State of this feature, as printed by ``dex doctor`` and ``--dry-run``."""

Result = TypeVar("Result")


def why_not(
    device: torch.device,
    world_size: int,
    backend: str | None,
    experts: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    """Why a step cannot be captured, as ``expected ..., got ...``; None if it can.

    backend: ``model.backend``. experts: False for the monolithic control. dtype: what experts compute in.
    """
    if device.type != "cuda":
        return f"expected a CUDA device, got {device.type}"
    if world_size > 1:
        return f"expected one rank, since communication between ranks is not captured, got {world_size}"
    backend = backends.covering("grouped_mlp", backend)
    if experts and backends.choose("grouped_mlp", backend, device, dtype=dtype) == "reference":
        return (
            "expected experts that never wait for the host (model.backend triton), got plain torch experts, which read "
            "group sizes on the host"
        )
    return None


class StepGraph:
    """Calls ``compute(*inputs)`` directly ``WARM_STEPS`` times, then captures it; later calls replay the capture.

    A replay runs no Python and launches the same kernels on the same addresses with the same scalars. So ``compute``
    must read whatever changes from ``inputs``, which are copied in, or from tensors that are changed in place. The next
    call overwrites its result. Inputs with other shapes or dtypes than the captured ones are computed without the
    graph. The graph keeps the memory of one step.

    changes: tensors that ``compute`` changes in place; a replay reports the change to autograd.
    """

    def __init__(self, device: torch.device, changes: Sequence[Tensor]):
        self._changes = changes
        # Not the default stream: autograd state from a step on the default stream would make the capture wait for it.
        self._stream = torch.cuda.Stream(device)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Sequence[Tensor] = ()

    def __call__(self, compute: Callable[..., Result], *inputs: Tensor) -> Result:
        self._calls += 1
        if self._graph is None and self._calls > WARM_STEPS:
            self._capture(compute, inputs)
        if self._graph is None or any(
            captured.shape != given.shape or captured.dtype != given.dtype
            for captured, given in zip(self._inputs, inputs, strict=True)
        ):
            return self._run_directly(compute, inputs)
        for captured, given in zip(self._inputs, inputs, strict=True):
            captured.copy_(given)
        self._graph.replay()
        torch.autograd.graph.increment_version(self._changes)
        return self._result

    def _run_directly(self, compute: Callable[..., Result], inputs: Sequence[Tensor]) -> Result:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = compute(*inputs)
        current.wait_stream(self._stream)
        return result

    def _capture(self, compute: Callable[..., Result], inputs: Sequence[Tensor]) -> None:
        """Capture without running; the first replay then does the work of this call."""
        captured = [tensor.clone() for tensor in inputs]
        gc.collect()  # Free memory held by unreachable cycles before the graph reserves its own
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._result = compute(*captured)
        except Exception as error:
            error.add_note("raised while the step was captured; without parallel.cuda_graph it runs directly")
            raise
        self._graph, self._inputs = graph, captured
