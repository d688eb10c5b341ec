"""Instructions that only compute, against Python's own numbers."""

import numpy as np
import pytest
import torch
from ptx_emulator.arithmetic import dtype, from_bfloat16, lookup, to_bfloat16
from ptx_emulator.ptx import PTXError

RANDOM = np.random.default_rng(0)
EDGES = [0, 1, 2, 31, 32, 63, 64, 127, 128, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def numbers(kind, count=200):
    """Edge cases and random bits of a PTX type of integers."""
    bits = int(kind[1:])
    drawn = [int(x) for x in RANDOM.integers(0, 2**63, count, dtype=np.uint64)]
    values = [x % 2**bits for x in EDGES + drawn]
    RANDOM.shuffle(values)
    return np.array(values, np.uint64).astype(dtype("u" + kind[1:])).view(dtype(kind))


def run(opcode, *arguments):
    parts = tuple(opcode.split("."))
    computation = lookup(parts, len(arguments) + 1)
    with np.errstate(all="ignore"):
        return computation.function(*arguments)


def wrap(value, kind):
    bits = int(kind[1:])
    value %= 2**bits
    return value - 2**bits if kind[0] == "s" and value >= 2 ** (bits - 1) else value


def truncated(x, y):
    quotient = abs(x) // abs(y)
    return -quotient if (x < 0) != (y < 0) else quotient


BINARY = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul.lo": lambda x, y: x * y,
    "min": min,
    "max": max,
    "div": truncated,
    "rem": lambda x, y: x - truncated(x, y) * y,
}


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize("name", BINARY)
def test_integers(name, kind):
    x, y = numbers(kind), numbers(kind)
    y = np.where(y == 0, y.dtype.type(3), y) if name in ("div", "rem") else y
    got = run(f"{name}.{kind}", x, y)
    want = [wrap(BINARY[name](a, b), kind) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert got.tolist() == want


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_high_halves_of_products(kind):
    x, y, z, bits = numbers(kind), numbers(kind), numbers(kind), int(kind[1:])
    want = [a * b >> bits for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert run(f"mul.hi.{kind}", x, y).tolist() == want
    added = [wrap(w + c, kind) for w, c in zip(want, z.tolist(), strict=True)]
    assert run(f"mad.hi.{kind}", x, y, z).tolist() == added


@pytest.mark.parametrize("kind", ["s32", "u32", "s16", "u16"])
def test_wide_products(kind):
    wide = kind[0] + str(2 * int(kind[1:]))
    x, y, z = numbers(kind), numbers(kind), numbers(wide)
    want = [a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert run(f"mul.wide.{kind}", x, y).tolist() == want
    added = [wrap(w + c, wide) for w, c in zip(want, z.tolist(), strict=True)]
    assert run(f"mad.wide.{kind}", x, y, z).tolist() == added


@pytest.mark.parametrize("kind", ["b32", "b64", "s32", "u32", "s64", "u64", "b16"])
def test_shifts(kind):
    bits, x = int(kind[1:]), numbers(kind)
    by = np.array([0, 1, bits - 1, bits, bits + 1, 200, 2**31] * 100, np.uint32)[: len(x)]
    pairs = list(zip(x.tolist(), by.tolist(), strict=True))
    if kind[0] == "b":
        assert run(f"shl.{kind}", x, by).tolist() == [(a << min(n, bits)) % 2**bits for a, n in pairs]
    assert run(f"shr.{kind}", x, by).tolist() == [a >> min(n, 64) for a, n in pairs]


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_fields(kind):
    bits, x = int(kind[1:]), numbers(kind)
    # Every start with every length; all ones show a bit from beyond the word, whatever is drawn.
    starts, lengths = [0, 1, 4, 14, bits - 1, bits, bits + 1, 40, 255], [0, 1, 3, 14, bits - 1, bits, 31, 7, 255, 2]
    start, length = (a.reshape(-1) for a in np.meshgrid(np.array(starts, np.uint32), np.array(lengths, np.uint32)))
    ones = np.full(start.size, -1 if kind[0] == "s" else 2**bits - 1, dtype(kind))
    x = np.concatenate([ones, x[: start.size]])
    start, length = np.tile(start, 2), np.tile(length, 2)

    def field(value, at, count):
        """As the manual of PTX has it, bit by bit."""
        unsigned, highest = value % 2**bits, bits - 1
        signed = kind[0] == "s" and count > 0
        sign = unsigned >> min(at + count - 1, highest) & 1 if signed else 0
        got = [unsigned >> at + i & 1 if i < count and at + i <= highest else sign for i in range(bits)]
        return wrap(sum(bit << i for i, bit in enumerate(got)), kind)

    want = [field(*one) for one in zip(x.tolist(), start.tolist(), length.tolist(), strict=True)]
    assert run(f"bfe.{kind}", x, start, length).tolist() == want


def test_insertion_permutation_and_counts():
    x, y = numbers("b32"), numbers("b32")
    start, length = (RANDOM.integers(0, n, len(x)).astype(np.uint32) for n in (32, 33))
    mask = [((1 << n) - 1 << s) % 2**32 for s, n in zip(start.tolist(), length.tolist(), strict=True)]
    want = [(b & ~m) | (a << s & m) for a, b, s, m in zip(x.tolist(), y.tolist(), start.tolist(), mask, strict=True)]
    assert run("bfi.b32", x, y, start, length).tolist() == want
    selector = numbers("b32") & np.uint32(0x7777)
    both = [(a | b << 32).to_bytes(8, "little") for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    picks = [
        int.from_bytes(bytes(b[c >> 4 * i & 7] for i in range(4)), "little")
        for b, c in zip(both, selector.tolist(), strict=True)
    ]
    assert run("prmt.b32", x, y, selector).tolist() == picks
    assert run("popc.b32", x).tolist() == [a.bit_count() for a in x.tolist()]
    assert run("clz.b32", x).tolist() == [32 - a.bit_length() for a in x.tolist()]
    assert run("brev.b32", x).tolist() == [int(f"{a:032b}"[::-1], 2) for a in x.tolist()]
    table = 0b11001010
    logic = run("lop3.b32", x, y, selector, np.uint32(table))
    assert logic.tolist() == ((x & y) | (~x & selector)).tolist()
    joined = [
        (a | b << 32) >> (s & 31) & 2**32 - 1 for a, b, s in zip(x.tolist(), y.tolist(), start.tolist(), strict=True)
    ]
    assert run("shf.r.wrap.b32", x, y, start).tolist() == joined


SPECIALS = np.array([0, -0.0, 1, -1, 0.5, 1.5, 2.5, -2.5, 3e9, -3e9, 1e20, np.inf, -np.inf, np.nan, 1e-40], np.float32)


def test_comparisons_with_nan():
    x, y = (a.reshape(-1) for a in np.meshgrid(SPECIALS, SPECIALS))
    unordered = np.isnan(x) | np.isnan(y)
    assert (run("setp.num.f32", x, y) == ~unordered).all() and (run("setp.nan.f32", x, y) == unordered).all()
    for name, compare in {"lt": x < y, "ge": x >= y, "eq": x == y}.items():
        assert (run(f"setp.{name}.f32", x, y) == compare).all()
        assert (run(f"setp.{name}u.f32", x, y) == (compare | unordered)).all()
    assert (run("setp.neu.f32", x, y) == ((x != y) | unordered)).all()
    assert (run("setp.ne.f32", x, y) == ((x != y) & ~unordered)).all()
    keep = RANDOM.random(len(x)) < 0.5
    assert (run("setp.lt.and.f32", x, y, keep) == ((x < y) & keep)).all()


def test_minimum_and_maximum_of_nan():
    x, y = np.float32([np.nan, 1, np.nan]), np.float32([2, np.nan, np.nan])
    assert np.array_equal(run("max.f32", x, y), np.float32([2, 1, np.nan]), equal_nan=True)
    assert np.isnan(run("max.NaN.f32", x, y)).all()


def test_conversions_to_integers():
    assert run("cvt.rzi.s32.f32", SPECIALS[:9]).tolist() == [0, 0, 1, -1, 0, 1, 2, -2, 2**31 - 1]
    assert run("cvt.rni.s32.f32", SPECIALS[4:8]).tolist() == [0, 2, 2, -2]
    assert run("cvt.rmi.s32.f32", SPECIALS[4:8]).tolist() == [0, 1, 2, -3]
    assert run("cvt.rzi.u32.f32", SPECIALS[[3, 8, 10, 11, 12, 13]]).tolist() == [
        0,
        3000000000,
        2**32 - 1,
        2**32 - 1,
        0,
        0,
    ]
    assert run("cvt.rzi.s64.f32", SPECIALS[[10, 11, 12]]).tolist() == [2**63 - 1, 2**63 - 1, -(2**63)]
    assert run("cvt.s8.s32", np.int32([200, -200, 5])).tolist() == [-56, 56, 5]
    assert run("cvt.sat.s8.s32", np.int32([200, -200, 5])).tolist() == [127, -128, 5]


def test_bfloat16_is_rounded_as_torch_rounds():
    bits = RANDOM.integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32)
    x = np.concatenate((bits.view(np.float32), SPECIALS, np.float32([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38])))
    want = torch.from_numpy(x).bfloat16().float().numpy()
    assert np.array_equal(from_bfloat16(to_bfloat16(x)), want, equal_nan=True)
    packed = run("cvt.rn.bf16x2.f32", x, x[::-1].copy())
    assert np.array_equal(from_bfloat16((packed >> np.uint32(16)).astype(np.uint16)), want, equal_nan=True)
    assert np.array_equal(from_bfloat16(packed.astype(np.uint16)), want[::-1], equal_nan=True)


@pytest.mark.parametrize("kind, of_torch", [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)])
def test_arithmetic_of_pairs(kind, of_torch):
    x, y, z = (torch.from_numpy(RANDOM.standard_normal(400)).to(of_torch) for _ in range(3))

    def packed(t):
        return t.view(torch.int16).numpy().view(np.uint32)

    got = run(f"fma.rn.{kind}", packed(x), packed(y), packed(z)).view(np.int16)
    assert torch.equal(torch.from_numpy(got.copy()).view(of_torch), (x.double() * y.double() + z.double()).to(of_torch))
    got = run(f"max.{kind}", packed(x), packed(y)).view(np.int16)
    assert torch.equal(torch.from_numpy(got.copy()).view(of_torch), torch.maximum(x, y))


def test_a_fused_sum_is_rounded_once():
    x = np.float32([1 + 2**-12]), np.float32([1 + 2**-12]), np.float32([-1 - 2**-11])
    assert run("fma.rn.f32", *x).tolist() == [2.0**-24]
    assert (x[0] * x[1] + x[2]).tolist() == [0.0]


@pytest.mark.parametrize("opcode", ["cvt.rz.bf16.f32", "cvt.rna.tf32.f32", "prmt.b32.f4e", "fma.rn.relu.f16"])
def test_what_is_not_known_is_refused(opcode):
    with pytest.raises(PTXError):
        lookup(tuple(opcode.split(".")), 2)
