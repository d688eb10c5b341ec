"""Who did something, and what happened before it: vector clocks of the warps of some blocks.

Time is one counter for a whole launch. ``seen[row, warp, agent]`` is the time up to which a warp knows what an agent
did; the agents are the warps of its block and, behind them, the mbarriers through which asynchronous copies report.
Lanes of one warp are taken to be in order.
"""

from typing import NamedTuple

import numpy as np

FOREVER = 2**30 - 1
"""Later than any time."""


class Who(NamedTuple):
    """The lanes (or warps) of one access, a number each; a block is a row of those that run together."""

    clocks: "Clocks"
    block: np.ndarray
    row: np.ndarray
    warp: np.ndarray

    def knows(self, agent: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Whether each lane is after what ``agent [k, n]`` did at ``time``; a warp is after everything of its own."""
        row, warp = self.row[:, None], self.warp[:, None]
        return (self.clocks.seen[row, warp, agent] >= time) | (agent == warp)

    def pick(self, chosen) -> "Who":
        return Who(self.clocks, self.block[chosen], self.row[chosen], self.warp[chosen])


class Clocks:
    MBARRIERS = 64
    """Most mbarriers of a block."""

    def __init__(self, rows: int, warps: int, now: int):
        self.warps = warps
        self.now = now
        self.seen = np.zeros((rows, warps, warps + self.MBARRIERS), np.int32)
        self.fenced = np.zeros((rows, warps, warps), np.int32)
        """As seen, of what the asynchronous proxy may be shown: what came before a proxy fence."""
        # A warp without others is in order with everything.
        self.everyone = np.full((rows, warps), 0 if warps > 1 else FOREVER, np.int32)
        """What a warp knows of all other warps of its block: anything up to this time needs no closer look."""

    def mark(self) -> int:
        """This moment: accesses so far are up to it, accesses from now on are after it."""
        self.now += 1
        return self.now - 1

    def synchronize(self, row: int, warps: np.ndarray) -> None:
        """A barrier of these warps: each knows what any of them knew and did."""
        now = self.mark()
        for clock in (self.seen, self.fenced):
            clock[row, warps] = clock[row, warps].max(0)
        self.seen[row, warps[:, None], warps[None, :]] = now
        self._refresh(row)

    def synchronize_blocks(self, rows: np.ndarray) -> None:
        """A barrier of all warps, in each of these blocks."""
        now = self.mark()
        for clock in (self.seen, self.fenced):
            clock[rows] = clock[rows].max(1, keepdims=True)
        self.seen[rows, :, : self.warps] = now
        if self.warps > 1:
            self.everyone[rows] = now

    def release(self, row: int, warp: int) -> np.ndarray:
        """What others learn from a warp that arrives: ``[2, agents]``, seen and fenced."""
        known = np.zeros((2, self.seen.shape[2]), np.int32)
        known[0], known[1, : self.warps] = self.seen[row, warp], self.fenced[row, warp]
        known[0, warp] = self.mark()
        return known

    def acquire(self, row: int, warp: int, known: np.ndarray) -> None:
        seen, fenced = self.seen[row, warp], self.fenced[row, warp]
        np.maximum(seen, known[0], out=seen)
        np.maximum(fenced, known[1, : self.warps], out=fenced)
        self._refresh(row)

    def fence_proxy(self, row: np.ndarray, warp: np.ndarray) -> None:
        """What these warps know, and did, may be seen by the asynchronous proxy through them."""
        known = self.seen[row, warp, : self.warps]
        known[np.arange(len(row)), warp] = self.mark()
        self.fenced[row, warp] = np.maximum(self.fenced[row, warp], known)

    def _refresh(self, row):
        if self.warps == 1:
            return
        known = self.seen[row, :, : self.warps].copy()
        own = np.arange(self.warps)
        known[own, own] = FOREVER
        self.everyone[row] = known.min(1)
