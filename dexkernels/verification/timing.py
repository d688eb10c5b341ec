"""Times and limits, of a GPU by its events and of a CPU by the clock (to execute, not to believe)."""

import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20
"""Written before a call whose inputs must not come from the L2 cache; several times the largest L2."""

HEAD_START = 2_000_000
"""Clock cycles that the GPU idles before a call, about 1 ms: the host is then ahead, and launching costs no time."""


def in_turns(
    candidates: dict[str, Callable], rounds: int, warmup: int, once: Callable[[Callable, int], Any]
) -> dict[str, list]:
    """What ``once(candidate, turn)`` gives in every turn after the warm-up, by the candidate's name."""
    taken = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, candidate in candidates.items():
            result = once(candidate, turn)
            if turn >= warmup:
                taken[name].append(result)
    return taken


def seconds_of(candidate: Callable[[], object]) -> float:
    began = time.perf_counter()
    candidate()
    return time.perf_counter() - began


class Stopwatch:
    """Candidates take turns within one run; milliseconds.

    What is timed is the device's work: a candidate whose host waits for the device in the middle pays for that.
    """

    def __init__(self, device: torch.device, rounds: int = 30, warmup: int = 5, flush_bytes: int = FLUSH_BYTES):
        self.device, self.rounds, self.warmup = device, rounds, warmup
        self.on_gpu: bool = device.type == "cuda"
        self.flushed = torch.empty(flush_bytes if self.on_gpu else 0, dtype=torch.int8, device=device)

    def take(self, candidates: dict[str, Callable[[int], object]], flush: bool = False) -> dict[str, list[float]]:
        """The milliseconds of every round; ``f(i)`` is called with rising i, by which it rotates its inputs."""
        taken = in_turns(candidates, self.rounds, self.warmup, lambda candidate, i: self._once(candidate, i, flush))
        if self.on_gpu:
            torch.cuda.synchronize()
            taken = {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in taken.items()}
        return taken

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
