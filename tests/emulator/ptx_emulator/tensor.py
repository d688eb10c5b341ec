"""Matrix products: mma.sync, and wgmma, which runs as late as the rules allow.

Until the wait that covers it, a wgmma's sums are poison in their registers, touching them is an error, and nobody may
write the shared memory that it reads. Products of 16-bit elements are exact in float32; how a tensor core rounds and
orders its sums is not specified, so their last bits are not claimed.
"""

import re
from typing import NamedTuple

import numpy as np

from . import layouts
from .arithmetic import widen
from .group import LANES
from .program import instruction
from .ptx import Immediate, PTXError, Vector

HALVES = ("f16", "bf16")


def _sizes(text):
    return tuple(int(n) for n in re.fullmatch(r"m(\d+)n(\d+)k(\d+)", text).groups())


@instruction("mma")
def multiply(ins, program):
    sizes, kinds = _sizes(ins.parts[3]), ins.parts[-4:]
    left_kind, right_kind = kinds[1:3]
    if sizes != (16, 8, 16) or ins.parts[4:6] != ("row", "col") or left_kind not in HALVES or right_kind != left_kind:
        raise PTXError("only m16n8k16 of 16-bit elements, row by column, is known")
    if (kinds[0], kinds[3]) != ("f32", "f32"):
        raise PTXError("only sums in float32 are known")
    left, right = program.values(ins.operands[1], "b32"), program.values(ins.operands[2], "b32")
    sums, results = program.values(ins.operands[3], "f32"), program.register_indices(ins.operands[0])

    def run(g):
        some = g.whole_warps("mma.sync")
        a = layouts.left_fragment(_elements(g, left, left_kind))
        b = layouts.right_fragment(_elements(g, right, left_kind))
        c = layouts.sum_fragment(np.stack([np.broadcast_to(get(g), g.threads) for get in sums]).reshape(4, -1, LANES))
        registers = np.ascontiguousarray(layouts.sum_registers(a @ b + c)).view(np.uint32)
        for index, value in zip(results, registers, strict=True):
            g.write(index, value)
        g.wave.counters.products += 2 * 16 * 8 * 16 * (g.size if some is None else int(some.sum()))

    return run


def _elements(g, gets, kind):
    """float32 ``[registers, n, 32, 2]`` of registers that hold two elements each."""
    packed = np.stack([np.broadcast_to(get(g), g.threads) for get in gets])
    return widen(packed.view(np.uint16), kind).reshape(len(gets), g.size, LANES, 2)


# --- wgmma ------------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """One wgmma of a group: of every warp the descriptors, or A in registers, and whether it adds to its sums."""

    registers: tuple[int, ...]
    sources: tuple[int, ...]  # registers of A
    left: np.ndarray  # descriptors [n], or elements [n, 16, 16]
    right: np.ndarray
    adds: np.ndarray
    signs: int
    transposed: tuple[bool, bool]
    kind: str

    def select(self, warps) -> "Product":
        return self._replace(left=self.left[warps], right=self.right[warps], adds=self.adds[warps])

    @property
    def columns(self):
        return len(self.registers) * 2


@instruction("wgmma")
def warpgroup_multiply(ins, program):
    if ins.parts[1] == "fence":
        return lambda g: None  # see `flow`
    if ins.parts[1] == "commit_group":
        return _commit
    if ins.parts[1] == "wait_group":
        keep = ins.operands[0].bits
        return lambda g: _wait(g, keep)
    if ins.parts[1] != "mma_async":
        raise PTXError("unknown opcode")
    return _Multiply(ins, program)


class _Multiply:
    def __init__(self, ins, program):
        _, columns, depth = _sizes(ins.parts[4])
        self.kind = ins.parts[-1]
        if depth != 16 or self.kind not in HALVES or ins.parts[-3:] != ("f32", self.kind, self.kind):
            raise PTXError("only products of 16-bit elements with sums in float32 are known")
        sums, left, right, adds, *flags = ins.operands
        self.registers = tuple(program.register_indices(sums))
        if len(self.registers) != columns // 2:
            raise PTXError(f"expected {columns // 2} registers of sums, got {len(self.registers)}")
        flags = [flag.bits for flag in flags]
        self.in_registers = isinstance(left, Vector)
        self.sources = tuple(program.register_indices(left)) if self.in_registers else ()
        self.left = program.values(left, "b32") if self.in_registers else program.source(left, "u64")
        self.right, self.adds = program.source(right, "u64"), program.source(adds, "pred")
        if isinstance(adds, Immediate):
            self.adds = program.source(adds, "pred")
        self.signs = flags[0] * flags[1]
        self.transposed = (False, bool(flags[2])) if self.in_registers else (bool(flags[2]), bool(flags[3]))

    def in_flight(self, g):
        """Sums in flight may be added to by another product of the same registers, and by nothing else."""
        for registers in g.accumulators:
            if registers != self.registers and not set(registers).isdisjoint(self.registers + self.sources):
                raise PTXError("too early: the registers of this wgmma overlap those of another in flight")
        if not set(self.sources).isdisjoint(self.registers):
            raise PTXError("a wgmma reads A from its own sums")
        self(g)

    def __call__(self, g):
        if g.active is not None:
            g.leave_others_behind()
        g.whole_warps("wgmma")
        if self.in_registers:
            left = layouts.left_fragment(_elements(g, self.left, self.kind))
        else:
            left = _of_warps(g, self.left(g))
        right, adds = _of_warps(g, self.right(g)), _of_warps(g, self.adds(g))
        one = Product(self.registers, self.sources, left, right, adds, self.signs, self.transposed, self.kind)
        for granules in _granules(g, one):
            g.wave.shared.check_read(granules, g.each_warp, asynchronous=True)
            np.add.at(g.wave.shared.readers, granules.reshape(-1), 1)
        if self.registers not in g.accumulators:
            held = [g.registers[i] for i in self.registers]
            held = [g.poisoned(i) if h is None else h for i, h in zip(self.registers, held, strict=True)]
            g.accumulators[self.registers] = np.stack(held).view(np.float32)
            for i in self.registers:
                g.registers[i] = g.poisoned(i)
            g.flying |= set(self.registers)
        g.open_products.append(one)
        g.wave.counters.products += 2 * 16 * one.columns * 16 * g.size


def _of_warps(g, value):
    return np.broadcast_to(value, g.threads)[::LANES].copy()


def _offsets(g, product):
    """Byte offsets in shared memory of the elements ``[n, rows, 16]`` of A (None: in registers) and of B."""
    left = None
    if product.left.ndim == 1:
        first = g.warps % 4 * 16
        left = np.stack(
            [
                layouts.operand_offsets(int(d), r + np.arange(16), 16, product.transposed[0])
                for d, r in zip(product.left, first, strict=True)
            ]
        )
    columns = np.arange(product.columns)
    known = {}
    for d in product.right:
        if int(d) not in known:
            known[int(d)] = layouts.operand_offsets(int(d), columns, 16, product.transposed[1])
    return left, np.stack([known[int(d)] for d in product.right])


def _granules(g, product):
    """Numbers ``[n, m]`` of the granules that each warp reads, of A and of B."""
    shared = g.wave.shared
    # Eight elements side by side, along K or (transposed) across it, are 16 bytes: one element a granule is enough.
    step = max(min(shared.granule, 16) // 2, 1)
    for offsets, transposed in zip(_offsets(g, product), product.transposed, strict=True):
        if offsets is None:
            continue
        flat = (offsets[:, ::step] if transposed else offsets[:, :, ::step]).reshape(g.size, -1)
        shared.check_bounds(flat, 2)
        yield (g.rows[:, None] * shared.pitch + flat) // shared.granule


def _commit(g):
    g.products.append(g.open_products)
    g.open_products = []


def _wait(g, keep):
    while len(g.products) > keep:
        for one in g.products.pop(0):
            _retire(g, one)
    flying = {one.registers for group in (*g.products, g.open_products) for one in group}
    for registers in [r for r in g.accumulators if r not in flying]:
        sums = np.ascontiguousarray(g.accumulators.pop(registers)).view(np.uint32)
        for index, value in zip(registers, sums, strict=True):
            g.registers[index] = value
    g.flying = frozenset(i for registers in g.accumulators for i in registers)


def _retire(g, one):
    """Runs a product: each warp has 16 rows of A, and all columns of B."""
    shared = g.wave.shared
    left_at, right_at = _offsets(g, one)
    base = (g.rows * shared.pitch)[:, None, None]
    if left_at is None:
        left = one.left
    else:
        left = widen(shared.views[2][(base + left_at) // 2], one.kind)
    sums = layouts.sum_fragment(g.accumulators[one.registers].reshape(len(one.registers), g.size, LANES))
    result = np.empty_like(sums)
    loaded = {}
    for i in range(g.size):
        key = (int(g.rows[i]), int(one.right[i]))
        if key not in loaded:
            loaded[key] = widen(shared.views[2][(base[i] + right_at[i]) // 2], one.kind)
        product = left[i] @ loaded[key].T
        product = -product if one.signs < 0 else product
        result[i] = product + sums[i] if one.adds[i] else product
    g.accumulators[one.registers] = layouts.sum_registers(result)
    for granules in _granules(g, one):
        np.subtract.at(shared.readers, granules.reshape(-1), 1)
        shared.note_read(granules, g.each_warp)
