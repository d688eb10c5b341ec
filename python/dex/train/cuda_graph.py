"""The device part of a training step, captured once as a CUDA graph and replayed from then on."""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dexkernels.ops import backends

WARM_STEPS = 3
"""Steps before the one that is captured: what they compile and allocate (moments) must be no part of a replay."""
STATUS = "not yet run on a GPU"
"""What `dex doctor` and `--dry-run` say of it."""

Result = TypeVar("Result")


def why_not(device: torch.device, world_size: int, backend: str | None, experts: bool) -> str | None:
    """What is in the way of a graph, as ``expected ...; got ...``; None when nothing is.

    backend: ``model.backend``. experts: False for the monolithic control.
    """
    if device.type != "cuda":
        return f"expected a CUDA device; got {device.type}"
    if world_size > 1:
        return f"expected one rank, since what ranks exchange is not captured; got {world_size}"
    if experts and backends.choose("grouped_mlp", backends.covering("grouped_mlp", backend), device) == "reference":
        return (
            "expected experts that need nothing of the host (model.backend triton); got those of plain torch, which "
            "read the sizes of their groups there"
        )
    return None


class StepGraph:
    """Calls ``compute(*inputs)``: `WARM_STEPS` times as it is; then it is captured, and each call replays the capture.

    A replay launches what the capture launched, on the same addresses, with the same numbers, and runs no Python. So
    ``compute`` must read what differs from call to call from ``inputs``, which are copied in, or from tensors that are
    changed in place. What it returns is overwritten by the next call. Inputs of other shapes or dtypes than the
    captured ones are computed without the graph. The memory of one step stays the graph's own.

    changes: tensors that ``compute`` changes in place; autograd is told that a replay changed them.
    """

    def __init__(self, device: torch.device, changes: Sequence[Tensor]):
        self._changes = changes
        # Not the default stream: what autograd keeps of a step that ran there would make the capture wait for it.
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
            return self._without(compute, inputs)
        for captured, given in zip(self._inputs, inputs, strict=True):
            captured.copy_(given)
        self._graph.replay()
        torch.autograd.graph.increment_version(self._changes)
        return self._result

    def _without(self, compute: Callable[..., Result], inputs: Sequence[Tensor]) -> Result:
        now = torch.cuda.current_stream()
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            result = compute(*inputs)
        now.wait_stream(self._stream)
        return result

    def _capture(self, compute: Callable[..., Result], inputs: Sequence[Tensor]) -> None:
        """Nothing runs here: the first replay does the work of this call too."""
        captured = [tensor.clone() for tensor in inputs]
        gc.collect()  # memory that dead cycles hold is of no use to the graph
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._result = compute(*captured)
        except Exception as error:
            error.add_note("while the step was captured: without parallel.cuda_graph it runs uncaptured")
            raise
        self._graph, self._inputs = graph, captured
