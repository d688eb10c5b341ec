"""What the emulator counts, on accesses whose cost is known."""

import numpy as np
import pytest
from ptx_emulator.counters import parts
from ptx_emulator.launch import Program
from ptx_programs import COPY, EXCHANGE, PRODUCT, kernel, product_arguments

ACCESS = """
  ld.param.u64 %d1, [data];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, memory;
  mul.lo.s32 %r3, %r1, STEP;
  add.s32 %r4, %r2, %r3;
  mul.wide.u32 %d2, %r1, STEP;
  add.s64 %d3, %d1, %d2;
"""


@pytest.mark.parametrize("step, sectors", [(4, 4), (8, 8), (16, 16), (32, 32), (128, 32)])
def test_sectors(run_ptx, step, sectors):
    text = kernel(ACCESS.replace("STEP", str(step)) + "  ld.global.b32 %r5, [%d3];\n  ret;", ".u64 data")
    counted = run_ptx(text, aligned(4096), count=True)
    assert (counted.sectors, counted.least_sectors) == (sectors, 4)


def test_sectors_of_an_access_that_straddles_them(run_ptx):
    text = kernel(ACCESS.replace("STEP", "4") + "  ld.global.b32 %r5, [%d3+16];\n  ret;", ".u64 data")
    counted = run_ptx(text, aligned(4096), count=True)
    assert (counted.sectors, counted.least_sectors) == (5, 4)


@pytest.mark.parametrize("step, rounds", [(4, 1), (8, 2), (64, 16), (128, 32), (132, 1)])
def test_rounds_of_the_banks(run_ptx, step, rounds):
    text = kernel(ACCESS.replace("STEP", str(step)) + "  st.shared.b32 [%r4], %r1;\n  ret;", ".u64 data")
    counted = run_ptx(text, aligned(8192), shared=8192, count=True)
    assert (counted.rounds.sum(), counted.least_rounds.sum()) == (rounds, 1)


@pytest.mark.parametrize("step, rounds", [(16, 4), (32, 8), (144, 4), (128, 32)])
def test_rounds_of_wide_accesses(run_ptx, step, rounds):
    store = "  st.shared.v4.b32 [%r4], {%r1, %r1, %r1, %r1};\n  ret;"
    counted = run_ptx(
        kernel(ACCESS.replace("STEP", str(step)) + store, ".u64 data"), aligned(8192), shared=8192, count=True
    )
    assert (counted.rounds.sum(), counted.least_rounds.sum()) == (rounds, 4)


def test_lanes_that_read_one_word_share_a_round(run_ptx):
    text = kernel(
        ACCESS.replace("STEP", "0") + "  st.shared.b32 [%r2], %r2;\n  ld.shared.b32 %r5, [%r4];\n  ret;", ".u64 data"
    )
    counted = run_ptx(text, aligned(64), shared=64, count=True)
    assert (counted.rounds.sum(), counted.least_rounds.sum()) == (2, 2)


def test_instructions_by_warps(run_ptx):
    counted = run_ptx(EXCHANGE, np.zeros(96, np.int32), threads=96, shared=512, count=True)
    assert set(counted.executed) == {3}


def test_copies(run_ptx):
    counted = run_ptx(COPY, aligned(2048), aligned(2048), threads=64, shared=2048, count=True)
    assert counted.sectors == counted.least_sectors == 2 * 2048 // 32
    assert (counted.rounds == counted.least_rounds).all()


def test_products(run_ptx):
    counted = run_ptx(PRODUCT, *product_arguments().values, threads=128, shared=16392, count=True)
    assert counted.products == 2 * 64 * 8 * 64 and counted.tensor_copies == 2
    assert counted.divergences == 0


LOOP = """
  mov.u32 %r1, memory;
  mov.u32 %r2, 0;
  mov.u32 %f1, 0;
  st.shared.v4.b32 [%r1], {%r2, %r2, %r2, %r2};
  bar.sync 0;
again:
  ld.shared.v2.b32 {%f2, %f3}, [%r1];
  SUM
  add.s32 %r2, %r2, 1;
  setp.lt.s32 %p1, %r2, 3;
  @%p1 bra again;
  ret;
"""


@pytest.mark.parametrize(
    "line, count, inside",
    [
        ("fma.rn.f32 %f1, %f2, %f3, %f1;", 16, True),
        ("fma.rn.f32 %f1, %f2, %f3, %f1;", 15, False),
        ("fma.rn.f32 %f1, %f2, %f1, %f3;", 16, False),  # a polynomial
    ],
)
def test_a_loop_of_products_without_tensor_cores(run_ptx, line, count, inside):
    text = kernel(LOOP.replace("SUM", line * count), ".u64 data")
    counted = run_ptx(text, aligned(64), shared=64, count=True)
    main_loop, rest = parts(Program(text, None, 64), counted.rounds)
    assert (main_loop, rest) == ((6, 4) if inside else (0, 10))


def aligned(size):
    """An array of ``size`` bytes that begins where a sector does."""
    whole = np.zeros(size + 128, np.uint8)
    start = -whole.ctypes.data % 128
    return whole[start : start + size].view(np.int32)
