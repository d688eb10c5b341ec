"""Launches of a kernel: its parameters as bytes, its grid, and the waves of blocks that run it."""

import numpy as np

from .copies import TensorMap
from .counters import Counters, Nothing
from .memory import GlobalMemory
from .program import Program
from .ptx import PTXError
from .wave import Wave

LANES_AT_ONCE = 8192
"""Threads that run side by side: enough to hide what a call of numpy costs, few enough for the caches."""

SHARED_AT_ONCE = 4 << 20
"""Bytes of shared memory of the blocks that run side by side."""

POISONS = (0x7FE5, 0xFFC3, 0x7FD2, 0xFFF1)
"""Of every 16 bits; NaN as float16, bfloat16 and float32. A seed chooses."""


class Launch:
    """One launch; ``run`` does it.

    blocks: the numbers of those to run, by default all; x varies fastest.
    Arguments are numbers (int: a pointer or an integer, float), bytes, or `TensorMap`s, in the order of the kernel's
    parameters. A tuple of bytes and `TensorMap`s is a record in which they follow one another.
    """

    def __init__(
        self, program: Program, memory: GlobalMemory, grid, threads, arguments, seed=None, count=False, blocks=None
    ):
        if threads % 32:
            raise ValueError(f"threads: expected a multiple of 32, got {threads}")
        self.program, self.memory, self.threads, self.seed = program, memory, threads, seed
        self.grid = (*grid, 1, 1)[:3]
        self.poison = POISONS[0 if seed is None else seed % len(POISONS)]
        self.counters = (Counters if count else Nothing)(len(program.steps))
        self.blocks = np.arange(int(np.prod(self.grid))) if blocks is None else np.asarray(blocks)
        self.now = 1
        self._pack(arguments)

    def _pack(self, arguments):
        parameters = self.program.kernel.parameters
        if len(arguments) != len(parameters):
            raise ValueError(
                f"arguments: expected {len(parameters)} of {self.program.kernel.name}, got {len(arguments)}"
            )
        self.parameters = np.zeros(max((p.offset + p.size for p in parameters), default=0), np.uint8)
        self.tensor_maps = {}
        for parameter, argument in zip(parameters, arguments, strict=True):
            if isinstance(argument, TensorMap):
                argument = (argument,)
            if isinstance(argument, tuple):
                argument = self._record(parameter.offset, argument)
            if isinstance(argument, float):
                argument = (np.float32 if parameter.size == 4 else np.float64)(argument).tobytes()
            elif isinstance(argument, int):
                argument = (argument & (1 << 8 * parameter.size) - 1).to_bytes(parameter.size, "little")
            if len(argument) > parameter.size:
                raise ValueError(f"{parameter.name}: expected {parameter.size} bytes, got {len(argument)}")
            self.parameters[parameter.offset : parameter.offset + len(argument)] = np.frombuffer(argument, np.uint8)

    def _record(self, offset: int, parts) -> bytes:
        """Keeps the tensor maps of a record that begins at ``offset`` and returns its bytes, zeros in their place."""
        packed = b""
        for part in parts:
            if isinstance(part, TensorMap):
                part.check()
                if (offset + len(packed)) % TensorMap.ALIGNMENT:
                    raise ValueError(f"a tensor map: expected a multiple of 64, got byte {offset + len(packed)}")
                self.tensor_maps[offset + len(packed)] = part
                part = bytes(TensorMap.SIZE)
            packed += part
        return packed

    def run(self) -> Counters:
        shared = max(self.program.shared_size, 1)
        at_once = max(1, min(LANES_AT_ONCE // self.threads, SHARED_AT_ONCE // shared))
        order = self.blocks
        if self.seed is not None:
            order = np.random.default_rng(self.seed).permutation(order)
        self.memory.forget_order()
        with np.errstate(all="ignore"):
            for first in range(0, len(order), at_once):
                wave = Wave(self, np.sort(order[first : first + at_once]))
                wave.run()
                self.now = wave.clocks.now + 1
        return self.counters


__all__ = ["GlobalMemory", "Launch", "PTXError", "Program", "TensorMap"]
