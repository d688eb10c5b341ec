// The PTX that grouped products use: cp.async, ldmatrix and mma.sync m16n8k16 of sm_80, for bfloat16 and float16.
// Sums are float32. A word holds two elements, that of the lower column in its lower half.
#pragma once

#include <cstdint>

namespace dex {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory, or fills them with zeros and reads nothing.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most PENDING groups of this thread's copies have not landed.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Stores of whole vectors, which the compiler splits if they are written in C++.
__device__ __forceinline__ void store(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

__device__ __forceinline__ void store(void* to, float x, float y) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ void store(void* to, uint32_t x, uint32_t y) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(x), "r"(y) : "memory");
}

// Four 8 x 8 matrices. Lane l gives the address of row l % 8 of matrix l / 8, and gets elements 2 (l % 4) and the next
// of row l / 4 of each matrix; TRANSPOSED: of column l / 4.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t row) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
  }
}

#define DEX_MMA(FORMAT)                                                                                         \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." FORMAT "." FORMAT                                                \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                    \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                              \
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1))

struct Bfloat16 {
  static __device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&left)[4], uint32_t right0,
                                                  uint32_t right1) {
    DEX_MMA("bf16");
  }

  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }

  static __device__ __forceinline__ float low(uint32_t word) { return __uint_as_float(word << 16); }

  static __device__ __forceinline__ float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
};

struct Float16 {
  static __device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&left)[4], uint32_t right0,
                                                  uint32_t right1) {
    DEX_MMA("f16");
  }

  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }

  static __device__ __forceinline__ float low(uint32_t word) {
    return from_bits(static_cast<uint16_t>(word & 0xffffu));
  }

  static __device__ __forceinline__ float high(uint32_t word) { return from_bits(static_cast<uint16_t>(word >> 16)); }

  static __device__ __forceinline__ float from_bits(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
};

#undef DEX_MMA

}  // namespace dex
