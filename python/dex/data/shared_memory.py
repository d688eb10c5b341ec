"""Memory for batches, shared between a process and its workers.

New memory for every batch would cost more than decoding, since the kernel clears each page in both processes.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import weakref
from collections import deque

import numpy as np
import torch


class Slots:
    """``count`` uint8 arrays of ``shape``. The process that creates them assigns them, and its workers write to them.

    The memory is in unnamed files in the folder for shared memory or, if it is full, for temporary files.
    """

    def __init__(self, count: int, shape: tuple[int, ...]):
        self._shape, self._size = shape, math.prod(shape)
        self._memory = multiprocessing.RawArray(ctypes.c_uint8, count * self._size)
        self._free = deque(range(count))

    def take(self) -> int | None:
        """A free slot; None if there is none."""
        return self._free.popleft() if self._free else None

    def array(self, slot: int) -> np.ndarray:
        """The memory of a slot as an array."""
        return np.frombuffer(self._memory, np.uint8, self._size, slot * self._size).reshape(self._shape)

    def lend(self, slot: int) -> torch.Tensor:
        """A taken slot as a tensor; it becomes free when the tensor and all its views are gone."""
        array = self.array(slot)
        weakref.finalize(array, self._free.append, slot).atexit = False
        return torch.from_numpy(array)
