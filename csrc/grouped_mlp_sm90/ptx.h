// The PTX of sm_90a that the kernels use: mbarriers, bulk tensor copies, wgmma of operands in shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "grouped_mlp/ptx.h"

namespace dex {

// --- mbarriers, by their address in shared memory --------------------------------------------------------------------

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to copies too. A barrier of the block must follow.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and has the phase wait for bytes of copies.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is over. Of a new barrier the phase of parity 1 is.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        "  .reg .pred done;\n"
        "  mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "  selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// --- bulk tensor copies ----------------------------------------------------------------------------------------------

// A box of a tensor map of three dimensions, coordinates fastest first, which reports to barrier.
__device__ __forceinline__ void copy_box(uint32_t to, const void* map, uint32_t barrier, int32_t x, int32_t y,
                                         int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// --- registers of a warpgroup ----------------------------------------------------------------------------------------

template <int REGISTERS>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// --- wgmma -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Operands lie in rows of 128 bytes under a 128-byte swizzle, eight rows are 1024 bytes. The next 16 terms are at the
// descriptor + 32 / 16 where the sum runs along the rows, + 2048 / 16 where each row is one term. Then 64 columns lie
// in a row, and the next 64 are next bytes behind.
__device__ __forceinline__ uint64_t describe_operand(uint32_t address, uint32_t next = 16) {
  return (address & 0x3ffff) >> 4 | uint64_t{next >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The threads of one warpgroup, by a barrier of their own.
__device__ __forceinline__ void sync_warpgroup(uint32_t barrier) {
  asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}

#define DEX_8(i)                                                                                                \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])

#define DEX_WGMMA(FORMAT, DOWN)                                                                                     \
  asm volatile(                                                                                                     \
      "{\n"                                                                                                         \
      "  .reg .pred adds;\n"                                                                                        \
      "  setp.ne.b32 adds, %66, 0;\n"                                                                               \
      "  wgmma.mma_async.sync.aligned.m64n128k16.f32." FORMAT "." FORMAT                                            \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "   \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "       \
      "%64, %65, adds, 1, 1, 0, " DOWN ";\n"                                                                        \
      "}"                                                                                                           \
      : DEX_8(0), DEX_8(8), DEX_8(16), DEX_8(24), DEX_8(32), DEX_8(40), DEX_8(48), DEX_8(56)                        \
      : "l"(left), "l"(right), "r"(static_cast<int>(adds))                                                          \
      : "memory")

// sums [+]= left right^T of 64 rows, 128 columns and 16 terms; adds: to what the sums are. In lane l of warp w of the
// warpgroup sums[i] is of row 16 w + l / 4 + 8 (i / 2 % 2) and column 8 (i / 4) + 2 (l % 4) + i % 2. DOWN: each row of
// the right operand is one term.
template <class Format, bool DOWN>
__device__ __forceinline__ void multiply_rows(float (&sums)[64], uint64_t left, uint64_t right, bool adds) {
  constexpr bool IS_BFLOAT16 = std::is_same_v<Format, Bfloat16>;
  static_assert(IS_BFLOAT16 || std::is_same_v<Format, Float16>);
  if constexpr (IS_BFLOAT16 && DOWN) {
    DEX_WGMMA("bf16", "1");
  } else if constexpr (IS_BFLOAT16) {
    DEX_WGMMA("bf16", "0");
  } else if constexpr (DOWN) {
    DEX_WGMMA("f16", "1");
  } else {
    DEX_WGMMA("f16", "0");
  }
}

#undef DEX_WGMMA
#undef DEX_8

}  // namespace dex
