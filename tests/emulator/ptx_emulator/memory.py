"""Global memory: the storages that a launch may touch, where they lie in this process, and who touched what.

An address is the address that the host uses, so tables of pointers need no translation. An access outside of every
allocation, not aligned to its width, or without order to another that it conflicts with, raises `PTXError`.
"""

import bisect
import ctypes

import numpy as np

from .order import Who
from .ptx import PTXError

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def same_bytes(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of each word whether its bits are the same; NaN is not equal to itself."""
    one, other = (np.ascontiguousarray(a).view(np.uint8).reshape(len(a), -1) for a in (one, other))
    return (one == other).all(1)


class Allocation:
    """The bytes from ``start`` to ``stop``; ``granule``: the size of its elements, by which accesses are remembered."""

    def __init__(self, start: int, stop: int, granule: int, name: str):
        self.start, self.stop, self.granule, self.name = start, stop, granule, name
        # Whole groups of 16 bytes, so that every width has a view; no access gets past the check of bounds.
        self.base = start // 16 * 16
        memory = (ctypes.c_uint8 * (-(-(stop - self.base) // 16) * 16)).from_address(self.base)
        self.bytes = np.frombuffer(memory, np.uint8)
        self.views = {width: self.bytes.view(word) for width, word in WORDS.items()}
        self.reads = []  # before the first write: (granules, who) to be looked at when there is one
        self.shadow = None

    def forget(self):
        self.reads, self.shadow = [], None


class Shadow:
    """Of every granule: the last write (block, warp, time), the last block that read, whether others did, and when each
    of its warps read last.

    Kept in pages, so that of a tensor of which little is touched little is kept.
    """

    PAGE = 2**16
    FIELDS = ("block", "warp", "time", "reader", "many")

    def __init__(self, warps: int):
        self.pages, self.warps = {}, warps
        for field in self.FIELDS:
            setattr(self, field, np.full(self.PAGE, -1, np.int32))
        self.read_at = np.full((self.PAGE, warps), -1, np.int32)

    def place(self, granules: np.ndarray) -> np.ndarray:
        """Where in the fields these granules are."""
        numbers = granules // self.PAGE
        within = granules % self.PAGE
        if numbers.size == 0 or numbers.min() == numbers.max():
            return within + (self._page(int(numbers.flat[0])) if numbers.size else 0)
        distinct, which = np.unique(numbers, return_inverse=True)
        starts = np.array([self._page(int(number)) for number in distinct])
        return within + starts[which].reshape(granules.shape)

    def _page(self, number):
        if number not in self.pages:
            self.pages[number] = len(self.pages) * self.PAGE
            for field in (*self.FIELDS, "read_at"):
                held = getattr(self, field)
                if len(held) <= self.pages[number]:
                    setattr(self, field, np.concatenate((held, np.full_like(held, -1))))
        return self.pages[number]

    def read(self, allocation, granules, who: Who, now):
        at = self.place(granules)
        block = self.block[at]
        written = block >= 0
        if written.any():
            mine = block == who.block[:, None]
            ordered = ~written | (mine & who.knows(np.maximum(self.warp[at], 0), self.time[at]))
            if not ordered.all():
                _race("reads", "wrote", allocation, granules, ordered, who, block, self.warp[at])
        self._note_read(at, who, now)

    def read_before(self, granules, who: Who, now):
        """A read of what nobody had written."""
        self._note_read(self.place(granules), who, now)

    def _note_read(self, at, who, now):
        block, before = np.broadcast_to(who.block[:, None], at.shape), self.reader[at]
        self.reader[at] = block
        # Where several blocks read at once, one of them is noted.
        others = ((before >= 0) & (before != block)) | (self.reader[at] != block)
        self.many[at[others]] = 1
        self.read_at[at, who.warp[:, None]] = now

    def write(self, allocation, granules, who: Who, now):
        at = self.place(granules)
        block, reader = self.block[at], self.reader[at]
        mine = who.block[:, None]
        if (block >= 0).any():
            ordered = (block < 0) | ((block == mine) & who.knows(np.maximum(self.warp[at], 0), self.time[at]))
            if not ordered.all():
                _race("writes", "wrote", allocation, granules, ordered, who, block, self.warp[at])
        if (reader >= 0).any():
            ordered = (reader < 0) | ((reader == mine) & (self.many[at] < 0))
            if not ordered.all():
                _race("writes", "read", allocation, granules, ordered, who, reader, self.read_at[at].argmax(-1))
            for warp in range(self.warps):
                number = np.full_like(at, warp)
                ordered = who.knows(number, self.read_at[at, warp])
                if not ordered.all():
                    _race("writes", "read", allocation, granules, ordered, who, reader, number)
        self.block[at], self.warp[at], self.time[at] = mine, who.warp[:, None], now


def _race(verb, did, allocation, at, ordered, who, block, warp):
    lane, column = (int(i[0]) for i in np.nonzero(~ordered))
    raise PTXError(
        f"race on global memory: block {who.block[lane]} warp {who.warp[lane]} {verb} element {at[lane, column]} of "
        f"{allocation.name}, which block {block[lane, column]} warp {warp[lane, column]} {did}, and no barrier between"
    )


class GlobalMemory:
    def __init__(self):
        self.allocations, self.starts = [], []

    def add(self, start: int, size: int, granule: int, name: str) -> None:
        """Makes bytes reachable, which stay the caller's; what overlaps becomes one allocation."""
        stop = start + size
        apart = []
        for other in self.allocations:
            if other.stop < start or stop < other.start:
                apart.append(other)
            else:
                start, stop, granule = min(start, other.start), max(stop, other.stop), min(granule, other.granule)
                name = name if other.name in name else f"{other.name}, {name}"
        apart.append(Allocation(start, stop, granule, name))
        self.allocations = sorted(apart, key=lambda allocation: allocation.start)
        self.starts = [allocation.start for allocation in self.allocations]

    def forget_order(self) -> None:
        """Another launch begins: everything before it is in order."""
        for allocation in self.allocations:
            allocation.forget()

    def load(self, addresses: np.ndarray, width: int, count: int, who: Who) -> np.ndarray:
        """``[k, count]`` words of ``width`` bytes at ``addresses [k]``."""
        total = width * count
        values = None
        for allocation, chosen, offsets in self.locate(addresses, total):
            self._note(allocation, offsets, total, who if chosen is None else who.pick(chosen), False)
            part = allocation.views[total][offsets // total].view(WORDS[width]).reshape(-1, count)
            if chosen is None:
                return part
            values = np.zeros((len(addresses), count), WORDS[width]) if values is None else values
            values[chosen] = part
        return values

    def store(self, addresses: np.ndarray, values: np.ndarray, who: Who) -> None:
        """Stores ``values [k, count]``, each ``[count]`` at its address."""
        width, count = values.itemsize, values.shape[1]
        total = width * count
        packed = np.ascontiguousarray(values).view(WORDS[total])[:, 0]
        for allocation, chosen, offsets in self.locate(addresses, total):
            part = packed if chosen is None else packed[chosen]
            writers = who if chosen is None else who.pick(chosen)
            self._note(allocation, offsets, total, writers, True)
            at, view = offsets // total, allocation.views[total]
            view[at] = part
            lost = ~same_bytes(view[at], part)
            if lost.any():
                # Lanes of one warp may differ in the last bit of what they all computed; one of them wins.
                granules = allocation.shadow.place(offsets[lost] // allocation.granule)
                winner = allocation.shadow.block[granules], allocation.shadow.warp[granules]
                if (winner[0] != writers.block[lost]).any() or (winner[1] != writers.warp[lost]).any():
                    raise PTXError(f"race on global memory: two warps store different values in {allocation.name}")

    def read_bytes(self, addresses: np.ndarray, size: int, who: Who) -> np.ndarray:
        """``[k, size]`` bytes for a copy; ``size`` is a multiple of neither alignment nor anything."""
        values = np.empty((len(addresses), size), np.uint8)
        for allocation, chosen, offsets in self.locate(addresses, size, aligned=False):
            chosen = slice(None) if chosen is None else chosen
            self._note(allocation, offsets, size, who.pick(chosen), False)
            values[chosen] = allocation.bytes[offsets[:, None] + np.arange(size)]
        return values

    def locate(self, addresses: np.ndarray, size: int, aligned: bool = True):
        """Yields allocation, which of the addresses lie in it (None: all), and their offsets."""
        if len(addresses) == 0:
            return
        if aligned and (addresses % np.uint64(size)).any():
            bad = int(addresses[np.flatnonzero(addresses % np.uint64(size))[0]])
            raise PTXError(f"misaligned: {size} bytes of global memory at {bad:#x}")
        low, high = int(addresses.min()), int(addresses.max())
        first = bisect.bisect_right(self.starts, low) - 1
        if first >= 0 and high + size <= self.allocations[first].stop:
            yield (
                self.allocations[first],
                None,
                (addresses - np.uint64(low)).astype(np.int64) + (low - self.allocations[first].base),
            )
            return
        which = np.searchsorted(np.array(self.starts, np.uint64), addresses, "right").astype(np.int64) - 1
        for number in np.unique(which):
            chosen = np.flatnonzero(which == number)
            if number < 0:
                self._outside(int(addresses[chosen[0]]), size)
            allocation = self.allocations[number]
            past = addresses[chosen] + np.uint64(size) > np.uint64(allocation.stop)
            if past.any():
                self._outside(int(addresses[chosen[np.flatnonzero(past)[0]]]), size)
            yield allocation, chosen, (addresses[chosen] - np.uint64(allocation.base)).astype(np.int64)

    def _outside(self, address, size):
        after = bisect.bisect_right(self.starts, address) - 1
        near = ""
        if after >= 0:
            allocation = self.allocations[after]
            near = f"; {address - allocation.stop} bytes past the end of {allocation.name}"
        raise PTXError(f"outside of every allocation: {size} bytes of global memory at {address:#x}{near}")

    def _note(self, allocation, offsets, size, who, writes):
        granule = allocation.granule
        at = (offsets // granule)[:, None] + np.arange(max(size // granule, 1))
        now = who.clocks.now
        if writes and allocation.shadow is None:
            allocation.shadow = Shadow(who.clocks.warps)
            for earlier in allocation.reads:
                allocation.shadow.read_before(*earlier)
            allocation.reads = []
        if writes:
            allocation.shadow.write(allocation, at, who, now)
        elif allocation.shadow is not None:
            allocation.shadow.read(allocation, at, who, now)
        else:
            allocation.reads.append((at, who, now))
