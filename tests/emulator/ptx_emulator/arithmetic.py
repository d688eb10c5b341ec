"""Instructions that only compute: from registers to registers, a lane at a time.

`lookup` gives, of an opcode, a function of numpy arrays and the types of its sources and results. Arrays are never
changed in place. Not modelled: ``.ftz`` (denormals are kept) and the last bits of ``.approx``; a float32 fma rounds
its float64 sum, a float64 one rounds twice.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .ptx import PTXError


class Computation(NamedTuple):
    function: Callable
    sources: tuple[str, ...]
    results: tuple[str, ...]


UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
RAW = {"bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32}
TABLE = {}


def dtype(kind: str) -> type:
    """The numpy type of a PTX type; packed and bfloat16 values as their bits."""
    if kind == "pred":
        return np.bool_
    if kind in RAW:
        return RAW[kind]
    return {"f": FLOAT, "s": SIGNED, "u": UNSIGNED, "b": UNSIGNED}[kind[0]][int(kind[1:])]


def lookup(parts: tuple[str, ...], num_operands: int) -> Computation | None:
    """The computation of an opcode, None when it is none of these."""
    build = TABLE.get(parts[0])
    return build(parts, num_operands) if build else None


def computes(*names):
    def register(build):
        TABLE.update(dict.fromkeys(names, build))
        return build

    return register


# --- half precision ---------------------------------------------------------------------------------------------------


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def widen(bits, kind):
    """float32 of 16-bit patterns of ``kind``, f16 or bf16."""
    return from_bfloat16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def narrow(x, kind):
    return to_bfloat16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


def halves(packed):
    return packed.astype(np.uint16), (packed >> np.uint32(16)).astype(np.uint16)


def pack(low, high):
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def in_float32(function, kind):
    """``function`` of float32, for a half-precision ``kind`` or pairs of it: exact for one operation, then rounded."""
    if kind == "f16":
        return lambda *xs: function(*(x.astype(np.float32) for x in xs)).astype(np.float16)
    if kind == "bf16":
        return lambda *xs: to_bfloat16(function(*(from_bfloat16(x) for x in xs)))
    one = kind[:-2]

    def both(*xs):
        low, high = zip(*(halves(x) for x in xs), strict=True)
        return pack(*(narrow(function(*(widen(x, one) for x in half)), one) for half in (low, high)))

    return both


# --- arithmetic -------------------------------------------------------------------------------------------------------


def truncated_quotient(x, y):
    """Of integers; by zero all ones."""
    if x.dtype.kind == "u":
        return np.where(y == 0, ~x.dtype.type(0), x // np.where(y == 0, x.dtype.type(1), y))
    divisor = np.where(y == 0, x.dtype.type(1), y)
    quotient = x // divisor
    inexact = quotient * divisor != x
    quotient = quotient + (inexact & ((x < 0) != (divisor < 0))).astype(x.dtype)
    return np.where(y == 0, x.dtype.type(-1), quotient)


def remainder(x, y):
    return np.where(y == 0, x, x - truncated_quotient(x, y) * y)


def fused(x, y, z):
    return (x.astype(np.float64) * y + z).astype(x.dtype)


def high_product(x, y):
    if x.dtype.itemsize == 8:
        return _high_product_64(x, y)
    wide = np.int64 if x.dtype.kind == "i" else np.uint64
    bits = wide(8 * x.dtype.itemsize)
    return ((x.astype(wide) * y.astype(wide)) >> bits).astype(x.dtype)


def _high_product_64(x, y):
    signed = x.dtype.kind == "i"
    a, b = x.astype(np.uint64), y.astype(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> shift, b & low, b >> shift
    middle = a1 * b0 + ((a0 * b0) >> shift)
    other = (middle & low) + a0 * b1
    high = a1 * b1 + (middle >> shift) + (other >> shift)
    if signed:
        high = high - np.where(x < 0, b, np.uint64(0)) - np.where(y < 0, a, np.uint64(0))
    return high.astype(x.dtype)


FLOAT_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
}
INTEGER_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": truncated_quotient,
    "rem": remainder,
    "min": np.minimum,
    "max": np.maximum,
}


def is_float(kind):
    return kind[0] == "f" or kind in RAW


def saturated(function):
    return lambda *xs: np.clip(np.nan_to_num(function(*xs)), 0, 1)


@computes("add", "sub", "mul", "div", "rem", "min", "max")
def binary(parts, num_operands):
    name, kind = parts[0], parts[-1]
    if is_float(kind):
        function = FLOAT_BINARY[name]
        if "NaN" in parts:
            function = {"min": np.minimum, "max": np.maximum}[name]
        if "sat" in parts:
            function = saturated(function)
        if kind in RAW or kind == "f16":
            function = in_float32(function, kind)
        return Computation(function, (kind, kind), (kind,))
    if "wide" in parts:
        wide = kind[0] + str(2 * int(kind[1:]))
        to = dtype(wide)
        return Computation(lambda x, y: x.astype(to) * y.astype(to), (kind, kind), (wide,))
    function = high_product if name == "mul" and "hi" in parts else INTEGER_BINARY[name]
    return Computation(function, (kind, kind), (kind,))


@computes("mad", "fma")
def multiply_add(parts, num_operands):
    kind = parts[-1]
    if is_float(kind):
        function = saturated(fused) if "sat" in parts else fused
        if kind in RAW or kind == "f16":
            function = in_float32(function, kind)
        if "relu" in parts:
            raise PTXError("fma.relu is not known")
        return Computation(function, (kind,) * 3, (kind,))
    if "wide" in parts:
        wide = kind[0] + str(2 * int(kind[1:]))
        to = dtype(wide)
        return Computation(lambda x, y, z: x.astype(to) * y.astype(to) + z, (kind, kind, wide), (wide,))
    if "hi" in parts:
        return Computation(lambda x, y, z: high_product(x, y) + z, (kind,) * 3, (kind,))
    return Computation(lambda x, y, z: x * y + z, (kind,) * 3, (kind,))


UNARY = {
    "abs": np.abs,
    "neg": np.negative,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


@computes(*UNARY)
def unary(parts, num_operands):
    kind, function = parts[-1], UNARY[parts[0]]
    if kind in RAW or kind == "f16":
        function = in_float32(function, kind)
    return Computation(function, (kind,), (kind,))


@computes("copysign")
def copy_sign(parts, num_operands):
    return Computation(lambda sign, x: np.copysign(x, sign), (parts[-1],) * 2, (parts[-1],))


# --- bits -------------------------------------------------------------------------------------------------------------


@computes("and", "or", "xor", "not", "cnot")
def logic(parts, num_operands):
    kind = parts[-1]
    if parts[0] == "not":
        return Computation(np.invert, (kind,), (kind,))
    if parts[0] == "cnot":
        return Computation(lambda x: (x == 0).astype(x.dtype), (kind,), (kind,))
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[parts[0]]
    return Computation(function, (kind, kind), (kind,))


@computes("shl", "shr")
def shift(parts, num_operands):
    kind = parts[-1]
    bits = int(kind[1:])
    apply = np.left_shift if parts[0] == "shl" else np.right_shift
    arithmetic = parts[0] == "shr" and kind[0] == "s"

    def function(x, by):
        within = apply(x, np.minimum(by, bits - 1).astype(x.dtype))
        return within if arithmetic else np.where(by >= bits, x.dtype.type(0), within)

    return Computation(function, (kind, "u32"), (kind,))


@computes("shf")
def funnel_shift(parts, num_operands):
    def function(low, high, by):
        by = by & np.uint32(31) if "wrap" in parts else np.minimum(by, np.uint32(32))
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        if parts[1] == "r":
            return (both >> by.astype(np.uint64)).astype(np.uint32)
        return ((both << by.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)

    return Computation(function, ("u32",) * 3, ("u32",))


@computes("lop3")
def logic_of_three(parts, num_operands):
    def function(a, b, c, table):
        result = np.zeros_like(a)
        for i in range(8):
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result = result | np.where((table >> np.uint32(i)) & np.uint32(1) == 1, term, np.uint32(0))
        return result

    return Computation(function, ("u32",) * 4, ("u32",))


@computes("bfe")
def extract_field(parts, num_operands):
    kind = parts[-1]
    bits = int(kind[1:])

    def function(x, start, length):
        start, length = (v.astype(np.int64) & 255 for v in (start, length))
        # Bits beyond the word are zeros, or copies of the sign: a shift of the widened value gives both.
        wide = x.astype(np.int64) if kind[0] == "s" or bits == 32 else x
        field = (wide >> np.minimum(start, 63).astype(wide.dtype)).astype(np.int64)
        if kind == "u64":  # no wider word to shift
            field = np.where(start >= bits, 0, field)
        short = np.minimum(length, 63)
        value = np.where(length >= 64, field, field & ((np.int64(1) << short) - 1))
        if kind[0] == "s":
            top = np.clip(np.minimum(start + length - 1, bits - 1), 0, 63)
            negative = (length > 0) & ((x.astype(np.int64) >> top) & 1 == 1)
            value = np.where(negative & (length < 64), value | ~((np.int64(1) << short) - 1), value)
            value = np.where(length == 0, 0, value)
        return value.astype(dtype(kind))

    return Computation(function, (kind, "u32", "u32"), (kind,))


@computes("bfi")
def insert_field(parts, num_operands):
    kind = parts[-1]

    def function(field, into, start, length):
        start, length = np.minimum(start & 255, 63), np.minimum(length & 255, 63)
        mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << start.astype(np.uint64)
        shifted = field.astype(np.uint64) << start.astype(np.uint64)
        return ((into.astype(np.uint64) & ~mask) | (shifted & mask)).astype(dtype(kind))

    return Computation(function, (kind, kind, "u32", "u32"), (kind,))


@computes("prmt")
def permute_bytes(parts, num_operands):
    if len(parts) > 2:
        raise PTXError(f"{'.'.join(parts)}: only the generic form is known")

    def function(a, b, selector):
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.uint64(0)
        for i in range(4):
            choice = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte >> np.uint64(7) == 1, np.uint64(255), np.uint64(0))
            byte = np.where(choice >= 8, sign, byte)
            result = result | (byte << np.uint64(8 * i))
        return result.astype(np.uint32)

    return Computation(function, ("u32",) * 3, ("u32",))


@computes("popc", "clz", "brev")
def count_bits(parts, num_operands):
    bits = int(parts[-1][1:])

    def clz(x):
        wide = x.astype(np.uint64)
        found = np.zeros(x.shape, np.uint32)
        for step in (32, 16, 8, 4, 2, 1):
            above = wide >> np.uint64(step)
            found = np.where(above != 0, found + np.uint32(step), found)
            wide = np.where(above != 0, above, wide)
        return (np.uint32(bits - 1) - found + (wide == 0)).astype(np.uint32)

    def brev(x):
        result = np.zeros_like(x)
        for i in range(bits):
            result = result | (((x >> x.dtype.type(i)) & x.dtype.type(1)) << x.dtype.type(bits - 1 - i))
        return result

    function = {"popc": lambda x: np.bitwise_count(x).astype(np.uint32), "clz": clz, "brev": brev}[parts[0]]
    return Computation(function, (parts[-1],), (parts[-1] if parts[0] == "brev" else "u32",))


# --- choice -----------------------------------------------------------------------------------------------------------

COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(name, kind):
    half = kind in ("f16", "bf16")
    if kind == "bf16":
        return lambda x, y: comparison(name, "f32")(from_bfloat16(x), from_bfloat16(y))
    if kind[0] != "f" and not half:
        return COMPARE[name]
    if name in ("num", "nan"):
        unordered = name == "nan"
        return lambda x, y: (np.isnan(x) | np.isnan(y)) == unordered
    if name.endswith("u") and name[:-1] in COMPARE:
        ordered = COMPARE[name[:-1]]
        return lambda x, y: ordered(x, y) | np.isnan(x) | np.isnan(y)
    if name == "ne":
        return lambda x, y: (x != y) & ~np.isnan(x) & ~np.isnan(y)
    return COMPARE[name]


@computes("setp", "set")
def compare(parts, num_operands):
    kind = parts[-1]
    function = comparison(parts[1], kind)
    if parts[0] == "set":
        to = parts[-2]
        one = np.float32(1) if to == "f32" else np.uint32(0xFFFFFFFF)
        return Computation(lambda x, y: np.where(function(x, y), one, one.dtype.type(0)), (kind, kind), (to,))
    combine = next((COMBINE[part] for part in parts[2:-1] if part in COMBINE), None)
    if combine is None:
        return Computation(function, (kind, kind), ("pred",))
    return Computation(lambda x, y, p: combine(function(x, y), p), (kind, kind, "pred"), ("pred",))


@computes("selp")
def select(parts, num_operands):
    kind = parts[-1]
    return Computation(lambda x, y, p: np.where(p, x, y), (kind, kind, "pred"), (kind,))


@computes("slct")
def select_by_sign(parts, num_operands):
    kind, by = parts[-2:]
    return Computation(lambda x, y, c: np.where(c >= 0, x, y), (kind, kind, by), (kind,))


# --- conversion -------------------------------------------------------------------------------------------------------


@computes("cvta")
def to_generic(parts, num_operands):
    # Generic addresses of every space are those of the space.
    return Computation(lambda x: x, ("u64",), ("u64",))


ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def float_to_integer(x, to, rounding):
    """NaN becomes 0, and what is too large or too small the nearest that ``to`` holds."""
    x = ROUND[rounding](x.astype(np.float64))
    x = np.where(np.isnan(x), 0.0, x)
    limits = np.iinfo(to)
    # float(max) of 64 bits is one too large to convert.
    too_large = x >= float(limits.max)
    return np.where(too_large, limits.max, np.where(too_large, 0, np.maximum(x, float(limits.min))).astype(to))


@computes("cvt")
def convert(parts, num_operands):
    to, kind = parts[-2:]
    halves = to in ("bf16", "f16", "bf16x2", "f16x2")
    if halves and any(part in parts for part in ("rz", "rm", "rp")):
        raise PTXError(f"{'.'.join(parts)}: to 16 bits only rounding to nearest is known")
    if "pack" in parts or not re.fullmatch(r"(bf16|f16)(x2)?|[fsu](8|16|32|64)", to):
        raise PTXError(f"{'.'.join(parts)} is not known")
    if to in ("bf16x2", "f16x2"):
        one = to[:-2]
        limit = (lambda x: np.maximum(x, 0)) if "relu" in parts else (lambda x: x)
        return Computation(
            lambda high, low: pack(narrow(limit(low), one), narrow(limit(high), one)), ("f32",) * 2, (to,)
        )
    if "relu" in parts:
        raise PTXError(f"{'.'.join(parts)} is not known")
    if kind == "bf16" or to == "bf16":
        first = (lambda x: from_bfloat16(x)) if kind == "bf16" else (lambda x: x.astype(np.float32))
        then = to_bfloat16 if to == "bf16" else (lambda x: x.astype(dtype(to)))
        return Computation(lambda x: then(first(x)), (kind,), (to,))
    target = dtype(to)
    rounding = next((part for part in parts if part in ROUND), None)
    if kind[0] == "f" and to[0] != "f":
        return Computation(lambda x: float_to_integer(x, target, rounding), (kind,), (to,))
    if rounding:
        return Computation(lambda x: ROUND[rounding](x).astype(target), (kind,), (to,))
    if "sat" in parts and to[0] != "f":
        limits = np.iinfo(target)
        return Computation(lambda x: np.clip(x.astype(np.int64), limits.min, limits.max).astype(target), (kind,), (to,))
    return Computation(lambda x: x.astype(target), (kind,), (to,))
