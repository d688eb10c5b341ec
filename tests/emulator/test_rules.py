"""What the emulator must not let pass: programs that are right, and the same with one rule broken."""

import numpy as np
import pytest
from ptx_emulator.ptx import PTXError
from ptx_programs import COPY, EXCHANGE, PIPELINE, PRODUCT, changed, kernel, product_arguments, without

SEEDS = (None, 0, 1, 2, 3)


def breaks(run, message):
    with pytest.raises(PTXError, match=message):
        run()


# --- barriers and order -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_exchange(run_ptx, seed, warps):
    out = np.zeros(32 * warps, np.int32)
    run_ptx(EXCHANGE, out, threads=32 * warps, shared=512, seed=seed)
    assert (out == (np.arange(32 * warps) + 32) % (32 * warps)).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("barrier", ["bar.sync 0;\n  add", "bar.sync 0; // second"])
def test_a_barrier_that_is_missing(run_ptx, seed, barrier):
    broken = changed(EXCHANGE, barrier, barrier.replace("bar.sync 0;", ""))
    out = np.zeros(128, np.int32)
    breaks(lambda: run_ptx(broken, out, threads=128, shared=512, seed=seed), "race on shared memory|uninitialised")


def test_a_barrier_of_too_few_warps(run_ptx):
    broken = changed(EXCHANGE, "bar.sync 0;\n  add", "bar.sync 0, 64;\n  add")
    breaks(lambda: run_ptx(broken, np.zeros(128, np.int32), threads=128, shared=512, seed=1), "race|more came|uninit")


def test_a_warp_that_ends_before_a_barrier(run_ptx):
    broken = changed(EXCHANGE, "bar.sync 0; // second", "setp.ge.u32 %p1, %r1, 96;\n  @%p1 ret;\n  bar.sync 0;")
    out = np.zeros(128, np.int32)
    breaks(
        lambda: run_ptx(broken, out, threads=128, shared=512),
        r"deadlock in kernel: block 0 warp 0.*bar.sync 0; 1 warps",
    )


def test_a_barrier_in_part_of_a_warp(run_ptx):
    broken = changed(EXCHANGE, "bar.sync 0; // second", "setp.ge.u32 %p1, %r1, 16;\n  @%p1 bar.sync 0;")
    breaks(lambda: run_ptx(broken, np.zeros(32, np.int32), shared=512), "only some lanes are active")


@pytest.mark.parametrize("seed", SEEDS)
def test_pipeline(run_ptx, seed):
    """A producer and a consumer that never meet at a barrier: each warp has a stack of its own."""
    out = np.zeros(96, np.int32)
    run_ptx(PIPELINE, out, threads=64, shared=2048, seed=seed)
    assert (out.reshape(3, 32) == 100 * np.arange(3)[:, None] + np.arange(32)[::-1]).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "before, after, message",
    [
        ("bar.sync 0; // after init", "", "used without order after its mbarrier.init|no mbarrier at"),
        ("add.s32 %r6, %r5, 1; // parity", "mov.u32 %r6, %r5;", "deadlock in kernel: .*mbarriers 0x408"),
        (
            "and.b32 %r6, %r5, 1;\nfull",
            "add.s32 %r6, %r5, 1;\n  and.b32 %r6, %r6, 1;\nfull",
            "race on shared|uninit|deadlock",
        ),
        ("mbarrier.arrive.shared::cta.b64 _, [%r10]; // filled", "", r"deadlock.*\(phase 0: 32 arrivals and 0 bytes"),
        ("[%r11], 32;", "[%r11], 33;", "deadlock in kernel"),
        ("[%r10], 32;", "[%r10], 16;", "race on shared|more arrivals|deadlock|uninit"),
        ("@!%p3 bra empty;", "", "race on shared memory|deadlock"),
    ],
)
def test_a_pipeline_that_is_wrong(run_ptx, seed, before, after, message):
    broken = changed(PIPELINE, before, after)
    breaks(lambda: run_ptx(broken, np.zeros(96, np.int32), threads=64, shared=2048, seed=seed), message)


# --- global memory ----------------------------------------------------------------------------------------------------

STORE = kernel(
    """
  ld.param.u64 %d1, [out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mad.lo.s32 %r4, %r2, %r3, %r1;
  mul.wide.s32 %d2, %r4, 4;
  add.s64 %d3, %d1, %d2;
  st.global.b32 [%d3], %r4;
  bar.sync 0;
  ld.global.b32 %r5, [%d3];
  ret;
""",
    ".u64 out",
)


def test_blocks_store_apart(run_ptx):
    out = np.zeros(256, np.int32)
    run_ptx(STORE, out, grid=(4,), threads=64)
    assert (out == np.arange(256)).all()


@pytest.mark.parametrize(
    "before, after, message",
    [
        ("st.global.b32 [%d3]", "st.global.b32 [%d3+4]", "outside of every allocation: 4 .* 0 bytes past the end"),
        ("st.global.b32 [%d3]", "st.global.b32 [%d3+-4]", "outside of every allocation"),
        ("st.global.b32 [%d3]", "st.global.b32 [%d3+2]", "misaligned: 4 bytes of global memory"),
        ("mad.lo.s32 %r4, %r2, %r3, %r1", "mov.b32 %r4, %r1", "race on global memory: block . warp . (writes|reads)"),
        ("ld.global.b32 %r5, [%d3]", "ld.global.b32 %r5, [%d1]", "race on global memory: .* reads element 0"),
        ("bar.sync 0;\n  ld.global.b32 %r5, [%d3]", "shr.u32 %r6, %r4, 6;\n shl.b32 %r6, %r6, 6;\n mul.wide.s32 %d4, "
         "%r6, 4;\n add.s64 %d4, %d1, %d4;\n ld.global.b32 %r5, [%d4]", "race on global memory: block . warp 1 reads"),
    ],
)  # fmt: skip
def test_stores_that_are_wrong(run_ptx, before, after, message):
    out = np.zeros(256, np.int32)
    breaks(lambda: run_ptx(changed(STORE, before, after), out, grid=(4,), threads=64), message)


def test_an_address_that_is_poison(run_ptx):
    """A register of which only some lanes were written holds poison in the others, which no allocation contains."""
    broken = changed(STORE, "mad.lo.s32 %r4", "setp.lt.u32 %p1, %r1, 5;\n  @%p1 mad.lo.s32 %r4")
    breaks(lambda: run_ptx(broken, np.zeros(256, np.int32), grid=(4,), threads=64), "outside of every allocation")


def test_a_register_that_nobody_wrote(run_ptx):
    broken = changed(STORE, "mov.u32 %r1, %tid.x;", "")
    breaks(lambda: run_ptx(broken, np.zeros(256, np.int32), threads=64), "uninitialised: nothing wrote register %r1")


# Every warp of every block reads what the first warp of one block then writes.
READ_THEN_WRITE = kernel(
    """
  ld.param.u64 %d1, [out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  and.b32 %r3, %r1, 31;
  mul.wide.u32 %d2, %r3, 4;
  add.s64 %d3, %d1, %d2;
  setp.lt.u32 %p1, %r1, 32;
  setp.eq.u32 %p2, %r2, 1;
  and.pred %p3, %p1, %p2;
  ld.global.b32 %r4, [%d3];
  bar.sync 0;
  @%p1 ld.global.b32 %r4, [%d3]; // again
  add.s32 %r5, %r4, 1;
  @%p3 st.global.b32 [%d3], %r5;
  ret;
""",
    ".u64 out",
)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_warp_reads_what_another_one_then_writes(run_ptx, seed):
    alone = changed(READ_THEN_WRITE, "setp.eq.u32 %p2, %r2, 1;", "setp.eq.u32 %p2, %r2, 0;")
    out = np.zeros(32, np.int32)
    run_ptx(alone, out, threads=128, seed=seed)
    assert (out == 1).all()
    breaks(
        lambda: run_ptx(without(alone, "bar.sync 0;"), out, threads=128, seed=seed),
        "race on global memory: block 0 warp 0 writes element . of argument 0, which block 0 warp [123] read",
    )


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("writer", [0, 1])
def test_a_block_reads_what_another_one_then_writes(run_ptx, writer, again):
    text = changed(READ_THEN_WRITE, "setp.eq.u32 %p2, %r2, 1;", f"setp.eq.u32 %p2, %r2, {writer};")
    text = text if again else without(text, "// again")
    breaks(lambda: run_ptx(text, np.zeros(32, np.int32), grid=(2,), threads=64), "race on global memory")


# --- shared memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before, after, message",
    [
        ("st.shared.b32 [%r4], %r1", "st.shared.b32 [%r4+2], %r1", "misaligned: 4 bytes of shared memory"),
        ("st.shared.b32 [%r4], %r1", "st.shared.b32 [%r4+512], %r1", "outside of shared memory"),
        ("st.shared.b32 [%r4], %r1;", "", "uninitialised: nobody wrote the shared memory"),
        ("[%r4], %r7; // again", "[%r2], %r1;", "race on shared memory: two warps store different values"),
    ],
)
def test_shared_memory_that_is_wrong(run_ptx, before, after, message):
    broken = changed(EXCHANGE, before, after)
    breaks(lambda: run_ptx(broken, np.zeros(128, np.int32), threads=128, shared=512), message)


# --- asynchronous copies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_copy(run_ptx, seed):
    values, out = np.arange(512, dtype=np.int32), np.zeros(512, np.int32)
    run_ptx(COPY, values, out, threads=64, shared=2048, seed=seed)
    assert (out == values).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "before, after, message",
    [
        ("cp.async.wait_group 0;", "", "in flight: reads shared memory"),
        ("cp.async.wait_group 0;", "cp.async.wait_group 1;", "in flight: reads shared memory at 0x[46]00"),
        ("bar.sync 0;", "", "race on shared memory|in flight|uninitialised"),
        ("cp.async.commit_group; // second", "", "in flight: reads|ends while its cp.async"),
        ("[%d4+1024], 16, 16;", "[%d4+1032], 16, 16;", "misaligned: cp.async"),
        ("[%d4+1024], 16, 16;", "[%d4+1040], 16, 16;", "outside of every allocation"),
        ("[%r4+1024], [%d4+1024]", "[%r4+1008], [%d4+1024]", "in flight: writes|race on shared"),
        (
            "cp.async.wait_group 0;\n  bar",
            "st.shared.b32 [%r4], %r1;\n  cp.async.wait_group 0;\n  bar",
            "in flight: writes",
        ),
    ],
)
def test_copies_that_are_wrong(run_ptx, seed, before, after, message):
    values, out = np.arange(512, dtype=np.int32), np.zeros(512, np.int32)
    broken = changed(COPY, before, after)
    breaks(lambda: run_ptx(broken, values, out, threads=64, shared=2048, seed=seed), message)


# --- tensor copies and wgmma ------------------------------------------------------------------------------------------


def product(run_ptx, text, seed=None):
    case = product_arguments()
    run_ptx(text, *case.values, threads=128, shared=16392, seed=seed)
    return case.values[-1], case.want


@pytest.mark.parametrize("seed", SEEDS)
def test_product(run_ptx, seed):
    out, want = product(run_ptx, PRODUCT, seed)
    assert (out == want).all()


COPY_OF_THE_RIGHT = next(line for line in PRODUCT.split("\n") if "[%r3], [%d3" in line)


def right_in_rows(target: str) -> str:
    """PRODUCT, whose right operand comes in eight boxes of a row; target: of row {i} in shared memory."""
    copies = []
    for i in range(8):
        copy = COPY_OF_THE_RIGHT.replace("{%r5, %r5}", "{%r5, %r41}").replace("[%r3]", f"[{target.format(at=128 * i)}]")
        copies.append(f"  mov.u32 %r41, {i};\n{copy}")
    return changed(PRODUCT, COPY_OF_THE_RIGHT, "\n".join(copies))


def rows_of_the_right():
    left, right, out = product_arguments().values
    rows = right._replace(box=(1, 64))
    rows.owner = right.owner
    return left, rows, out


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_that_begin_within_the_swizzle(run_ptx, seed):
    """The permutation of 16-byte chunks follows bits 7 to 9 of the address, wherever a box begins."""
    values, want = rows_of_the_right(), product_arguments().want
    run_ptx(right_in_rows("%r3+{at}"), *values, threads=128, shared=16392, seed=seed)
    assert (values[-1] == want).all()
    shifted = right_in_rows("%r3+{at}").replace("[%r3+896]", "[%r3+768]")
    breaks(lambda: run_ptx(shifted, *values, threads=128, shared=16392, seed=seed), "in flight: writes")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_record_of_numbers_and_tensor_maps(run_ptx, seed):
    """Maps within one parameter, addressed from its beginning."""
    left, right, out = product_arguments().values
    text = changed(
        PRODUCT, ".param .align 64 .b8 left[128], .param .align 64 .b8 right[128]", ".param .align 64 .b8 maps[320]"
    )
    text = changed(text, "mov.b64 %d2, left;", "mov.b64 %d2, maps;\n  add.s64 %d2, %d2, 64;")
    text = changed(text, "mov.b64 %d3, right;", "mov.b64 %d3, maps;\n  add.s64 %d3, %d3, 192;")
    from ptx_emulator.launch import GlobalMemory, Launch, Program

    memory = GlobalMemory()
    memory.add(out.ctypes.data, out.nbytes, out.itemsize, "out")
    for one in (left, right):
        memory.add(one.address, one.owner.nbytes, one.itemsize, "tensor")

    def run(*record):
        Launch(Program(text, None, 16392), memory, (1,), 128, [record, out.ctypes.data], seed).run()

    run(bytes(64), left, right)
    assert (out == product_arguments().want).all()
    with pytest.raises(ValueError, match="a tensor map: expected a multiple of 64, got byte 32"):
        run(bytes(32), left, right)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "before, after, message",
    [
        ("@!%p2 bra again;", "", "in flight: reads|uninitialised"),
        ("[%r4], 0;\n", "[%r4], 1;\n", "in flight: reads shared memory|uninitialised"),
        ("[%r4], 9216;", "[%r4], 8192;", "in flight: reads|race on shared memory: .* an asynchronous copy wrote"),
        ("[%r4], 9216;", "[%r4], 9232;", "deadlock.*16 bytes to come"),
        ("mbarrier.init.shared::cta.b64 [%r4], 1;", "mbarrier.init.shared::cta.b64 [%r4], 2;", "deadlock.*1 arrivals"),
        ("bar.sync 0; // after init", "", "used without order after its mbarrier.init|no mbarrier at"),
        ("  wgmma.fence.sync.aligned;", "", "missing wgmma.fence"),
        ("wgmma.wait_group.sync.aligned 0;", "", "too early: %f0, %f1 belong to a wgmma in flight"),
        ("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;", "too early: %f0, %f1 belong"),
        ("  wgmma.commit_group.sync.aligned;", "", "too early"),
        ("wgmma.commit", "mov.f32 %f3, %f4;\n  wgmma.commit", "uninit|too early"),
        ("wgmma.wait", "st.shared.b32 [%r2], %r5;\n  wgmma.wait", "still reads|race on shared"),
        ("  wgmma.fence.sync.aligned;", "  wgmma.fence.sync.aligned;\n  add.f32 %f2, %f2, %f2;", "missing wgmma.fence"),
        ("add.s32 %r3, %r2, 8192;", "add.s32 %r3, %r2, 8256;", "misaligned: a tensor copy"),
        ("add.s32 %r3, %r2, 8192;", "add.s32 %r3, %r2, 8704;", "misaligned: a wgmma operand at 0x2200, within the 128"),
        ("add.s32 %r3, %r2, 8192;", "add.s32 %r3, %r2, 7168;", "in flight: writes"),
        ("mov.b64 %d3, right;", "mov.b64 %d3, out;", "through something that is no tensor map"),
        ("bar.sync 0; // before the end\n", "", "race: mbarrier 0x4000 is invalidated while warp [123] may use it"),
        ("bar.sync 0; // before the end\n  @%p1 mbarrier.inval.shared::cta.b64 [%r4];",
         "mov.b64 %d20, 0;\n  @%p1 mbarrier.inval.shared::cta.b64 [%r4+8];", "misaligned|outside of shared"),
    ],
)  # fmt: skip
def test_products_that_are_wrong(run_ptx, seed, before, after, message):
    breaks(lambda: product(run_ptx, changed(PRODUCT, before, after), seed), message)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("address", 8, "its address is a multiple of 16 bytes"),
        ("strides", (60, 1), "a stride is a multiple of 16 bytes"),
        ("strides", (64, 2), "elements of a row follow one another"),
        ("box", (64, 128), "its row is at most as wide as the swizzle"),
        ("box", (64, 4), "a row of its box is a multiple of 16 bytes"),
        ("box", (512, 64), "a box has 1 to 256 elements along each dimension"),
        ("shape", (0, 64), "no dimension is empty"),
    ],
)
def test_tensor_maps_that_cannot_be_made(run_ptx, field, value, message):
    left, *others = product_arguments().values
    value = left.address + value if field == "address" else value
    spoilt = left._replace(**{field: value})
    spoilt.owner = left.owner
    breaks(lambda: run_ptx(PRODUCT, spoilt, *others, threads=128, shared=16392), f"tensor map: expected that {message}")


ORDINARY_STORE = "  wgmma.fence.sync.aligned;"
STORED = """  ld.shared.b32 %r20, [%r21];
  bar.sync 0; // all have read
  st.shared.b32 [%r21], %r20;
  fence.proxy.async.shared::cta;
  bar.sync 0; // all have stored
"""


def with_ordinary_stores():
    """Every thread reads four bytes of the left tile and stores them again with an ordinary store."""
    text = changed(PRODUCT, ORDINARY_STORE, STORED + ORDINARY_STORE)
    return changed(text, "  mov.f32 %f0, 0f00000000;", "  shl.b32 %r21, %r1, 2;\n  mov.f32 %f0, 0f00000000;")


def test_ordinary_stores_before_a_product(run_ptx):
    out, want = product(run_ptx, with_ordinary_stores(), 1)
    assert (out == want).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_proxy_fence_that_is_missing(run_ptx, seed):
    broken = without(with_ordinary_stores(), "fence.proxy.async")
    breaks(lambda: product(run_ptx, broken, seed), "missing fence.proxy.async: the asynchronous proxy reads .* warp")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_after_the_proxy_fence_that_is_missing(run_ptx, seed):
    broken = without(with_ordinary_stores(), "all have stored")
    breaks(lambda: product(run_ptx, broken, seed), "race on shared memory: .* reads|race .* writes .* read|still reads")


@pytest.mark.parametrize(
    "before, after",
    [
        ("mov.b64 %d4, 4611686293305294848;", "mov.b64 %d4, 4611686155866341376;"),  # another stride
        ("add.s64 %d9, %d6, 2;", "add.s64 %d9, %d6, 4;"),
        ("mov.b64 %d4, 4611686293305294848;", "mov.b64 %d4, 9223372311732682752;"),  # another swizzle
        ("%d13, %d14, 1, 1, 1, 0, 0;", "%d13, %d14, 0, 1, 1, 0, 0;"),
        ("{%f0, %f1}", "{%f1, %f0}"),
        ("and.b32 %r13, %r11, 3;", "and.b32 %r13, %r11, 1;"),
    ],
)
def test_layouts_that_are_wrong_give_wrong_results(run_ptx, before, after):
    try:
        out, want = product(run_ptx, changed(PRODUCT, before, after))
    except PTXError:
        return
    assert not np.array_equal(out, want)


# --- divergence, and what is not known --------------------------------------------------------------------------------

# out[i] = the number of steps of Collatz's sequence from i + 1 to 1, found by a loop that each lane leaves on its own.
COLLATZ = kernel(
    """
  ld.param.u64 %d1, [out];
  mov.u32 %r1, %tid.x;
  add.s32 %r2, %r1, 1;
  mov.u32 %r3, 0;
next:
  setp.le.u32 %p1, %r2, 1;
  @%p1 bra done;
  and.b32 %r4, %r2, 1;
  setp.eq.u32 %p2, %r4, 0;
  @%p2 bra even;
  mad.lo.s32 %r2, %r2, 3, 1;
  bra.uni joined;
even:
  shr.u32 %r2, %r2, 1;
joined:
  add.s32 %r3, %r3, 1;
  bra.uni next;
done:
  mul.wide.u32 %d2, %r1, 4;
  add.s64 %d3, %d1, %d2;
  shfl.sync.idx.b32 %r5, %r3, 0, 31, -1;
  add.s32 %r3, %r3, %r5;
  st.global.b32 [%d3], %r3;
  ret;
""",
    ".u64 out",
)


def collatz(n):
    steps = 0
    while n > 1:
        n, steps = (3 * n + 1 if n % 2 else n // 2), steps + 1
    return steps


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_that_part_meet_again(run_ptx, seed):
    out = np.zeros(96, np.int32)
    run_ptx(COLLATZ, out, threads=96, seed=seed)
    steps = np.array([collatz(i + 1) for i in range(96)])
    assert (out == steps + np.repeat(steps[::32], 32)).all()


def test_a_shuffle_in_part_of_a_warp(run_ptx):
    broken = changed(COLLATZ, "joined:", "joined:\n  shfl.sync.idx.b32 %r5, %r3, 0, 31, -1;")
    breaks(lambda: run_ptx(broken, np.zeros(32, np.int32)), "shfl.sync in a warp of which only some lanes are active")


def test_an_unknown_opcode_is_named(run_ptx):
    broken = changed(COLLATZ, "shr.u32 %r2, %r2, 1;", "frobnicate.u32 %r2, %r2;")
    breaks(
        lambda: run_ptx(broken, np.zeros(32, np.int32)), r"kernel: 1 instructions .*\nline \d+: frobnicate.u32.*unknown"
    )


@pytest.mark.parametrize(
    "seed, message", [(None, "an endless loop: 500 instructions"), (0, "gave up after 50 turns|endless")]
)
def test_an_endless_loop_is_given_up(run_ptx, monkeypatch, seed, message):
    from ptx_emulator import group, wave

    monkeypatch.setattr(wave, "LIMIT", 50)
    monkeypatch.setattr(group, "LIMIT", 500)
    endless = changed(EXCHANGE, "bar.sync 0; // second", "again:\n  bar.sync 0;\n  bra again;")
    breaks(lambda: run_ptx(endless, np.zeros(128, np.int32), threads=128, shared=512, seed=seed), message)
