"""Device time of some launches, measured without waiting for the device."""

import time
from typing import Any

import torch


class Stopwatch:
    """Seconds that the device spends on what is launched inside ``with``; only ``seconds`` waits for the device.

    Nothing is measured while a CUDA graph is captured, since nothing runs.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *_: object) -> None:
        if self._began is not None:
            self._spans.append((self._began, self._now()))

    def seconds(self) -> float:
        """Seconds since the last call; waits for the device."""
        spans, self._spans = self._spans, []
        if not self._on_gpu:
            return sum(end - began for began, end in spans)
        if spans:
            spans[-1][1].synchronize()
        return sum(began.elapsed_time(end) for began, end in spans) / 1e3
