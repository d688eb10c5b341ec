"""PTX text to instructions: what `nvcc` and Triton print, one entry at a time.

Nothing here knows what an instruction does; operands are parsed into small records, names of registers and labels are
resolved within their scopes, and the branches' points of reconvergence are computed.
"""

import bisect
import re
import struct
from typing import NamedTuple


class PTXError(Exception):
    """The PTX breaks a rule, or needs something that the emulator does not have."""


class Register(NamedTuple):
    index: int
    bits: int  # 1: a predicate


class Immediate(NamedTuple):
    bits: int  # the bit pattern of a float, the value of an integer (may be negative)


class Special(NamedTuple):
    name: str  # tid.x, ctaid.y, ...


class Symbol(NamedTuple):
    name: str  # a parameter or a variable


class Vector(NamedTuple):
    items: tuple


class Address(NamedTuple):
    base: object
    offset: int


class TensorAddress(NamedTuple):
    """``[descriptor, {coordinates}]`` of a bulk tensor copy; coordinates fastest dimension first."""

    descriptor: object
    coordinates: tuple


class Pair(NamedTuple):
    """``%r1|%p1``: two destinations."""

    first: object
    second: object


class Not(NamedTuple):
    register: Register


class Sink(NamedTuple):
    """``_``: a result that nobody wants."""


class Target(NamedTuple):
    index: int


class Guard(NamedTuple):
    register: int
    negated: bool


class Parameter(NamedTuple):
    name: str
    offset: int
    size: int


class Instruction(NamedTuple):
    parts: tuple[str, ...]  # ("ld", "global", "v4", "b32")
    operands: tuple
    guard: Guard | None
    line: int
    text: str


class Kernel(NamedTuple):
    name: str
    parameters: tuple[Parameter, ...]
    instructions: tuple[Instruction, ...]
    num_registers: int
    register_bits: tuple[int, ...]
    register_names: tuple[str, ...]
    shared: dict[str, int]  # variable -> 0 where its size is the launch's, or else -1 - its offset behind those
    static_shared: int  # bytes behind the dynamic ones


SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid|laneid|warpid|smid|clock|clock64|globaltimer)(\.[xyz])?$")
STATEMENT = re.compile(r"\s*(?:([{}])|([\w$]+)\s*:(?!:)|\.(?:loc|file)\b[^\n]*\n|([^;]*);)")
SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4}
SIZES |= {"b64": 8, "u64": 8, "s64": 8, "f64": 8}


def parse(text: str, name: str | None = None) -> Kernel:
    """The entry ``name`` of a PTX module, by default the only or first one."""
    # Comments become spaces: offsets, and so line numbers, stay.
    text = re.sub(r"//[^\n]*", lambda m: " " * len(m[0]), text)
    wanted = re.escape(name) if name else r"[\w$]+"
    entry = re.search(r"\.entry\s+(" + wanted + r")\s*\(([^)]*)\)[^{;]*\{", text)
    if entry is None:
        raise PTXError(f"no entry {name or ''} in the PTX")
    return _Parser(text, entry).kernel()


class _Parser:
    def __init__(self, text, entry):
        self.text, self.entry = text, entry
        self.newlines = [m.start() for m in re.finditer("\n", text)]
        self.bits, self.names = [], []
        self.scopes = [{}]  # of names to registers
        self.labels = [{}]  # of names to instruction numbers, one dictionary a scope that is open
        self.raw, self.pending = [], []  # instructions; branches whose label is not known yet

    def kernel(self) -> Kernel:
        parameters = tuple(self._parameters(self.entry[2]))
        declared = re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.\w+\s+([\w$]+)\s*\[(\d*)\]", self.text)
        shared, static = {variable: 0 for _, variable, size in declared if not size}, 0
        for align, variable, size in declared:
            if size:
                static = -(-static // int(align)) * int(align)
                shared[variable] = -1 - static
                static += int(size)
        self._body()
        instructions = tuple(self._resolve())
        return Kernel(
            self.entry[1], parameters, instructions, len(self.bits), tuple(self.bits), tuple(self.names), shared, static
        )

    def _parameters(self, text):
        at = 0
        for declaration in filter(str.strip, text.split(",")):
            found = re.search(
                r"\.param\s+(.*?)\.(\w+)\s+(?:\.ptr.*?)?([\w$]+)(?:\[(\d+)\])?\s*$", declaration.strip(), re.S
            )
            kind, name, count = found[2], found[3], int(found[4] or 1)
            if kind not in SIZES:  # .ptr .global .align 1 name: the type stands before
                kind = re.search(r"\.(\w+)\s+\.ptr", declaration)[1]
            align = re.search(r"\.align\s+(\d+)\s+\.b8", declaration)
            align = int(align[1]) if align else SIZES[kind]
            at = -(-at // align) * align
            yield Parameter(name, at, SIZES[kind] * count)
            at += SIZES[kind] * count

    def _body(self):
        at, depth = self.entry.end(), 1
        while True:
            found = STATEMENT.match(self.text, at)
            brace, label, statement = found.groups()
            start, at = found.start(), found.end()
            if brace == "{":
                depth += 1
                self.scopes.append({})
                self.labels.append({})
            elif brace == "}":
                depth -= 1
                self._close_scope()
                if depth == 0:
                    return
            elif label:
                self.labels[-1][label] = len(self.raw)
            elif statement and statement.strip():
                start += len(found[0]) - len(found[0].lstrip())
                self._statement(" ".join(statement.split()), bisect.bisect(self.newlines, start) + 1)

    def _close_scope(self):
        labels = self.labels.pop()
        self.scopes.pop()
        waiting = []
        for number, label, depth in self.pending:
            if label in labels and depth > len(self.labels):
                self.raw[number] = self.raw[number]._replace(operands=(Target(labels[label]),))
            else:
                waiting.append((number, label, min(depth, len(self.labels))))
        self.pending = waiting

    def _resolve(self):
        if self.pending:
            raise PTXError(f"label {self.pending[0][1]} is not defined")
        return self.raw

    def _statement(self, text, line):
        if text.startswith(".reg"):
            self._declare(text)
            return
        if text.startswith("."):
            return
        full, guard = text, None
        if text[0] == "@":
            condition, text = text.split(None, 1)
            name = condition.lstrip("@!")
            guard = Guard(self._register(name, line).index, condition[1] == "!")
        opcode, _, rest = text.partition(" ")
        parts = tuple(opcode.split("."))
        if parts[0] == "bra":
            self.pending.append((len(self.raw), rest.strip(), len(self.labels)))
            operands = ()
        else:
            operands = tuple(self._operand(part, parts, line) for part in split(rest))
        self.raw.append(Instruction(parts, operands, guard, line, full))

    def _declare(self, text):
        _, kind, names = text.split(None, 2)
        bits = 1 if kind == ".pred" else int(kind[2:])
        for name in names.replace(" ", "").split(","):
            several = re.fullmatch(r"(%?\w+)<(\d+)>", name)
            for one in [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]:
                self.scopes[-1][one] = Register(len(self.bits), bits)
                self.bits.append(bits)
                self.names.append(one)

    def _register(self, name, line):
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise PTXError(f"line {line}: register {name} is not declared")

    def _operand(self, text, parts, line):
        if text[0] == "{":
            return Vector(tuple(self._operand(item, parts, line) for item in split(text[1:-1])))
        if text[0] == "[":
            return self._address(text, parts, line)
        if text[0] == "!":
            return Not(self._register(text[1:], line))
        if "|" in text:
            return Pair(*(self._operand(item, parts, line) for item in text.split("|")))
        if text == "_":
            return Sink()
        special = SPECIAL.match(text)
        if special:
            return Special(text[1:])
        if re.match(r"-?\d", text):
            return Immediate(immediate(text))
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text[0] == "%":
            raise PTXError(f"line {line}: register or special register {text} is not known")
        return Symbol(text)

    def _address(self, text, parts, line):
        inside = split(text[1:-1])
        if len(inside) > 1:
            descriptor, coordinates = (self._operand(item, parts, line) for item in inside)
            return TensorAddress(descriptor, coordinates.items)
        base, _, offset = inside[0].partition("+")
        return Address(self._operand(base.strip(), parts, line), int(offset.strip() or "0", 0))


def split(text: str) -> list[str]:
    """Parts between the commas that stand outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def immediate(text: str) -> int:
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return int(text[2:], 16)
    if re.fullmatch(r"-?\d+\.\d*(e-?\d+)?", text):
        return struct.unpack("<Q", struct.pack("<d", float(text)))[0]
    return int(text.rstrip("U"), 0)


def registers(operands):
    """The numbers of all registers in operands."""
    for operand in operands:
        if isinstance(operand, Register):
            yield operand.index
        elif isinstance(operand, (Vector, Pair, Not)):
            yield from registers(operand.items if isinstance(operand, Vector) else tuple(operand))
        elif isinstance(operand, Address):
            yield from registers((operand.base,))
        elif isinstance(operand, TensorAddress):
            yield from registers((operand.descriptor, *operand.coordinates))


def reconvergence(instructions: tuple[Instruction, ...]) -> dict[int, int]:
    """Of every conditional branch: the instruction where its ways meet again; the number of instructions: nowhere.

    That is the immediate postdominator of the branch's block, over sets of blocks as bits of an integer.
    """
    starts, after = blocks(instructions)
    last = len(starts) - 1
    everything = (1 << len(starts)) - 1
    behind = [everything] * last + [1 << last]
    changed = True
    while changed:
        changed = False
        for n in range(last - 1, -1, -1):
            bits = everything
            for successor in after[n]:
                bits &= behind[successor]
            bits |= 1 << n
            if bits != behind[n]:
                behind[n], changed = bits, True
    meet = {}
    for n in range(last):
        others = [k for k in range(len(starts)) if behind[n] >> k & 1 and k != n]
        nearest = max(others, key=lambda k: behind[k].bit_count(), default=last)
        meet[starts[n + 1] - 1] = starts[nearest]
    return meet


def blocks(instructions: tuple[Instruction, ...]) -> tuple[list[int], list[list[int]]]:
    """Where the basic blocks begin, the end of the kernel last; and of each block the numbers of its successors."""
    leaders = {0, len(instructions)}
    for i, ins in enumerate(instructions):
        if ins.parts[0] == "bra":
            leaders |= {ins.operands[0].index, i + 1}
        elif ins.parts[0] in ("ret", "exit"):
            leaders.add(i + 1)
    starts = sorted(leaders)
    number = {start: n for n, start in enumerate(starts)}
    last = len(starts) - 1
    return starts, [_successors(instructions[starts[n + 1] - 1], n, number, last) for n in range(last)]


def _successors(ins, n, number, last):
    ends = ins.parts[0] in ("ret", "exit")
    after = [number[ins.operands[0].index]] if ins.parts[0] == "bra" else [last] if ends else []
    if ins.guard is not None or not (ends or ins.parts[0] == "bra"):
        after.append(n + 1)
    return after
