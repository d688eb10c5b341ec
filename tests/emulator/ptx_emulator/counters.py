"""What a launch did: counted, not timed."""

import numpy as np

SECTOR = 32
"""Bytes that global memory serves at once."""

BANKS, WORD = 32, 4


class Counters:
    """Totals over all warps of a launch. ``executed``: of every instruction, by how many warps."""

    def __init__(self, num_steps: int):
        self.executed = np.zeros(num_steps, np.int64)
        self.divergences = 0
        self.products = 0  # operations of the tensor cores
        self.tensor_copies = 0
        self.sectors = self.least_sectors = 0
        self.wavefronts = self.least_wavefronts = 0

    def count_global(self, g, addresses, size, lanes):
        """Sectors that each warp asks for, and how few could hold as many bytes."""
        warps = _warps(g, lanes)
        first, last = addresses // np.uint64(SECTOR), (addresses + np.uint64(size - 1)) // np.uint64(SECTOR)
        key = warps.astype(np.uint64) << np.uint64(48)
        pairs = np.concatenate((key | first & np.uint64(2**48 - 1), key | last & np.uint64(2**48 - 1)))
        self.sectors += len(np.unique(pairs))
        distinct = np.unique(key | addresses & np.uint64(2**48 - 1))
        per_warp = np.unique(distinct >> np.uint64(48), return_counts=True)[1]
        self.least_sectors += int((-(-per_warp * size // SECTOR)).sum())

    def count_shared(self, g, offsets, size, lanes):
        """Rounds of 128 bytes in which the banks serve an access, and the fewest possible."""
        warps = _warps(g, lanes)
        words = np.asarray(offsets, np.int64)[:, None] // WORD + np.arange(max(size // WORD, 1))
        self._rounds(warps, words, size)

    def count_matrix(self, g, rows):
        words = (rows[:, :, None] // WORD + np.arange(4)).reshape(len(rows), -1, 8 * 4)
        for matrix in range(words.shape[1]):
            self._rounds(np.repeat(np.arange(len(rows)), 32), words[:, matrix].reshape(-1, 1), 4)

    def _rounds(self, warps, words, size):
        # Wide accesses are served in parts: 8 bytes by half warps, 16 by quarters.
        order = np.arange(len(warps)) - np.searchsorted(warps, warps)
        part = order * max(size // WORD, 1) // 32
        key = ((warps * 32 + part)[:, None] << 32) + words
        distinct = np.unique(key)
        bank = (distinct >> 32) * BANKS + distinct % BANKS
        banks, counts = np.unique(bank, return_counts=True)
        parts, first = np.unique(banks // BANKS, return_index=True)
        self.wavefronts += int(np.maximum.reduceat(counts, first).sum())
        self.least_wavefronts += int((-(-np.add.reduceat(counts, first) // BANKS)).sum())


class Nothing(Counters):
    """Counts instructions only."""

    def count_global(self, g, addresses, size, lanes):
        pass

    def count_shared(self, g, offsets, size, lanes):
        pass

    def count_matrix(self, g, rows):
        pass


def _warps(g, lanes):
    threads = np.arange(g.threads) if lanes is None else lanes
    return threads // 32
