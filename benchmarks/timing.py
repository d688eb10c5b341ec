"""Times, memory and limits of the benchmarks."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from dexkernels.verification.timing import FLUSH_BYTES, Stopwatch


class Timer(Stopwatch):
    """A stopwatch that also measures memory and the machine's limits."""

    def __init__(self, device: torch.device, tiny: bool):
        rounds, warmup = (2, 1) if tiny else (30, 5)
        super().__init__(device, rounds, warmup, 0 if tiny else FLUSH_BYTES)
        self.tiny = tiny

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
        ms = self.medians({"copy": lambda i: target.copy_(source), "product": lambda i: a @ b})
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
