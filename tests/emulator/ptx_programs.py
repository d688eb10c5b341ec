"""Small kernels in PTX, right as they stand; tests break one rule in each, by deleting or changing a line."""

from typing import NamedTuple

import numpy as np
from ptx_emulator.copies import TensorMap

HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry kernel({parameters})
{{
  .reg .pred %p<20>;
  .reg .b16 %h<8>;
  .reg .b32 %r<64>;
  .reg .f32 %f<64>;
  .reg .b64 %d<32>;
{body}
}}
"""


def kernel(body: str, *parameters: str) -> str:
    """A kernel whose parameters, such as ``.u64 out``, are loaded by ``ld.param`` under their names."""
    return HEADER.format(parameters=", ".join(f".param {p}" for p in parameters), body=body)


def without(text: str, line: str) -> str:
    """``text`` without the one line that holds ``line``."""
    lines = text.split("\n")
    found = [i for i, one in enumerate(lines) if line in one]
    if len(found) != 1:
        raise ValueError(f"line: expected one line with {line!r}, got {len(found)}")
    return "\n".join(lines[: found[0]] + lines[found[0] + 1 :])


def changed(text: str, before: str, after: str) -> str:
    if text.count(before) != 1:
        raise ValueError(f"before: expected {before!r} once, got it {text.count(before)} times")
    return text.replace(before, after)


# out[i] = what the thread 32 further on put into shared memory, around the block.
EXCHANGE = kernel(
    """
  ld.param.u64 %d1, [out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r9, %ntid.x;
  mov.u32 %r2, memory;
  shl.b32 %r3, %r1, 2;
  add.s32 %r4, %r2, %r3;
  st.shared.b32 [%r4], %r1;
  bar.sync 0;
  add.s32 %r5, %r1, 32;
  rem.u32 %r5, %r5, %r9;
  shl.b32 %r6, %r5, 2;
  add.s32 %r6, %r2, %r6;
  ld.shared.b32 %r7, [%r6];
  bar.sync 0; // second
  st.shared.b32 [%r4], %r7; // again
  mul.wide.u32 %d2, %r1, 4;
  add.s64 %d3, %d1, %d2;
  st.global.b32 [%d3], %r7;
  ret;
""",
    ".u64 out",
)

# The last warp produces, the first consumes, through one mbarrier each way and two rounds.
PIPELINE = kernel(
    """
  ld.param.u64 %d1, [out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, memory;
  add.s32 %r10, %r2, 1024; // full
  add.s32 %r11, %r2, 1032; // empty
  setp.eq.u32 %p1, %r1, 0;
  @%p1 mbarrier.init.shared::cta.b64 [%r10], 32;
  @%p1 mbarrier.init.shared::cta.b64 [%r11], 32;
  bar.sync 0; // after init
  and.b32 %r3, %r1, 31;
  shl.b32 %r4, %r3, 2;
  add.s32 %r4, %r2, %r4;
  mov.u32 %r5, 0;
  setp.ge.u32 %p2, %r1, 32;
  @%p2 bra producer;
consumer:
  and.b32 %r6, %r5, 1;
full:
  mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r10], %r6;
  @!%p3 bra full;
  xor.b32 %r7, %r4, 124;
  ld.shared.b32 %r8, [%r7];
  mbarrier.arrive.shared::cta.b64 _, [%r11]; // free
  shl.b32 %r9, %r5, 5;
  add.s32 %r9, %r9, %r3;
  mul.wide.u32 %d2, %r9, 4;
  add.s64 %d3, %d1, %d2;
  st.global.b32 [%d3], %r8;
  add.s32 %r5, %r5, 1;
  setp.lt.u32 %p4, %r5, 3;
  @%p4 bra consumer;
  ret;
producer:
  add.s32 %r6, %r5, 1; // parity
  and.b32 %r6, %r6, 1;
empty:
  mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r11], %r6;
  @!%p3 bra empty;
  mul.lo.s32 %r8, %r5, 100;
  add.s32 %r8, %r8, %r3;
  st.shared.b32 [%r4], %r8;
  mbarrier.arrive.shared::cta.b64 _, [%r10]; // filled
  add.s32 %r5, %r5, 1;
  setp.lt.u32 %p4, %r5, 3;
  @%p4 bra producer;
  ret;
""",
    ".u64 out",
)

# 64 threads copy 16 bytes each, twice, by cp.async, and store what the other warp copied.
COPY = kernel(
    """
  ld.param.u64 %d1, [from];
  ld.param.u64 %d2, [to];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, memory;
  shl.b32 %r3, %r1, 4;
  add.s32 %r4, %r2, %r3;
  mul.wide.u32 %d3, %r1, 16;
  add.s64 %d4, %d1, %d3;
  cp.async.cg.shared.global [%r4], [%d4], 16, 16;
  cp.async.commit_group; // first
  cp.async.cg.shared.global [%r4+1024], [%d4+1024], 16, 16;
  cp.async.commit_group; // second
  cp.async.wait_group 0;
  bar.sync 0;
  xor.b32 %r5, %r3, 512;
  add.s32 %r6, %r2, %r5;
  ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r6];
  ld.shared.v4.b32 {%r14, %r15, %r16, %r17}, [%r6+1024];
  mul.wide.u32 %d5, %r5, 1;
  add.s64 %d6, %d2, %d5;
  st.global.v4.b32 [%d6], {%r10, %r11, %r12, %r13};
  st.global.v4.b32 [%d6+1024], {%r14, %r15, %r16, %r17};
  ret;
""",
    ".u64 from",
    ".u64 to",
)

# D [64, 8] = A [64, 64] B [8, 64]^T of bfloat16: one warpgroup, tiles by bulk tensor copies, 128-byte swizzle.
PRODUCT = kernel(
    """
  ld.param.u64 %d1, [out];
  mov.b64 %d2, left;
  mov.b64 %d3, right;
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, memory;
  add.s32 %r3, %r2, 8192;
  add.s32 %r4, %r2, 16384;
  setp.eq.u32 %p1, %r1, 0;
  @%p1 mbarrier.init.shared::cta.b64 [%r4], 1;
  bar.sync 0; // after init
  mov.u32 %r5, 0;
  @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 9216;
  @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%d2, {%r5, %r5}], [%r4];
  @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d3, {%r5, %r5}], [%r4];
again:
  mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r4], 0;
  @!%p2 bra again;
  mov.b64 %d4, 4611686293305294848;
  shr.u32 %r6, %r2, 4;
  cvt.u64.u32 %d5, %r6;
  or.b64 %d6, %d5, %d4;
  shr.u32 %r7, %r3, 4;
  cvt.u64.u32 %d7, %r7;
  or.b64 %d8, %d7, %d4;
  mov.f32 %f0, 0f00000000;
  mov.f32 %f1, %f0;
  mov.f32 %f2, %f0;
  mov.f32 %f3, %f0;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d6, %d8, 0, 1, 1, 0, 0;
  add.s64 %d9, %d6, 2;
  add.s64 %d10, %d8, 2;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d9, %d10, 1, 1, 1, 0, 0;
  add.s64 %d11, %d6, 4;
  add.s64 %d12, %d8, 4;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d11, %d12, 1, 1, 1, 0, 0;
  add.s64 %d13, %d6, 6;
  add.s64 %d14, %d8, 6;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d13, %d14, 1, 1, 1, 0, 0;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  shr.u32 %r10, %r1, 5;
  shl.b32 %r10, %r10, 4;
  and.b32 %r11, %r1, 31;
  shr.u32 %r12, %r11, 2;
  add.s32 %r10, %r10, %r12;
  and.b32 %r13, %r11, 3;
  shl.b32 %r14, %r10, 3;
  shl.b32 %r15, %r13, 1;
  add.s32 %r14, %r14, %r15;
  mul.wide.u32 %d15, %r14, 4;
  add.s64 %d16, %d1, %d15;
  st.global.v2.f32 [%d16], {%f0, %f1};
  st.global.v2.f32 [%d16+256], {%f2, %f3};
  bar.sync 0; // before the end
  @%p1 mbarrier.inval.shared::cta.b64 [%r4];
  ret;
""",
    ".align 64 .b8 left[128]",
    ".align 64 .b8 right[128]",
    ".u64 out",
)


class Tensor(TensorMap):
    """A tensor map that keeps what it describes alive."""

    owner = None


class ProductCase(NamedTuple):
    values: tuple  # of the parameters of PRODUCT; the last is the result
    want: np.ndarray


def product_arguments() -> ProductCase:
    """Small integers, exact in bfloat16."""
    maps, matrices = [], []
    for seed, rows in ((1, 64), (2, 8)):
        matrix = np.random.default_rng(seed).integers(-4, 5, (rows, 64)).astype(np.float32)
        bits = (matrix.view(np.uint32) >> 16).astype(np.uint16)
        one = Tensor(bits.ctypes.data, bits.shape, (64, 1), bits.shape, 2, 128)
        one.owner = bits
        maps.append(one)
        matrices.append(matrix)
    return ProductCase((*maps, np.full((64, 8), np.nan, np.float32)), matrices[0] @ matrices[1].T)
