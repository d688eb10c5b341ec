"""Times, memory and limits: of a GPU by its events, of a CPU by the clock (only to execute the code)."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20
"""Bytes written before a call whose inputs must not come from the L2 cache; several times the largest L2."""

HEAD_START = 2_000_000
"""Clock cycles that the GPU idles before a call, about 1 ms, so that launch overhead is hidden."""


def in_turns(
    candidates: dict[str, Callable], rounds: int, warmup: int, once: Callable[[Callable, int], Any]
) -> dict[str, list]:
    """Candidate's name -> results of ``once(candidate, turn)`` in every turn after the warm-up."""
    results = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, candidate in candidates.items():
            result = once(candidate, turn)
            if turn >= warmup:
                results[name].append(result)
    return results


def seconds_of(candidate: Callable[[], object]) -> float:
    began = time.perf_counter()
    candidate()
    return time.perf_counter() - began


class Timer:
    """Medians of milliseconds of candidates that take turns within one run.

    It times the device's work, so a candidate whose host waits for the device in between is slower.
    """

    def __init__(self, device: torch.device, tiny: bool):
        self.device, self.tiny = device, tiny
        self.rounds, self.warmup = (2, 1) if tiny else (30, 5)
        self.on_gpu = device.type == "cuda"
        self.flushed = torch.empty(FLUSH_BYTES if self.on_gpu and not tiny else 0, dtype=torch.int8, device=device)

    def measure(self, candidates: dict[str, Callable[[int], object]], flush: bool = False) -> dict[str, float]:
        """``{name: f}`` -> ``{name: ms}``; ``f(i)`` is called with rising i, which selects its inputs."""
        return {name: statistics.median(times) for name, times in self.take(candidates, flush).items()}

    def take(self, candidates: dict[str, Callable[[int], object]], flush: bool = False) -> dict[str, list[float]]:
        """The milliseconds of every round, of which `measure` takes the median."""
        times = in_turns(candidates, self.rounds, self.warmup, lambda candidate, i: self._once(candidate, i, flush))
        if self.on_gpu:
            torch.cuda.synchronize()
            times = {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in times.items()}
        return times

    def _once(self, candidate: Callable[[int], object], i: int, flush: bool):
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

    def peak_mb(self, candidate: Callable[[int], object]) -> float:
        """Memory that one call needs beyond the current allocation, in units of 1e6 bytes; 0 on a CPU."""
        if not self.on_gpu:
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        candidate(0)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def ceilings(self) -> dict[str, float]:
        """Limits of this machine: GB/s read and written by a copy, TFLOP/s of a square bf16 product."""
        n = 256 if self.tiny else 8192
        num_bytes = 2**20 if self.tiny else 2**31
        source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(n, n, device=self.device).to(torch.bfloat16) for _ in range(2))
        ms = self.measure({"copy": lambda i: target.copy_(source), "product": lambda i: a @ b})
        return {"copy_gbps": 2 * num_bytes / ms["copy"] / 1e6, "bf16_tflops": 2 * n**3 / ms["product"] / 1e9}


def apart(function: Callable, *arguments: Any) -> Any:
    """The result of ``function``, computed in a separate process, so that its peak memory is its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    process = context.Process(target=lambda: sender.send(function(*arguments)))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result
