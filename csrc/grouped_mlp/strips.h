// What epilogues share. They go through a warp's sums in strips of eight rows; a quad of lanes has 32 columns of a row.
//
// mma.sync leaves two of every eight columns in each lane of a quad, an access of 16 bytes needs eight in one lane.
// exchange() turns one into the other, and back: rows are read and written in whole sectors, without shared memory.
#pragma once

#include "grouped_mlp/multiply.h"

namespace dex {

// Word i of lane j of a quad becomes word j of lane i.
__device__ __forceinline__ void exchange(uint32_t (&words)[4]) {
  const int lane = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? words[i] : words[i + bit], bit);
      if (upper) {
        words[i] = got;
      } else {
        words[i + bit] = got;
      }
    }
  }
}

// Of the eight columns that a lane reads and writes at once: the first, and whether there are any.
struct Columns {
  int32_t first;
  bool inside;

  __device__ __forceinline__ Columns(const Lane& at, int32_t tile_column, int32_t width)
      : first(tile_column + at.column + at.in_quad() * 8), inside(first < width) {}
};

// Word n holds the columns 8 n + 2 in_quad and the next. All lanes of a warp take part, those outside store nothing.
__device__ __forceinline__ void store_words(uint16_t* to, uint32_t (&words)[4], bool inside) {
  exchange(words);
  if (inside) store(to, words);
}

// The inverse of store_words; 0 outside.
__device__ __forceinline__ void load_words(const uint16_t* from, uint32_t (&words)[4], bool inside) {
  uint4 read = make_uint4(0, 0, 0, 0);
  if (inside) read = *reinterpret_cast<const uint4*>(from);
  words[0] = read.x, words[1] = read.y, words[2] = read.z, words[3] = read.w;
  exchange(words);
}

// values[2 n + j]: of column 8 n + 2 in_quad + j.
template <class Format>
__device__ __forceinline__ void store_strip(uint16_t* to, const float (&values)[8], bool inside) {
  uint32_t words[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) words[n] = Format::pack(values[2 * n], values[2 * n + 1]);
  store_words(to, words, inside);
}

__device__ __forceinline__ void take_strip(const Sums& sums, int m, int half, float (&values)[8]) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    values[2 * n] = sums[m][n][2 * half];
    values[2 * n + 1] = sums[m][n][2 * half + 1];
  }
}

// Adds bias[column] to every sum. bias: of the expert, width long.
template <class Format>
__device__ __forceinline__ void add_bias(Sums& sums, const uint16_t* bias, const Lane& at, int32_t tile_column,
                                         int32_t width) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int32_t column = tile_column + at.column + 8 * n + 2 * at.in_quad();
    const uint32_t word = column < width ? *reinterpret_cast<const uint32_t*>(bias + column) : 0;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] += i % 2 ? Format::high(word) : Format::low(word);
  }
}

}  // namespace dex
