"""What the lanes of a warp do together: shuffles, reductions, votes, and matrices of eight rows in shared memory."""

import numpy as np

from .arithmetic import dtype
from .group import LANES
from .program import instruction
from .ptx import Immediate, Pair, PTXError, Vector


@instruction("shfl")
def shuffle(ins, program):
    to = ins.operands[0]
    put = program.destination(to.first if isinstance(to, Pair) else to, "b32")
    put_valid = program.destination(to.second, "pred") if isinstance(to, Pair) else None
    value, by, clamp = (program.source(operand, "u32") for operand in ins.operands[1:4])
    mode = ins.parts[2]
    fixed = None
    if all(isinstance(operand, Immediate) for operand in ins.operands[2:4]):
        fixed = _source_lanes(mode, *(np.int64(operand.bits) for operand in ins.operands[2:4]))

    def run(g):
        g.whole_warps("shfl.sync")
        if fixed is None:
            b, c = (np.broadcast_to(x(g), g.threads).reshape(-1, LANES).astype(np.int64) for x in (by, clamp))
            source, valid = _source_lanes(mode, b, c)
            put(g, np.take_along_axis(value(g).reshape(-1, LANES), source, 1).reshape(-1))
        else:
            source, valid = fixed
            put(g, value(g).reshape(-1, LANES)[:, source].reshape(-1))
        if put_valid:
            put_valid(g, np.broadcast_to(valid, (g.size, LANES)).reshape(-1))

    return run


def _source_lanes(mode, by, clamp):
    """Of every lane the lane that it reads, and whether that is within its segment; if not it keeps its own value."""
    lane = np.arange(LANES)
    segment = (clamp >> 8) & 31
    limit = (lane & segment) | (clamp & 31 & ~segment)
    source = {
        "up": lane - (by & 31),
        "down": lane + (by & 31),
        "bfly": lane ^ (by & 31),
        "idx": (lane & segment) | (by & 31 & ~segment),
    }[mode]
    valid = source >= limit if mode == "up" else source <= limit
    return np.where(valid, source, lane) & 31, valid


@instruction("redux")
def reduce(ins, program):
    kind, name = ins.parts[-1], ins.parts[2]
    put, value = program.destination(ins.operands[0], kind), program.source(ins.operands[1], kind)
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum}
    functions |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    function, to = functions[name], dtype(kind)

    def run(g):
        g.whole_warps("redux.sync")
        x = np.broadcast_to(value(g), g.threads).reshape(-1, LANES)
        put(g, np.repeat(function.reduce(x, axis=1, dtype=to), LANES))

    return run


@instruction("elect")
def elect(ins, program):
    to = ins.operands[0]
    put_lane = program.destination(to.first, "b32")
    put = program.destination(to.second, "pred")

    def run(g):
        g.whole_warps("elect.sync")
        put_lane(g, np.uint32(0))
        put(g, np.tile(np.arange(LANES) == 0, g.size))

    return run


@instruction("vote")
def vote(ins, program):
    mode, kind = ins.parts[2], ins.parts[-1]
    put, value = program.destination(ins.operands[0], kind), program.source(ins.operands[1], "pred")

    def run(g):
        g.whole_warps("vote.sync")
        x = np.broadcast_to(value(g), g.threads).reshape(-1, LANES)
        if mode == "ballot":
            bits = (x.astype(np.uint32) << np.arange(LANES, dtype=np.uint32)).sum(1, dtype=np.uint32)
            put(g, np.repeat(bits, LANES))
        else:
            put(g, np.repeat({"any": x.any(1), "all": x.all(1), "uni": x.all(1) | ~x.any(1)}[mode], LANES))

    return run


@instruction("activemask")
def active_mask(ins, program):
    put = program.destination(ins.operands[0], "b32")

    def run(g):
        x = np.ones(g.threads, np.bool_) if g.active is None else g.active
        bits = (x.reshape(-1, LANES).astype(np.uint32) << np.arange(LANES, dtype=np.uint32)).sum(1, dtype=np.uint32)
        put(g, np.repeat(bits, LANES))

    return run


# --- ldmatrix, stmatrix: 8 x 8 matrices of 16 bits, one row of 16 bytes an address ------------------------------------


def _shape(ins, vector):
    if ins.parts[3] != "m8n8" or ins.parts[-1] != "b16":
        raise PTXError("only matrices of 8 x 8 elements of 16 bits are known")
    return (len(vector.items) if isinstance(vector, Vector) else 1), "trans" in ins.parts


def _rows(g, offsets, count, what):
    """Offsets ``[n, 8 * count]`` of the rows of the active warps, who reads or writes them, and which warps."""
    some = g.whole_warps(what)
    warps = np.arange(g.size) if some is None else np.flatnonzero(some)
    rows = np.broadcast_to(offsets, g.threads).astype(np.int64).reshape(-1, LANES)[warps, : 8 * count]
    return rows, g.each_warp.pick(np.repeat(warps, 8 * count)), warps


@instruction("ldmatrix")
def load_matrix(ins, program):
    count, transposed = _shape(ins, ins.operands[0])
    registers = program.register_indices(ins.operands[0])
    address = program.address(ins.operands[1], "u32")

    def run(g):
        rows, who, warps = _rows(g, address(g), count, "ldmatrix")
        flat = rows.reshape(-1)
        values = g.wave.shared.load(flat, 16, 1, who).view(np.uint16).reshape(len(warps), count, 8, 8)
        g.wave.counters.count_matrix(g, rows)
        if transposed:
            values = values.transpose(0, 1, 3, 2)
        # Lane l holds elements 2 (l % 4) and the next of row l / 4.
        pairs = np.ascontiguousarray(values).view(np.uint32).reshape(len(warps), count, LANES)
        lanes = None if len(warps) == g.size else (warps[:, None] * LANES + np.arange(LANES)).reshape(-1)
        for i, register in enumerate(registers):
            g.write_lanes(register, lanes, np.ascontiguousarray(pairs[:, i]).reshape(-1))

    return run


@instruction("stmatrix")
def store_matrix(ins, program):
    count, transposed = _shape(ins, ins.operands[1])
    gets = program.values(ins.operands[1], "b32")
    address = program.address(ins.operands[0], "u32")

    def run(g):
        rows, who, warps = _rows(g, address(g), count, "stmatrix")
        pairs = np.stack([get(g).reshape(-1, LANES)[warps] for get in gets], 1)
        values = pairs.view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            values = values.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(values).view(np.uint64).reshape(-1, 2)
        g.wave.shared.store(rows.reshape(-1), words, who, ins.line)
        g.wave.counters.count_matrix(g, rows)

    return run
