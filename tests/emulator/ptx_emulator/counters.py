"""What a launch did: counted, not timed."""

from typing import NamedTuple

import numpy as np

SECTOR = 32
"""Bytes that global memory serves at once."""

BANKS, WORD = 32, 4


class Parts(NamedTuple):
    """Something counted inside of the loops that hold matrix products, see `loops`, and outside of them."""

    main_loop: int
    rest: int


class Counters:
    """Totals over all warps of a launch.

    executed: of every instruction, by how many warps. sectors, least_sectors: 32 bytes of global memory each, asked for
    by the instructions of warps, and how few could hold what they asked for. rounds, least_rounds: of the 32 banks of
    shared memory, for every instruction; those above the least are bank conflicts. products: operations of the tensor
    cores, two for each multiplication and sum. divergences: branches at which warps, or their lanes, took both ways.
    """

    def __init__(self, num_steps: int):
        self.executed = np.zeros(num_steps, np.int64)
        self.divergences = 0
        self.products = 0
        self.tensor_copies = 0
        self.sectors = self.least_sectors = 0
        self.rounds, self.least_rounds = np.zeros((2, num_steps), np.int64)

    def count_global(self, g, addresses, size, lanes):
        warps = _warps(g, lanes).astype(np.uint64) << np.uint64(48)
        low = np.uint64(2**48 - 1)
        first, last = addresses // np.uint64(SECTOR), (addresses + np.uint64(size - 1)) // np.uint64(SECTOR)
        self.sectors += len(np.unique(np.concatenate((warps | first & low, warps | last & low))))
        distinct = np.unique(warps | addresses & low)
        each = np.unique(distinct >> np.uint64(48), return_counts=True)[1]
        self.least_sectors += int((-(-each * size // SECTOR)).sum())

    def count_tensor(self, addresses, size):
        """A tensor copy of elements of ``size`` bytes at these addresses."""
        self.sectors += len(np.unique(addresses // np.uint64(SECTOR)))
        self.least_sectors += -(-len(addresses) * size // SECTOR)

    def count_shared(self, g, offsets, size, lanes):
        warps = _warps(g, lanes)
        words = np.asarray(offsets, np.int64)[:, None] // WORD + np.arange(max(size // WORD, 1))
        # Wide accesses are served in parts: 8 bytes by half warps, 16 by quarters.
        lane = (np.arange(g.threads) if lanes is None else lanes) % 32
        part = lane * max(size // WORD, 1) // 32
        self._rounds(g, warps * 32 + part, words)

    def count_matrix(self, g, rows):
        """ldmatrix and stmatrix: eight rows of 16 bytes at a time."""
        warps, count = rows.shape
        words = rows.reshape(-1, 1) // WORD + np.arange(4)
        self._rounds(g, np.arange(warps * count) // 8, words)

    def _rounds(self, g, parts, words):
        """``words [k, n]`` asked for in ``parts [k]``: those of one part and one bank come one after the other."""
        distinct = np.unique((parts[:, None].astype(np.int64) << 32) + words)
        banks, counts = np.unique((distinct >> 32) * BANKS + distinct % BANKS, return_counts=True)
        _, first = np.unique(banks // BANKS, return_index=True)
        pc = g.frames[-1].pc
        self.rounds[pc] += np.maximum.reduceat(counts, first).sum()
        self.least_rounds[pc] += (-(-np.add.reduceat(counts, first) // BANKS)).sum()


def parts(program, counted: np.ndarray) -> Parts:
    """Of numbers that were counted for every instruction: ``executed``, ``rounds`` or ``least_rounds``."""
    inside = np.zeros(len(program.steps), np.bool_)
    for first, last in loops(program):
        inside[first : last + 1] = True
    return Parts(int(counted[inside].sum()), int(counted[~inside].sum()))


class Nothing(Counters):
    """Counts instructions only."""

    def count_global(self, g, addresses, size, lanes):
        pass

    def count_tensor(self, addresses, size):
        pass

    def count_shared(self, g, offsets, size, lanes):
        pass

    def count_matrix(self, g, rows):
        pass


def loops(program) -> list[tuple[int, int]]:
    """First and last instruction of every innermost loop that holds matrix products.

    Of tensor cores, or of float32: sums of products whose two factors come from shared memory.
    """
    instructions = program.kernel.instructions
    backward = [
        (ins.operands[0].index, i)
        for i, ins in enumerate(instructions)
        if ins.parts[0] == "bra" and ins.operands[0].index <= i
    ]
    loaded = set()
    for ins in (ins for ins in instructions if ins.parts[:2] == ("ld", "shared") or ins.parts[0] == "ldmatrix"):
        loaded |= set(getattr(ins.operands[0], "items", ins.operands[:1]))
    found = [(first, last) for first, last in backward if _has_products(instructions[first : last + 1], loaded)]
    return [
        one for one in found if not any(other != one and one[0] <= other[0] and other[1] <= one[1] for other in found)
    ]


FEWEST_SUMS = 16
"""Sums of products in a loop from which on they are taken for a matrix product."""


def _has_products(loop, loaded) -> bool:
    """loaded: registers that get their values from shared memory."""
    if any(ins.parts[0] == "mma" or ins.parts[:2] == ("wgmma", "mma_async") for ins in loop):
        return True
    sums = (ins for ins in loop if ins.parts[0] == "fma")
    return sum(loaded.issuperset(ins.operands[1:3]) for ins in sums) >= FEWEST_SUMS


def _warps(g, lanes):
    return (np.arange(g.threads) if lanes is None else lanes) // 32
