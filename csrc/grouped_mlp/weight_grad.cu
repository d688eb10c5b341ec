// The gradients of both weights: products summed over the rows of an expert. Those of an expert with many slots are cut
// into pieces, whose sums are added in their order.
#include "common/launch.h"
#include "grouped_mlp/launch.h"
#include "grouped_mlp/launcher.h"
#include "grouped_mlp/strips.h"

namespace dex {
namespace {

// One of the two operands, whose rows are gathered from images or lie in slot order.
template <bool GATHERED>
__device__ __forceinline__ auto operand(const WeightGrad& p, int32_t first, int32_t stop, int32_t column,
                                        int32_t width) {
  if constexpr (GATHERED) {
    return RowsDown<GatheredRows>(GatheredRows{p.gathered, p.slots, stop}, first, column, width);
  } else {
    return RowsDown<DenseRows>(DenseRows{p.rows, width, stop}, first, column, width);
  }
}

template <class Format, bool GATHER_LEFT>
__global__ void __launch_bounds__(MLP_THREADS, 2) weight_grad_kernel(const __grid_constant__ WeightGrad p) {
  const auto columns = static_cast<uint32_t>(ceil_div(p.width, MLP_TILE));
  const auto tiles = static_cast<uint32_t>(ceil_div(p.height, MLP_TILE)) * columns;
  const MlpSlots& s = p.slots;
  const Piece piece = find_piece(s.offsets, s.num_experts, 1, p.most, blockIdx.x / tiles);
  // An expert without slots has one piece, whose sums are 0.
  if (piece.first >= piece.stop && piece.number > 0) return;
  const int32_t row = static_cast<int32_t>(blockIdx.x % tiles / columns) * MLP_TILE;
  const int32_t column = static_cast<int32_t>(blockIdx.x % tiles % columns) * MLP_TILE;
  const int32_t first = piece.first * s.tokens.divisor, stop = piece.stop * s.tokens.divisor;
  auto left = operand<GATHER_LEFT>(p, first, stop, row, p.height);
  auto right = operand<!GATHER_LEFT>(p, first, stop, column, p.width);
  Sums sums;
  multiply<Format>(left, right, (stop - first + MLP_DEPTH - 1) / MLP_DEPTH, sums);
  const bool cut = s.offsets[piece.expert + 1] - s.offsets[piece.expert] > p.most;
  int64_t matrix = piece.expert;
  if (cut) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int32_t rank = warp_sum(count_cut(s.offsets, piece.expert, p.most, lane, 32));
    matrix = first_part(s.offsets, piece.expert, p.most, rank) + piece.number;
  }
  const Lane at;
  const Columns own(at, column, p.width);
  const int64_t start = matrix * p.height * p.width;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t i = row + at.row + m * 16 + half * 8 + at.quad();
      const int64_t to = start + int64_t{i} * p.width;
      float values[8];
      take_strip(sums, m, half, values);
      if (!cut && !p.float_out) {
        store_strip<Format>(static_cast<uint16_t*>(p.out) + to + own.first, values, i < p.height && own.inside);
        continue;
      }
      float* out = (cut ? p.parts : static_cast<float*>(p.out)) + to;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int32_t j = column + at.column + 8 * n + 2 * at.in_quad();
        if (i < p.height && j < p.width) store(out + j, values[2 * n], values[2 * n + 1]);
      }
    }
}

constexpr int PARTS_THREADS = 256, PARTS_WIDTH = 4;

template <class Format>
__global__ void __launch_bounds__(PARTS_THREADS) sum_chunks_kernel(const __grid_constant__ WeightGrad p) {
  const int64_t size = int64_t{p.height} * p.width;
  const auto each = static_cast<uint32_t>(ceil_div(size, PARTS_THREADS * PARTS_WIDTH));
  const auto expert = static_cast<int32_t>(blockIdx.x / each);
  const auto count = static_cast<int32_t>(p.slots.offsets[expert + 1] - p.slots.offsets[expert]);
  if (count <= p.most) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int32_t rank = warp_sum(count_cut(p.slots.offsets, expert, p.most, lane, 32));
  const int64_t i = (int64_t{blockIdx.x % each} * PARTS_THREADS + threadIdx.x) * PARTS_WIDTH;
  if (i >= size) return;
  const float* part = p.parts + first_part(p.slots.offsets, expert, p.most, rank) * size + i;
  float4 acc = *reinterpret_cast<const float4*>(part);
  const auto parts = static_cast<int32_t>(ceil_div(count, p.most));
  for (int32_t number = 1; number < parts; ++number) {
    part += size;
    const float4 value = *reinterpret_cast<const float4*>(part);
    acc = make_float4(acc.x + value.x, acc.y + value.y, acc.z + value.z, acc.w + value.w);
  }
  const int64_t to = expert * size + i;
  if (p.float_out) {
    store(static_cast<float*>(p.out) + to, {__float_as_uint(acc.x), __float_as_uint(acc.y), __float_as_uint(acc.z),
                                            __float_as_uint(acc.w)});
  } else {
    store(static_cast<uint16_t*>(p.out) + to, Format::pack(acc.x, acc.y), Format::pack(acc.z, acc.w));
  }
}

template <class Format>
cudaError_t launch(const WeightGrad& p, bool gather_left, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.height, MLP_TILE) * ceil_div(p.width, MLP_TILE);
  const int64_t blocks = max_pieces(p.slots.num_slots, p.slots.num_experts, p.most) * tiles;
  const auto kernel = gather_left ? weight_grad_kernel<Format, true> : weight_grad_kernel<Format, false>;
  if (auto error = launch_product(kernel, p, blocks, stream)) return error;
  if (p.parts == nullptr) return cudaSuccess;
  const int64_t each = ceil_div(int64_t{p.height} * p.width, PARTS_THREADS * PARTS_WIDTH);
  return launch_blocks(sum_chunks_kernel<Format>, p, p.slots.num_experts * each, PARTS_THREADS, 0, stream);
}

}  // namespace

cudaError_t weight_grad(const WeightGrad& p, bool gather_left, bool bfloat16, cudaStream_t stream) {
  return bfloat16 ? launch<Bfloat16>(p, gather_left, stream) : launch<Float16>(p, gather_left, stream);
}

}  // namespace dex
