"""A kernel made ready to run: every instruction becomes a function of the group of warps that executes it."""

import hashlib
import importlib
from typing import NamedTuple

import numpy as np

from . import arithmetic, flow, ptx
from .arithmetic import UNSIGNED, dtype
from .ptx import Address, Immediate, Not, PTXError, Register, Sink, Special, Symbol, Vector

PARAMETERS = 1 << 16
"""Where the parameters of a launch lie in the generic address space: below everything of the host, within 32 bits."""

INSTRUCTIONS = {}
"""Opcode -> what makes its function; filled by the modules that know them."""

MODULES = ("access", "warp", "barriers", "copies", "tensor")


class Branch(NamedTuple):
    target: int  # -1: the threads end here
    meet: int
    after: int


class Step(NamedTuple):
    run: object
    guard: ptx.Guard | None
    branch: Branch | None
    waits: bool  # run says False where the warps must wait and do it again
    touched: frozenset[int]  # registers, read or written
    run_in_flight: object  # run, for products that add to sums in flight; else raises


def instruction(*names, waits=False):
    """Registers ``build(instruction, program)``, which returns the function of the group."""

    def register(build):
        for name in names:
            INSTRUCTIONS[name] = (build, waits)
        return build

    return register


class Program:
    def __init__(self, text: str, name: str | None = None, dynamic_shared: int = 0):
        for module in MODULES:
            importlib.import_module(f".{module}", __package__)
        self.kernel = kernel = ptx.parse(text, name)
        # Of the instructions alone: the rest of the text names files and lines.
        self.digest = hashlib.sha256("\n".join(ins.text for ins in kernel.instructions).encode()).hexdigest()[:16]
        aligned = -(-dynamic_shared // 16) * 16 if kernel.static_shared else dynamic_shared
        self.shared_size = aligned + kernel.static_shared
        self.shared = {n: at if at >= 0 else aligned - 1 - at for n, at in kernel.shared.items()}
        self.parameters = {p.name: p.offset for p in kernel.parameters}
        self.granule = min((_width(ins) for ins in kernel.instructions if _is_shared(ins)), default=16)
        self.meet = ptx.reconvergence(kernel.instructions)
        self.missing_fences, self.never_written = flow.missing_fences(kernel), flow.never_written(kernel)
        unknown, self.steps = [], []
        for i, ins in enumerate(kernel.instructions):
            try:
                self.steps.append(self._step(i, ins))
            except PTXError as error:
                unknown.append(f"line {ins.line}: {ins.text[:120]}: {error}")
        if unknown:
            raise PTXError("\n".join((f"{kernel.name}: {len(unknown)} instructions cannot be run:", *unknown[:20])))

    def explain(self, error: PTXError, pc: int) -> PTXError:
        ins = self.kernel.instructions[pc]
        return PTXError(f"{error} [{self.kernel.name}, line {ins.line}: {ins.text[:160]}]")

    def _step(self, i, ins):
        touched = frozenset(ptx.registers(ins.operands)) | ({ins.guard.register} if ins.guard else set())
        branch, run, waits = None, None, False
        if ins.parts[0] == "bra":
            branch = Branch(ins.operands[0].index, self.meet.get(i, len(self.kernel.instructions)), i + 1)
        elif ins.parts[0] in ("ret", "exit"):
            branch = Branch(-1, 0, i + 1)
        elif ins.parts[0] in INSTRUCTIONS:
            build, waits = INSTRUCTIONS[ins.parts[0]]
            waits = waits(ins) if callable(waits) else waits
            run = build(ins, self)
        else:
            run = self._computation(ins)
        if i in self.missing_fences:
            run = _complains(f"missing wgmma.fence: {self.missing_fences[i]} is used by other instructions too")
        if i in self.never_written:
            run = _complains(f"uninitialised: nothing wrote register {self.never_written[i]}")
        in_flight = getattr(run, "in_flight", None) or _too_early(ins, self)
        return Step(run, ins.guard, branch, waits, touched, in_flight)

    def _computation(self, ins):
        found = arithmetic.lookup(ins.parts, len(ins.operands))
        if found is None:
            raise PTXError("unknown opcode")
        function, kinds, (kind,) = found
        put = self.destination(ins.operands[0], kind)
        sources = [self.source(operand, of) for operand, of in zip(ins.operands[1:], kinds, strict=True)]
        if len(sources) == 1:
            first = sources[0]
            return lambda g: put(g, function(first(g)))
        if len(sources) == 2:
            first, second = sources
            return lambda g: put(g, function(first(g), second(g)))
        return lambda g: put(g, function(*(source(g) for source in sources)))

    # --- operands -----------------------------------------------------------------------------------------------------

    def source(self, operand, kind: str):
        """A function of the group that gives an operand as an array of the PTX type ``kind``, or as one number."""
        to = dtype(kind)
        if isinstance(operand, Register):
            return _from_register(operand, to)
        if isinstance(operand, Not):
            index = operand.register.index
            return lambda g: ~g.read(index)
        if isinstance(operand, Immediate):
            if kind == "pred":
                value = np.bool_(operand.bits)
            else:
                width = np.dtype(to).itemsize * 8
                bits = operand.bits
                if kind == "f32" and bits >= 1 << 32:  # 0d...: a double
                    bits = int(np.float32(np.uint64(bits).view(np.float64)).view(np.uint32))
                value = UNSIGNED[width](bits & ((1 << width) - 1)).view(to)
            return lambda g: value
        if isinstance(operand, Special):
            name = operand.name
            return lambda g: g.special(name).astype(to)
        if isinstance(operand, Symbol):
            value = to(self.address_of(operand.name))
            return lambda g: value
        raise PTXError(f"operand {operand} is not known here")

    def destination(self, operand, kind: str):
        """A function of the group and a value of type ``kind``, array or number, that stores it in a register."""
        if isinstance(operand, Sink):
            return lambda g, value: None
        if not isinstance(operand, Register):
            raise PTXError(f"result {operand} is not known here")
        index, bits = operand
        if bits == 1:

            def put_predicate(g, value):
                g.write(index, value if np.ndim(value) else np.full(g.threads, value))

            return put_predicate
        storage = UNSIGNED[bits]

        def put(g, value):
            if value.ndim == 0:
                value = np.full(g.threads, value)
            if value.itemsize * 8 != bits:
                value = value.astype(storage)
            g.write(index, value.view(storage))

        return put

    def address(self, operand: Address, kind: str):
        """A function of the group that gives addresses, one a thread, as ``kind``."""
        base, to, offset = self.source(operand.base, kind), dtype(kind), operand.offset
        if isinstance(operand.base, Register):
            if offset == 0:
                return base
            step = to(offset & ((1 << 8 * np.dtype(to).itemsize) - 1))
            return lambda g: base(g) + step
        return lambda g: np.full(g.threads, int(base(g)) + offset, to)

    def address_of(self, name: str) -> int:
        if name in self.parameters:
            return PARAMETERS + self.parameters[name]
        if name in self.shared:
            return self.shared[name]
        return 0  # a string for assertions that never fire

    def values(self, operand, kind: str):
        """Sources of a vector, or of the one operand."""
        items = operand.items if isinstance(operand, Vector) else (operand,)
        return [self.source(item, kind) for item in items]

    def register_indices(self, operand) -> list[int]:
        items = operand.items if isinstance(operand, Vector) else (operand,)
        return [item.index for item in items]


def _from_register(operand, to):
    index, bits = operand
    if bits == 1:
        return lambda g: g.read(index)
    itemsize = np.dtype(to).itemsize
    if itemsize * 8 == bits:
        if to is UNSIGNED[bits]:
            return lambda g: g.read(index)
        return lambda g: g.read(index).view(to)
    narrow = UNSIGNED[itemsize * 8]
    return lambda g: g.read(index).astype(narrow).view(to)


def _complains(reason):
    def run(g):
        raise PTXError(reason)

    run.in_flight = run
    return run


def _too_early(ins, program):
    def run(g):
        names = program.kernel.register_names
        early = sorted(names[i] for i in ptx.registers(ins.operands) if i in g.flying)[:3]
        raise PTXError(f"too early: {', '.join(early)} belong to a wgmma in flight, no wgmma.wait_group covers it")

    return run


def _is_shared(ins):
    return ins.parts[0] in ("ld", "st", "atom", "red") and any(part.startswith("shared") for part in ins.parts)


def _width(ins):
    return ptx.SIZES[ins.parts[-1]]
