// The main loop of all grouped products: MLP_TILE x MLP_TILE sums by mma.sync, whose operands cp.async fetches.
//
// An operand is a set of rows of consecutive elements, which lie anywhere: in RowsAlong the sum runs along the rows,
// in RowsDown each row is one term of the sum. What lies outside is zero and is not read. Each of eight warps, two by
// four, has 64 x 32 sums.
#pragma once

#include "grouped_mlp/launcher.h"
#include "grouped_mlp/ptx.h"
#include "grouped_mlp/tiles.h"

namespace dex {

// The sum of a number over a warp, in every lane.
__device__ __forceinline__ int32_t warp_sum(int32_t value) {
  return static_cast<int32_t>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(value)));
}

__device__ __forceinline__ Piece find_piece(const int64_t* offsets, int32_t num_experts, int32_t rows_each,
                                            uint32_t size, uint32_t piece) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int32_t begun = warp_sum(count_begun(offsets, num_experts, rows_each, size, piece, lane, 32));
  return piece_of(offsets, begun - 1, rows_each, size, piece);
}

__device__ __forceinline__ Piece find_row_tile(const MlpSlots& s, uint32_t tile) {
  const auto of_director = static_cast<uint32_t>(director_tiles(s));
  if (tile < of_director) return director_piece(s, tile);
  return find_piece(s.offsets, s.num_experts, s.tokens.divisor, MLP_TILE, tile - of_director);
}

// --- where rows lie; null past the last one --------------------------------------------------------------------------

struct DenseRows {
  static constexpr bool LOOKS_UP = false;

  const uint16_t* base;
  int64_t stride;
  int32_t stop;

  __device__ __forceinline__ const uint16_t* operator()(int32_t row) const {
    return row < stop ? base + row * stride : nullptr;
  }
};

struct GatheredRows {
  static constexpr bool LOOKS_UP = true;  // reads where a row lies

  Images images;
  MlpSlots slots;
  int32_t stop;

  __device__ __forceinline__ const uint16_t* operator()(int32_t row) const {
    if (row >= stop) return nullptr;
    const Row r = locate_row(slots, row);
    return images.base + r.image * images.image_stride + r.token * images.token_stride;
  }
};

// --- operands --------------------------------------------------------------------------------------------------------

// A step is MLP_TILE rows of 4 chunks of 16 bytes. The chunks of a row are permuted: the same chunk of eight rows, as
// ldmatrix reads it, then touches all banks once, as do eight chunks in a row, which cp.async writes.
class RowsAlong {
 public:
  static constexpr bool DOWN = false;

  // The rows first, first + 1, ..., of depth elements.
  template <class Rows>
  __device__ __forceinline__ RowsAlong(const Rows& rows, int32_t first, int32_t depth) : depth_(depth) {
#pragma unroll
    for (int i = 0; i < 2; ++i) row_[i] = rows(first + row(i));
  }

  __device__ __forceinline__ void copy(uint32_t to, int32_t step) const {
    const int32_t k = step * MLP_DEPTH + chunk() * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) copy16(to + at(row(i), chunk()), row_[i] + k, row_[i] != nullptr && k < depth_);
  }

  // Byte within a step of 16 bytes.
  static __device__ __forceinline__ uint32_t at(int row, int chunk) {
    return static_cast<uint32_t>(row * 4 + (chunk ^ (row >> 1 & 3))) * 16;
  }

 private:
  static __device__ __forceinline__ int chunk() { return static_cast<int>(threadIdx.x) % 4; }
  static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) / 4 + 64 * i; }

  const uint16_t* row_[2];
  int32_t depth_;
};

// A step is MLP_DEPTH rows of 16 chunks. Gathered rows are looked up one step ahead: no copy waits for an index.
template <class Rows>
class RowsDown {
 public:
  static constexpr bool DOWN = true;

  // The rows first, first + 1, ... from column on; width: columns of the matrix.
  __device__ __forceinline__ RowsDown(const Rows& rows, int32_t first, int32_t column, int32_t width)
      : rows_(rows), first_(first + static_cast<int>(threadIdx.x) / 16), column_(column + chunk() * 8) {
    inside_ = column_ < width;
    if constexpr (Rows::LOOKS_UP) look_up(0);
  }

  // Must be called for the steps 0, 1, ... in turn.
  __device__ __forceinline__ void copy(uint32_t to, int32_t step) {
    if constexpr (!Rows::LOOKS_UP) look_up(step);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      copy16(to + at(static_cast<int>(threadIdx.x) / 16 + 16 * i, chunk()), row_[i] + column_,
             inside_ && row_[i] != nullptr);
    if constexpr (Rows::LOOKS_UP) look_up(step + 1);
  }

  static __device__ __forceinline__ uint32_t at(int row, int chunk) {
    return static_cast<uint32_t>(row * 16 + (chunk ^ (row & 7))) * 16;
  }

 private:
  static __device__ __forceinline__ int chunk() { return static_cast<int>(threadIdx.x) % 16; }

  __device__ __forceinline__ void look_up(int32_t step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) row_[i] = rows_(first_ + step * MLP_DEPTH + 16 * i);
  }

  Rows rows_;
  const uint16_t* row_[2];
  int32_t first_;
  int32_t column_;
  bool inside_;
};

// --- fragments -------------------------------------------------------------------------------------------------------

struct Lane {
  int lane = static_cast<int>(threadIdx.x) % 32;
  int row = static_cast<int>(threadIdx.x) / 32 % 2 * 64;     // the warp's first row in the tile
  int column = static_cast<int>(threadIdx.x) / 32 / 2 * 32;  // and its first column

  __device__ __forceinline__ int quad() const { return lane / 4; }
  __device__ __forceinline__ int in_quad() const { return lane % 4; }
};

// 16 rows of the left operand from row on, and 16 terms: half a step.
template <class Left>
__device__ __forceinline__ void load_left(uint32_t (&m)[4], uint32_t step, int row, int half, int lane) {
  if constexpr (Left::DOWN) {
    load_matrices<true>(m, step + Left::at(half * 16 + lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2));
  } else {
    load_matrices<false>(m, step + Left::at(row + lane % 16, half * 2 + lane / 16));
  }
}

// 16 columns of the right operand, the same terms.
template <class Right>
__device__ __forceinline__ void load_right(uint32_t (&m)[4], uint32_t step, int column, int half, int lane) {
  if constexpr (Right::DOWN) {
    load_matrices<true>(m, step + Right::at(half * 16 + lane % 8 + lane / 8 % 2 * 8, column / 8 + lane / 16));
  } else {
    load_matrices<false>(m, step + Right::at(column + lane % 8 + lane / 16 * 8, half * 2 + lane / 8 % 2));
  }
}

// sums[m][n][i]: row 16 m + quad + 8 (i / 2) and column 8 n + 2 in_quad + i % 2 of the warp's.
using Sums = float[4][4][4];

// The sums over all steps. While one step is multiplied, the next ones are on their way.
template <class Format, class Left, class Right>
__device__ __forceinline__ void multiply(Left& left, Right& right, int32_t steps, Sums& sums) {
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t shared = shared_address(memory);
  const Lane at;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
  const auto fetch = [&](int32_t step) {
    if (step < steps) {
      const uint32_t to = shared + step % MLP_STAGES * MLP_STEP_BYTES;
      left.copy(to, step);
      right.copy(to + MLP_STEP_BYTES / 2, step);
    }
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < MLP_STAGES - 1; ++step) fetch(step);
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step) {
    wait_for_copies<MLP_STAGES - 2>();
    __syncthreads();  // everyone's part of this step has landed, and the step before has been read
    fetch(step + MLP_STAGES - 1);
    const uint32_t from = shared + step % MLP_STAGES * MLP_STEP_BYTES;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[4][4], b[2][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) load_left<Left>(a[m], from, at.row + m * 16, half, at.lane);
#pragma unroll
      for (int n = 0; n < 2; ++n)
        load_right<Right>(b[n], from + MLP_STEP_BYTES / 2, at.column + n * 16, half, at.lane);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) Format::multiply(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }
}

}  // namespace dex
