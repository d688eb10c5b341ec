"""Loads, stores and moves."""

import numpy as np

from .arithmetic import UNSIGNED, dtype
from .program import PARAMETERS, instruction
from .ptx import SIZES, Address, PTXError, Sink, Vector


def space(parts) -> str:
    for part in parts[1:]:
        name = part.split("::")[0]
        if name in ("global", "shared", "param", "local", "const"):
            return name
    return "global"  # generic: of our kernels, always global


@instruction("mov")
def move(ins, program):
    to, source = ins.operands
    kind = ins.parts[-1]
    if isinstance(to, Vector):
        return _unpack(to.items, program.source(source, kind), kind, program)
    if isinstance(source, Vector):
        return _pack(to, source.items, kind, program)
    get, put = program.source(source, kind), program.destination(to, kind)
    return lambda g: put(g, get(g))


def _unpack(items, get, kind, program):
    bits = SIZES[kind] * 8 // len(items)
    puts = [program.destination(item, f"b{bits}") for item in items]

    def run(g):
        value = get(g)
        for i, put in enumerate(puts):
            put(g, (value >> value.dtype.type(i * bits)).astype(UNSIGNED[bits]))

    return run


def _pack(to, items, kind, program):
    bits, whole = SIZES[kind] * 8 // len(items), dtype(kind)
    gets, put = [program.source(item, f"b{bits}") for item in items], program.destination(to, kind)

    def run(g):
        value = whole(0)
        for i, get in enumerate(gets):
            value = value | (get(g).astype(whole) << whole(i * bits))
        put(g, value)

    return run


@instruction("ld")
def load(ins, program):
    kind, where = ins.parts[-1], space(ins.parts)
    results = ins.operands[0].items if isinstance(ins.operands[0], Vector) else ins.operands[:1]
    width, count = SIZES[kind], len(results)
    indices = [None if isinstance(r, Sink) else r.index for r in results]
    extend = [None if i is None else _extension(kind, program.kernel.register_bits[i]) for i in indices]
    address = program.address(ins.operands[1], "u32" if where == "shared" else "u64")
    if where not in ("global", "shared", "param"):
        raise PTXError(f"{where} memory is not known")

    def run(g):
        lanes, who = g.lanes()
        at = address(g)
        at = at if lanes is None else at[lanes]
        if where == "global":
            values = g.wave.memory.load(at, width, count, who)
            g.wave.counters.count_global(g, at, width * count, lanes)
        elif where == "shared":
            values = g.wave.shared.load(at.astype(np.int64), width, count, who)
            g.wave.counters.count_shared(g, at, width * count, lanes)
        else:
            values = g.wave.load_parameter(at - np.uint64(PARAMETERS), width, count)
        for i, (index, convert) in enumerate(zip(indices, extend, strict=True)):
            if index is not None:
                g.write_lanes(index, lanes, convert(values[:, i]))

    return run


def _extension(kind, bits):
    """To the width of a register that may be wider than what is loaded."""
    if SIZES[kind] * 8 == bits:
        return lambda x: x
    if kind[0] == "s":
        return lambda x: x.view(dtype(kind)).astype(np.dtype(f"i{bits // 8}")).view(UNSIGNED[bits])
    return lambda x: x.astype(UNSIGNED[bits])


@instruction("st")
def store(ins, program):
    kind, where = ins.parts[-1], space(ins.parts)
    width = SIZES[kind]
    gets = program.values(ins.operands[1], f"b{8 * width}")
    count = len(gets)
    address = program.address(ins.operands[0], "u32" if where == "shared" else "u64")
    if where not in ("global", "shared"):
        raise PTXError(f"a store to {where} memory is not known")

    def run(g):
        lanes, who = g.lanes()
        at = address(g)
        at = at if lanes is None else at[lanes]
        values = np.empty((len(at), count), UNSIGNED[8 * width])
        for i, get in enumerate(gets):
            value = get(g)
            values[:, i] = value if lanes is None or value.ndim == 0 else value[lanes]
        if where == "global":
            g.wave.memory.store(at, values, who)
            g.wave.counters.count_global(g, at, width * count, lanes)
        else:
            g.wave.shared.store(at.astype(np.int64), values, who, ins.line)
            g.wave.counters.count_shared(g, at, width * count, lanes)

    return run


@instruction("prefetch", "prefetchu", "applypriority", "discard", "membar", "setmaxnreg", "griddepcontrol", "nanosleep")
def nothing(ins, program):
    # Fences of generic memory alone order nothing without a barrier, and every barrier here orders everything.
    return lambda g: None


@instruction("trap")
def trap(ins, program):
    def run(g):
        raise PTXError("the kernel trapped")

    return run


def address_operand(operand, program, kind):
    if not isinstance(operand, Address):
        raise PTXError(f"expected an address, got {operand}")
    return program.address(operand, kind)
