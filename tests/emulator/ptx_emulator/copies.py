"""Asynchronous copies to shared memory: cp.async, and bulk tensor copies (TMA).

Both land as late as the rules allow: cp.async at the wait that covers it, a tensor copy when every warp of the wave
waits. Until then its target holds poison, and touching it is an error.
"""

from typing import NamedTuple

import numpy as np

from .access import address_operand
from .group import LANES
from .program import PARAMETERS, instruction
from .ptx import Immediate, PTXError, TensorAddress
from .shared import ASYNCHRONOUS

# --- cp.async ---------------------------------------------------------------------------------------------------------


class Copy(NamedTuple):
    """One cp.async of a group: of every thread where to, where from, how many bytes really, and whether at all."""

    to: np.ndarray
    source: np.ndarray
    read: np.ndarray
    active: np.ndarray
    size: int

    def select(self, lanes) -> "Copy":
        return Copy(self.to[lanes], self.source[lanes], self.read[lanes], self.active[lanes], self.size)

    def touches(self, g, warps) -> bool:
        return bool(self.active.reshape(-1, LANES)[warps].any())

    def land(self, g) -> None:
        lanes = np.flatnonzero(self.active)
        who = g.everyone.pick(lanes)
        values = np.zeros((len(lanes), self.size), np.uint8)
        for size in np.unique(self.read[lanes]):
            if size:
                some = np.flatnonzero(self.read[lanes] == size)
                values[some, :size] = g.wave.memory.read_bytes(self.source[lanes[some]], int(size), who.pick(some))
        shared = g.wave.shared
        granules = shared.granules(who.row, self.to[lanes], self.size)
        shared.end_copy(granules, who.warp[:, None], who.clocks.now)
        shared.copied[granules] = True
        shared.bytes[((who.row * shared.pitch + self.to[lanes])[:, None] + np.arange(self.size))] = values


@instruction("cp")
def copy(ins, program):
    if ins.parts[1:3] == ("async", "commit_group"):
        return _commit
    if ins.parts[1:3] in (("async", "wait_group"), ("async", "wait_all")):
        return _wait(ins)
    if ins.parts[1:3] == ("async", "bulk"):
        return _tensor_copy(ins, program)
    if ins.parts[1:3] in (("async", "ca"), ("async", "cg")):
        return _copy(ins, program)
    raise PTXError("unknown opcode")


def _copy(ins, program):
    to, source = address_operand(ins.operands[0], program, "u32"), address_operand(ins.operands[1], program, "u64")
    if not isinstance(ins.operands[2], Immediate):
        raise PTXError("the size of cp.async must be a number")
    size = ins.operands[2].bits
    read = program.source(ins.operands[3], "u32") if len(ins.operands) > 3 else None

    def run(g):
        offsets = np.broadcast_to(to(g), g.threads).astype(np.int64)
        amount = np.full(g.threads, size) if read is None else np.broadcast_to(read(g), g.threads).astype(np.int64)
        active = np.ones(g.threads, np.bool_) if g.active is None else g.active
        one = Copy(offsets, np.broadcast_to(source(g), g.threads), amount, active, size)
        lanes, who = g.lanes()
        offsets = offsets if lanes is None else offsets[lanes]
        shared = g.wave.shared
        shared.check_bounds(offsets, size)
        granules = shared.granules(who.row, offsets, size)
        shared.check_write(granules, who)
        shared.begin_copy(granules, who.warp[:, None])
        _check_source(g, one)
        g.wave.counters.count_shared(g, offsets, size, lanes)
        reading = active & (amount > 0)
        g.wave.counters.count_global(g, one.source[reading], size, np.flatnonzero(reading))
        g.open_copies.append(one)

    return run


def _check_source(g, one):
    """What is wrong with the addresses shows at the instruction, not where the copy lands."""
    reading = one.active & (one.read > 0)
    source = one.source[reading]
    if (source % np.uint64(one.size)).any():
        raise PTXError(f"misaligned: cp.async of {one.size} bytes")
    if (one.read[reading] > one.size).any():
        raise PTXError(f"cp.async of {one.size} bytes is asked to read more")
    for size in np.unique(one.read[reading]):
        list(g.wave.memory.locate(one.source[reading & (one.read == size)], int(size), aligned=False))


def _commit(g):
    _all_lanes(g)
    g.copies.append(g.open_copies)
    g.open_copies = []


def _all_lanes(g):
    """Committing and waiting are counted for a group as one: warps that do not take part leave it."""
    g.leave_others_behind()
    if g.active is not None:
        raise PTXError("cp.async.commit_group or wait_group in a warp of which only some lanes are active")


def _wait(ins):
    everything = ins.parts[2] == "wait_all"
    keep = 0 if everything else ins.operands[0].bits

    def run(g):
        _all_lanes(g)
        if everything:
            _commit(g)
        while len(g.copies) > keep:
            for one in g.copies.pop(0):
                one.land(g)

    return run


# --- bulk tensor copies -----------------------------------------------------------------------------------------------


class TensorMap(NamedTuple):
    """What cuTensorMapEncodeTiled would encode; slowest dimension first, strides in elements, boundaries read zero."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    itemsize: int
    swizzle: int  # bytes of a row of the pattern: 0, 32, 64 or 128

    def check(self) -> None:
        """What cuTensorMapEncodeTiled refuses."""
        row = self.box[-1] * self.itemsize
        expected = {
            "its address is a multiple of 16 bytes": self.address % 16 == 0,
            "elements of a row follow one another": self.strides[-1] == 1,
            "a stride is a multiple of 16 bytes, below 2^40": all(
                n * self.itemsize % 16 == 0 and 0 <= n * self.itemsize < 2**40 for n in self.strides[:-1]
            ),
            "no dimension is empty, or longer than 2^32": all(1 <= n <= 2**32 for n in self.shape),
            "a box has 1 to 256 elements along each dimension": all(1 <= n <= 256 for n in self.box),
            "a row of its box is a multiple of 16 bytes": row % 16 == 0,
            "its row is at most as wide as the swizzle": not self.swizzle or row <= self.swizzle,
        }
        for rule, held in expected.items():
            if not held:
                raise PTXError(f"tensor map: expected that {rule}, got {self}")


TensorMap.SIZE, TensorMap.ALIGNMENT = 128, 64
"""Of a CUtensorMap, in bytes."""

TARGET_ALIGNMENT = 128
"""Of a tensor copy in shared memory, with any swizzle."""

SWIZZLE_BITS = {0: 0, 32: 1, 64: 3, 128: 7}


def swizzle(offsets: np.ndarray, width: int) -> np.ndarray:
    """Where a byte of shared memory lies: 16-byte chunks are permuted by the number of their 128-byte row."""
    return offsets ^ (((offsets >> 7) & SWIZZLE_BITS[width]) << 4)


class TensorCopy(NamedTuple):
    row: int
    tensor: TensorMap
    coordinates: tuple[int, ...]  # slowest first
    to: int
    mbarrier: object
    who: object
    granules: np.ndarray

    @property
    def size(self):
        return int(np.prod(self.tensor.box)) * self.tensor.itemsize

    def land(self, wave) -> None:
        tensor = self.tensor
        box = self._read(wave).reshape(-1, tensor.box[-1])
        row_bytes = tensor.box[-1] * tensor.itemsize
        offsets = self.to + np.arange(len(box))[:, None] * row_bytes + np.arange(tensor.box[-1]) * tensor.itemsize
        at = self.row * wave.shared.pitch + swizzle(offsets, tensor.swizzle)
        wave.shared.views[tensor.itemsize][at // tensor.itemsize] = box
        wave.shared.end_copy(self.granules, self.mbarrier.agent, wave.clocks.now + ASYNCHRONOUS)
        self.mbarrier.bytes -= self.size
        self.mbarrier.check(wave.clocks)

    def _read(self, wave):
        """The box, zeros where it is outside of the tensor."""
        tensor = self.tensor
        word = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[tensor.itemsize]
        box = np.zeros(tensor.box, word)
        inside = [
            slice(max(0, -start), max(0, min(count, size - start)))
            for start, count, size in zip(self.coordinates, tensor.box, tensor.shape, strict=True)
        ]
        if any(part.start >= part.stop for part in inside):
            return box
        offsets = np.zeros((1,) * len(inside), np.int64)
        for d, part in enumerate(inside):
            shape = [1] * len(inside)
            shape[d] = -1
            steps = (self.coordinates[d] + np.arange(part.start, part.stop)) * tensor.strides[d]
            offsets = offsets + steps.reshape(shape)
        addresses = np.uint64(tensor.address) + (offsets * tensor.itemsize).astype(np.uint64)
        flat = addresses.reshape(-1)
        who = self.who.pick(np.zeros(len(flat), np.int64))
        wave.counters.count_tensor(flat, tensor.itemsize)
        box[tuple(inside)] = wave.memory.load(flat, tensor.itemsize, 1, who).reshape(addresses.shape)
        return box


def _tensor_copy(ins, program):
    if "tensor" not in ins.parts or "mbarrier::complete_tx::bytes" not in ins.parts or len(ins.operands) != 3:
        raise PTXError("only loads of tiles that report to an mbarrier are known")
    if not ins.parts[5].startswith("shared") or ins.parts[6] != "global" or "multicast::cluster" in ins.parts:
        raise PTXError("only loads into the shared memory of the same block are known")
    to, source, signal = ins.operands
    if not isinstance(source, TensorAddress):
        raise PTXError("expected a tensor map and coordinates")
    target, mbarrier = address_operand(to, program, "u32"), address_operand(signal, program, "u32")
    descriptor = program.source(source.descriptor, "u64")
    coordinates = [program.source(c, "s32") for c in reversed(source.coordinates)]

    def run(g):
        lanes = np.arange(g.threads) if g.active is None else np.flatnonzero(g.active)

        def of(value):
            return np.broadcast_to(value, g.threads)

        maps, targets, signals = of(descriptor(g)), of(target(g)), of(mbarrier(g))
        starts = [of(c(g)) for c in coordinates]
        for lane in lanes:
            tensor = g.wave.tensor_map(int(maps[lane]) - PARAMETERS)
            _issue(g, lane, tensor, tuple(int(c[lane]) for c in starts), int(targets[lane]), int(signals[lane]))

    return run


def _issue(g, lane, tensor, coordinates, to, signal):
    shared = g.wave.shared
    if len(coordinates) != len(tensor.box):
        raise PTXError(f"a tensor map of {len(tensor.box)} dimensions, {len(coordinates)} coordinates")
    size = int(np.prod(tensor.box)) * tensor.itemsize
    # The permutation follows the address, not the box: a box may begin within the pattern.
    if to % TARGET_ALIGNMENT:
        raise PTXError(f"misaligned: a tensor copy to {to:#x}, which must be a multiple of {TARGET_ALIGNMENT}")
    who = g.everyone.pick(np.array([lane]))
    offset = np.array([to])
    shared.check_bounds(offset, size, 16)
    granules = shared.granules(who.row, offset, size)
    shared.check_write(granules, who, asynchronous=True)
    mbarrier = g.wave.mbarrier_for(int(who.row[0]), int(who.warp[0]), signal)
    shared.begin_copy(granules, mbarrier.agent)
    g.wave.flights.append(TensorCopy(int(who.row[0]), tensor, coordinates, to, mbarrier, who, granules))
    g.wave.counters.tensor_copies += 1
