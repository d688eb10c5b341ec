"""Shared memory of the blocks that run together, and who touched what.

Every block has a row of bytes, and of every granule (the narrowest access of the kernel) the last write, by whom and
when, and each warp's last read. Reads of what nobody wrote, of what an asynchronous copy still writes, and accesses
that conflict without order raise `PTXError`; so does an asynchronous access to what ordinary stores wrote without a
proxy fence in between.
"""

import numpy as np

from .memory import WORDS, same_bytes
from .order import FOREVER, Who
from .ptx import PTXError

ASYNCHRONOUS = 2**30
"""Added to the time of a write by the asynchronous proxy: known through an mbarrier alone."""

IN_FLIGHT = 2**31 - 1
"""The time of a write that has not landed."""


class SharedMemory:
    def __init__(self, rows: int, size: int, granule: int, warps: int, poison: int):
        self.size, self.granule, self.warps = size, granule, warps
        self.pitch = -(-max(size, 16) // 1024) * 1024
        self.bytes = np.full(rows * self.pitch // 2, poison, np.uint16).view(np.uint8)
        self.views = {width: self.bytes.view(word) for width, word in WORDS.items()}
        self.poison = poison
        count = rows * self.pitch // granule
        self.written = np.zeros(count, np.int32)  # 0: never
        self.writer = np.zeros(count, np.int16)  # an agent, see `order`
        self.last_read = np.zeros(count, np.int32)
        self.read_at = np.zeros((count, warps), np.int32)
        self.line = np.zeros(count, np.int32)  # of the instruction that wrote last
        self.copied = np.zeros(count, np.bool_)  # by cp.async, after which no proxy fence is asked for
        self.readers = np.zeros(count, np.int16)  # matrix products in flight that still read here

    # --- ordinary accesses --------------------------------------------------------------------------------------------

    def load(self, offsets: np.ndarray, width: int, count: int, who: Who) -> np.ndarray:
        """``[k, count]`` words of ``width`` bytes at ``offsets [k]``."""
        total = width * count
        self.check_bounds(offsets, total)
        granules = self.granules(who.row, offsets, total)
        self.check_read(granules, who)
        self.note_read(granules, who)
        at = (who.row * self.pitch + offsets) // total
        return self.views[total][at].view(WORDS[width]).reshape(-1, count)

    def store(self, offsets: np.ndarray, values: np.ndarray, who: Who, line: int) -> None:
        """Stores ``values [k, count]``, each ``[count]`` at its offset; ``line``: of the instruction."""
        total = values.itemsize * values.shape[1]
        self.check_bounds(offsets, total)
        granules = self.granules(who.row, offsets, total)
        packed = np.ascontiguousarray(values).view(WORDS[total])[:, 0]
        at, view = (who.row * self.pitch + offsets) // total, self.views[total]
        # Compilers let several warps store what all of them computed: the same instruction, the same value.
        again = (self.line[granules] == line).all(1) & same_bytes(view[at], packed)
        fresh = np.flatnonzero(~again)
        self.check_write(granules[fresh], who.pick(fresh))
        self.note_write(granules, who)
        self.line[granules] = line
        view[at] = packed
        lost = ~same_bytes(view[at], packed)
        if lost.any() and (self.writer[granules[lost]] != who.warp[lost][:, None]).any():
            raise PTXError("race on shared memory: two warps store different values at one address")

    # --- what asynchronous copies and matrix products need ------------------------------------------------------------

    def check_bounds(self, offsets, size, align=None):
        align = align or size
        if (offsets % align).any():
            bad = int(offsets[np.flatnonzero(offsets % align)[0]])
            raise PTXError(f"misaligned: {size} bytes of shared memory at {bad:#x}")
        outside = (offsets < 0) | (offsets + size > self.size)
        if outside.any():
            bad = int(offsets[np.flatnonzero(outside)[0]])
            raise PTXError(f"outside of shared memory: {size} bytes at {bad:#x} of {self.size:#x}")

    def granules(self, row, offsets, size):
        """Numbers ``[k, n]`` of the granules of ``size`` bytes at each offset; size may be less than one."""
        first = (row * self.pitch + offsets) // self.granule
        return first[:, None] + np.arange(max(size // self.granule, 1))

    def check_read(self, granules, who: Who, asynchronous=False):
        time = self.written[granules]
        doubtful = (time > who.clocks.everyone[who.row, who.warp][:, None]) | (time == 0)
        if doubtful.any():
            self._explain(granules, who, time, doubtful, "reads")
        if asynchronous:
            self._check_fence(granules, who, time, "reads")

    def check_write(self, granules, who: Who, asynchronous=False):
        everyone = who.clocks.everyone[who.row, who.warp][:, None]
        time = self.written[granules]
        doubtful = time > everyone
        if doubtful.any():
            self._explain(granules, who, time, doubtful, "writes")
        if self.readers[granules].any():
            raise PTXError("race on shared memory: a write to what a matrix product in flight still reads")
        if (self.last_read[granules] > everyone).any():
            self._check_readers(granules, who)
        if asynchronous:
            self._check_fence(granules, who, time, "writes")

    def note_read(self, granules, who: Who):
        self.last_read[granules] = who.clocks.now
        self.read_at[granules, who.warp[:, None]] = who.clocks.now

    def note_write(self, granules, who: Who):
        self.written[granules], self.writer[granules] = who.clocks.now, who.warp[:, None]
        self.copied[granules], self.line[granules] = False, 0

    def begin_copy(self, granules, agent) -> None:
        """An asynchronous copy by ``agent`` will write here; until it lands there is poison."""
        self.written[granules], self.writer[granules], self.line[granules] = IN_FLIGHT, agent, 0
        flat = granules.reshape(-1)
        words = np.arange(max(self.granule // 2, 1))
        if self.granule == 1:
            self.bytes[flat] = self.poison & 0xFF
        else:
            self.views[2][flat[:, None] * (self.granule // 2) + words] = self.poison

    def end_copy(self, granules, agent, time) -> None:
        self.written[granules], self.writer[granules] = time, agent

    # --- complaints ---------------------------------------------------------------------------------------------------

    def _explain(self, granules, who, time, doubtful, verb):
        """Raises when one of the doubtful granules is not in order."""
        lanes, columns = np.nonzero(doubtful)
        agent, when = self.writer[granules[lanes, columns]], time[lanes, columns]
        at = granules[lanes, columns] * self.granule % self.pitch
        if verb == "reads" and (when == 0).any():
            raise PTXError(f"uninitialised: nobody wrote the shared memory read at {int(at[np.argmin(when)]):#x}")
        flying = when == IN_FLIGHT
        if flying.any():
            where = int(at[np.argmax(flying)])
            raise PTXError(f"in flight: {verb} shared memory at {where:#x}, which an asynchronous copy still writes")
        known = who.pick(lanes).knows(agent[:, None], (when & FOREVER)[:, None])[:, 0]
        if not known.all():
            self._race(verb, "wrote", who, lanes, agent, at, known)

    def _check_readers(self, granules, who):
        reads = self.read_at[granules]
        for warp in range(self.warps):
            known = who.knows(np.full_like(granules, warp), reads[:, :, warp])
            if not known.all():
                lanes, columns = np.nonzero(~known)
                at = granules[lanes, columns] * self.granule % self.pitch
                self._race("writes", "read", who, lanes, np.full(len(lanes), warp), at, np.zeros(len(lanes), bool))

    def _race(self, verb, did, who, lanes, agents, at, known):
        i = int(np.argmin(known))
        agent, lane = int(agents[i]), lanes[i]
        other = f"warp {agent}" if agent < self.warps else "an asynchronous copy"
        raise PTXError(
            f"race on shared memory: block {who.block[lane]} warp {who.warp[lane]} {verb} {int(at[i]):#x}, "
            f"which {other} {did}, without anything that orders the two"
        )

    def _check_fence(self, granules, who, time, verb):
        writer = self.writer[granules]
        ordinary = (writer < self.warps) & (time > 0) & (time < ASYNCHRONOUS) & ~self.copied[granules]
        if not ordinary.any():
            return
        fenced = who.clocks.fenced[who.row[:, None], who.warp[:, None], np.minimum(writer, self.warps - 1)]
        bad = ordinary & (fenced < time)
        if bad.any():
            lane, column = (int(i[0]) for i in np.nonzero(bad))
            where = int(granules[lane, column] * self.granule % self.pitch)
            raise PTXError(
                f"missing fence.proxy.async: the asynchronous proxy {verb} shared memory at {where:#x}, "
                f"which warp {writer[lane, column]} wrote with ordinary stores"
            )
