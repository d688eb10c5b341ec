"""Times of candidates that take turns: on a GPU from its events, on a CPU from the clock (only to run the code)."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

FLUSH_BYTES = 256 * 2**20
"""Bytes written before a call whose inputs must not come from the L2 cache; several times the largest L2."""

HEAD_START = 2_000_000
"""Clock cycles that the GPU waits before a call, about 1 ms, which hide the launch overhead."""

Candidate = TypeVar("Candidate")
Result = TypeVar("Result")


def in_turns(
    candidates: Mapping[str, Candidate], rounds: int, warmup: int, once: Callable[[Candidate, int], Result]
) -> dict[str, list[Result]]:
    """Name of a candidate -> results of ``once(candidate, turn)`` in every turn after the warm-up."""
    results: dict[str, list[Result]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, candidate in candidates.items():
            result = once(candidate, turn)
            if turn >= warmup:
                results[name].append(result)
    return results


def seconds_of(candidate: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    candidate()
    return clock() - began


class Stopwatch:
    """Milliseconds of candidates that take turns within one run.

    The time of the device counts, including idle time if the host waits for the device within a candidate.
    """

    def __init__(self, device: torch.device, rounds: int = 30, warmup: int = 5, flush_bytes: int = FLUSH_BYTES):
        self.device: torch.device = device
        self.rounds: int = rounds
        self.warmup: int = warmup
        self.on_gpu: bool = device.type == "cuda"
        self.flushed: torch.Tensor = torch.empty(flush_bytes if self.on_gpu else 0, dtype=torch.int8, device=device)

    def take(self, candidates: Mapping[str, Callable[[int], object]], flush: bool = False) -> dict[str, list[float]]:
        """``{name: f}`` -> milliseconds of every round. ``f(i)`` gets an increasing i, which selects its inputs."""
        times = in_turns(candidates, self.rounds, self.warmup, lambda candidate, i: self._once(candidate, i, flush))
        if self.on_gpu:
            torch.cuda.synchronize()
            times = {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in times.items()}
        return times

    def medians(self, candidates: Mapping[str, Callable[[int], object]]) -> dict[str, float]:
        """The medians of ``take``: ``{name: f}`` -> ``{name: ms}``."""
        return {name: statistics.median(times) for name, times in self.take(candidates).items()}

    def _once(self, candidate: Callable[[int], object], i: int, flush: bool) -> Any:
        if not self.on_gpu:
            return 1e3 * seconds_of(lambda: candidate(i))
        if flush:
            self.flushed.zero_()
        torch.cuda._sleep(HEAD_START)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        candidate(i)
        end.record()
        return start, end
