// Rows times the weights of their experts: both layers of the forward, and the gradient of x.
#include "common/launch.h"
#include "grouped_mlp/gelu.h"
#include "grouped_mlp/launch.h"
#include "grouped_mlp/launcher.h"
#include "grouped_mlp/strips.h"

namespace dex {
namespace {

__device__ __forceinline__ DenseRows rows_of(const Matrices& matrices, int32_t expert, int32_t rows) {
  return {matrices.base + expert * matrices.matrix_stride, matrices.row_stride, rows};
}

template <class Format>
__global__ void __launch_bounds__(MLP_THREADS, 2) fc1_kernel(const __grid_constant__ Fc1 p) {
  const auto columns = static_cast<uint32_t>(ceil_div(p.hidden, MLP_TILE));
  const Place place = place_block(blockIdx.x, gridDim.x / columns, columns);
  const Piece piece = find_row_tile(p.slots, place.tile);
  if (piece.first >= piece.stop) return;
  const int32_t column = static_cast<int32_t>(place.column) * MLP_TILE;
  RowsAlong x(GatheredRows{p.x, p.slots, piece.stop}, piece.first, p.dim);
  RowsAlong weight(rows_of(p.weight, piece.expert, p.hidden), column, p.dim);
  Sums sums;
  multiply<Format>(x, weight, (p.dim + MLP_DEPTH - 1) / MLP_DEPTH, sums);
  const Lane at;
  add_bias<Format>(sums, p.bias + int64_t{piece.expert} * p.hidden, at, column, p.hidden);
  const Columns own(at, column, p.hidden);
  const bool saves = p.z != nullptr && piece.expert < p.slots.num_experts;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = piece.first + at.row + m * 16 + half * 8 + at.quad();
      const bool inside = row < piece.stop && own.inside;
      const int64_t to = int64_t{row} * p.hidden + own.first;
      float values[8];
      take_strip(sums, m, half, values);
      if (saves) store_strip<Format>(p.z + to, values, inside);
#pragma unroll
      for (float& value : values) value *= normal_at(value).cdf;
      store_strip<Format>(p.a + to, values, inside);
    }
}

template <class Format, class Weight>
__device__ __forceinline__ void one_tile_to_slots(const ToSlots& p, const Piece& piece, int32_t column,
                                                  Weight& weight) {
  RowsAlong rows(DenseRows{p.rows, p.depth, piece.stop}, piece.first, p.depth);
  Sums sums;
  multiply<Format>(rows, weight, (p.depth + MLP_DEPTH - 1) / MLP_DEPTH, sums);
  const Lane at;
  if (p.bias != nullptr) add_bias<Format>(sums, p.bias + int64_t{piece.expert} * p.width, at, column, p.width);
  const Columns own(at, column, p.width);
  const bool routed = piece.expert < p.slots.num_experts;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = piece.first + at.row + m * 16 + half * 8 + at.quad();
      const bool inside = row < piece.stop && own.inside;
      const Row r = inside ? locate_row(p.slots, row) : Row{};
      uint16_t* out = routed ? p.out : p.director_out;
      const int64_t to = int64_t{routed ? r.slot : r.image} * p.slots.tokens.divisor + r.token;
      float values[8];
      take_strip(sums, m, half, values);
      store_strip<Format>(out + to * p.width + own.first, values, inside);
    }
}

template <class Format, bool TRANSPOSED>
__global__ void __launch_bounds__(MLP_THREADS, 2) to_slots_kernel(const __grid_constant__ ToSlots p) {
  const auto columns = static_cast<uint32_t>(ceil_div(p.width, MLP_TILE));
  const Place place = place_block(blockIdx.x, gridDim.x / columns, columns);
  const Piece piece = find_row_tile(p.slots, place.tile);
  if (piece.first >= piece.stop) return;
  const int32_t column = static_cast<int32_t>(place.column) * MLP_TILE;
  if constexpr (TRANSPOSED) {
    RowsDown<DenseRows> weight(rows_of(p.weight, piece.expert, p.depth), 0, column, p.width);
    one_tile_to_slots<Format>(p, piece, column, weight);
  } else {
    RowsAlong weight(rows_of(p.weight, piece.expert, p.width), column, p.depth);
    one_tile_to_slots<Format>(p, piece, column, weight);
  }
}

constexpr int COMBINE_THREADS = 128;
constexpr int COMBINE_WIDTH = 8;  // elements of a thread

template <class Format>
__global__ void __launch_bounds__(COMBINE_THREADS) combine_kernel(const __grid_constant__ Combine p) {
  const auto each = static_cast<uint32_t>(ceil_div(p.size, COMBINE_THREADS * COMBINE_WIDTH));
  const int64_t image = blockIdx.x / each;
  const int64_t i = (int64_t{blockIdx.x % each} * COMBINE_THREADS + threadIdx.x) * COMBINE_WIDTH;
  if (i >= p.size) return;
  float acc[8] = {};
  const uint16_t* from = p.by_slot + image * p.top_k * p.size + i;
  for (int32_t k = 0; k < p.top_k; ++k, from += p.size) {
    const uint4 read = *reinterpret_cast<const uint4*>(from);
    const float gate = p.gates == nullptr ? 1.0f : p.gates[image * p.top_k + k];
    const uint32_t words[4] = {read.x, read.y, read.z, read.w};
#pragma unroll
    for (int j = 0; j < 8; ++j)
      acc[j] = fmaf(gate, j % 2 ? Format::high(words[j / 2]) : Format::low(words[j / 2]), acc[j]);
  }
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) words[j] = Format::pack(acc[2 * j], acc[2 * j + 1]);
  store(p.out + image * p.size + i, words);
}

}  // namespace

cudaError_t fc1(const Fc1& p, bool bfloat16, cudaStream_t stream) {
  const int64_t blocks = row_tiles(p.slots) * ceil_div(p.hidden, MLP_TILE);
  return launch_product(bfloat16 ? fc1_kernel<Bfloat16> : fc1_kernel<Float16>, p, blocks, stream);
}

cudaError_t to_slots(const ToSlots& p, bool transposed, bool bfloat16, cudaStream_t stream) {
  const int64_t blocks = row_tiles(p.slots) * ceil_div(p.width, MLP_TILE);
  const auto straight = bfloat16 ? to_slots_kernel<Bfloat16, false> : to_slots_kernel<Float16, false>;
  const auto across = bfloat16 ? to_slots_kernel<Bfloat16, true> : to_slots_kernel<Float16, true>;
  return launch_product(transposed ? across : straight, p, blocks, stream);
}

cudaError_t combine(const Combine& p, bool bfloat16, cudaStream_t stream) {
  const int64_t blocks = p.images * ceil_div(p.size, COMBINE_THREADS * COMBINE_WIDTH);
  return launch_blocks(bfloat16 ? combine_kernel<Bfloat16> : combine_kernel<Float16>, p, blocks, COMBINE_THREADS, 0,
                       stream);
}

}  // namespace dex
