"""Memory for batches that a process shares with those it starts.

New memory for every batch would cost more than decoding it: the kernel clears each page, in both processes.
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
    """`count` arrays uint8 of `shape`. The process that made them gives them out, others write into them.

    It lies in files without a name in the folder for shared memory or, where that has no room, for temporary files.
    """

    def __init__(self, count: int, shape: tuple[int, ...]):
        self._shape, self._size = shape, math.prod(shape)
        self._memory = multiprocessing.RawArray(ctypes.c_uint8, count * self._size)
        self._free = deque(range(count))

    def take(self) -> int | None:
        """A slot that nobody uses; None when there is none."""
        return self._free.popleft() if self._free else None

    def array(self, slot: int) -> np.ndarray:
        return np.frombuffer(self._memory, np.uint8, self._size, slot * self._size).reshape(self._shape)

    def lend(self, slot: int) -> torch.Tensor:
        """A slot that was taken, as a tensor; it is free again when that tensor and all its views are gone."""
        array = self.array(slot)
        weakref.finalize(array, self._free.append, slot).atexit = False
        return torch.from_numpy(array)
