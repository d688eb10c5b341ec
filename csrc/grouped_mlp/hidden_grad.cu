// Back through the second layer and the GELU, and the gradients of gates and biases from the sums taken on the way.
#include "common/launch.h"
#include "grouped_mlp/gelu.h"
#include "grouped_mlp/launch.h"
#include "grouped_mlp/launcher.h"
#include "grouped_mlp/strips.h"

namespace dex {
namespace {

// dz, g a and the sums of one strip, whose da are in sums; returns da . a of this lane's columns. column_sums: of dz.
template <class Format>
__device__ __forceinline__ float strip_through_gelu(const HiddenGrad& p, const Sums& sums, int m, int half, float gate,
                                                    int64_t at, bool inside, float (&column_sums)[8]) {
  uint32_t z[4], gated[4], dz[4];
  float dot = 0.0f;
  load_words(p.z + at, z, inside);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float a[2] = {Format::low(z[n]), Format::high(z[n])}, grad[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const NormalAt normal = normal_at(a[j]);
      const float da = sums[m][n][2 * half + j];
      grad[j] = da * gate * fmaf(a[j], normal.pdf, normal.cdf);
      column_sums[2 * n + j] += grad[j];
      a[j] *= normal.cdf;
      dot = fmaf(da, a[j], dot);
    }
    gated[n] = Format::pack(gate * a[0], gate * a[1]);
    dz[n] = Format::pack(grad[0], grad[1]);
  }
  if (p.gated != nullptr) store_words(p.gated + at, gated, inside);
  if (p.dz != nullptr) store_words(p.dz + at, dz, inside);
  return dot;
}

// The sum of value j over all eight quads, in the lanes of quad j. Each exchange halves the values of a lane.
__device__ __forceinline__ float sum_over_quads(float (&values)[8]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int count = 4; count > 0; count /= 2) {
    const bool upper = lane & 4 * count;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float sent = upper ? values[i] : values[i + count];
      const float kept = upper ? values[i + count] : values[i];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, 4 * count);
    }
  }
  return values[0];
}

template <class Format>
__global__ void __launch_bounds__(MLP_THREADS, 2) to_hidden_grad_kernel(const __grid_constant__ HiddenGrad p) {
  const auto columns = static_cast<uint32_t>(ceil_div(p.hidden, MLP_TILE));
  const Place place = place_block(blockIdx.x, gridDim.x / columns, columns);
  const Piece piece = find_row_tile(p.slots, place.tile);
  if (piece.first >= piece.stop) return;
  const int32_t column = static_cast<int32_t>(place.column) * MLP_TILE;
  RowsAlong grad_out(GatheredRows{p.grad_out, p.slots, piece.stop}, piece.first, p.dim);
  const uint16_t* matrix = p.weight.base + piece.expert * p.weight.matrix_stride;
  RowsDown<DenseRows> weight(DenseRows{matrix, p.weight.row_stride, p.dim}, 0, column, p.hidden);
  Sums sums;
  multiply<Format>(grad_out, weight, (p.dim + MLP_DEPTH - 1) / MLP_DEPTH, sums);
  const Lane at;
  const Columns own(at, column, p.hidden);
  const int64_t num_rows = int64_t{p.slots.num_slots} * p.slots.tokens.divisor;
  float column_sums[8] = {};
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = piece.first + at.row + m * 16 + half * 8 + at.quad();
      const bool valid = row < piece.stop;
      const float gate = valid ? p.gates[locate_row(p.slots, row).slot] : 0.0f;
      float dot = strip_through_gelu<Format>(p, sums, m, half, gate, int64_t{row} * p.hidden + own.first,
                                             valid && own.inside, column_sums);
      dot += __shfl_xor_sync(0xffffffffu, dot, 1);
      dot += __shfl_xor_sync(0xffffffffu, dot, 2);
      const int64_t part = static_cast<int64_t>(place.column) * 4 + at.column / 32;
      if (p.gate_parts != nullptr && valid && at.in_quad() == 0) p.gate_parts[part * num_rows + row] = dot;
    }
  if (p.bias_parts == nullptr) return;
  const float sum = sum_over_quads(column_sums);
  const int32_t own_column = column + at.column + at.quad() / 2 * 8 + at.in_quad() * 2 + at.quad() % 2;
  if (own_column < p.hidden) p.bias_parts[(int64_t{place.tile} * 2 + at.row / 64) * p.hidden + own_column] = sum;
}

// --- sums over rows --------------------------------------------------------------------------------------------------

constexpr int SUM_LANES = 32, SUM_ROWS = 8;
constexpr int SUM_COLUMNS = 2 * SUM_LANES;  // of a block

struct SumPlace {
  int64_t item;
  int32_t column;  // of this thread the first of two
};

__device__ __forceinline__ SumPlace place_sum(int32_t width) {
  const auto each = static_cast<uint32_t>(ceil_div(width, SUM_COLUMNS));
  return {blockIdx.x / each, static_cast<int32_t>(blockIdx.x % each) * SUM_COLUMNS +
                                 2 * static_cast<int32_t>(threadIdx.x % SUM_LANES)};
}

// get(0) + get(1) + ... of count rows, in a fixed order, for the threads for which stores_sum().
template <class Get>
__device__ __forceinline__ float2 sum_rows(int32_t count, const Get& get) {
  __shared__ float2 parts[SUM_ROWS][SUM_LANES];
  const int lane = static_cast<int>(threadIdx.x) % SUM_LANES, first = static_cast<int>(threadIdx.x) / SUM_LANES;
  float2 acc = make_float2(0.0f, 0.0f);
  for (int32_t row = first; row < count; row += SUM_ROWS) {
    const float2 value = get(row);
    acc.x += value.x;
    acc.y += value.y;
  }
  parts[first][lane] = acc;
  __syncthreads();
  for (int i = 1; i < SUM_ROWS; ++i) {
    acc.x += parts[i][lane].x;
    acc.y += parts[i][lane].y;
  }
  return acc;
}

__device__ __forceinline__ bool stores_sum() {
  return threadIdx.x < SUM_LANES;
}

template <class Format>
__global__ void __launch_bounds__(SUM_LANES* SUM_ROWS) image_sum_kernel(const __grid_constant__ ImageSum p) {
  const SumPlace place = place_sum(p.dim);
  const bool inside = place.column < p.dim;
  const uint16_t* image = p.grad_out.base + place.item * p.grad_out.image_stride + place.column;
  const float2 sum = sum_rows(inside ? p.tokens : 0, [&](int32_t token) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(image + token * p.grad_out.token_stride);
    return make_float2(Format::low(word), Format::high(word));
  });
  if (inside && stores_sum()) store(p.sums + place.item * p.dim + place.column, sum.x, sum.y);
}

template <class Format>
__device__ __forceinline__ void store_bias(const BiasGrad& p, const SumPlace& place, float2 sum) {
  if (place.column >= p.width || !stores_sum()) return;
  const int64_t to = place.item * p.width + place.column;
  if (p.float_out) {
    store(static_cast<float*>(p.out) + to, sum.x, sum.y);
  } else {
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + to) = Format::pack(sum.x, sum.y);
  }
}

template <class Format>
__global__ void __launch_bounds__(SUM_LANES* SUM_ROWS) bias1_grad_kernel(const __grid_constant__ BiasGrad p) {
  const SumPlace place = place_sum(p.width);
  const auto expert = static_cast<int32_t>(place.item);
  const int64_t begin = p.slots.offsets[expert] * p.slots.tokens.divisor;
  const int64_t rows = p.slots.offsets[expert + 1] * p.slots.tokens.divisor - begin;
  const float* parts = p.parts + int64_t{first_piece(begin, expert, MLP_TILE)} * 2 * p.width + place.column;
  const auto count = static_cast<int32_t>(2 * ceil_div(rows, MLP_TILE));
  store_bias<Format>(p, place, sum_rows(place.column < p.width ? count : 0, [&](int32_t part) {
    return *reinterpret_cast<const float2*>(parts + int64_t{part} * p.width);
  }));
}

template <class Format>
__global__ void __launch_bounds__(SUM_LANES* SUM_ROWS) bias2_grad_kernel(const __grid_constant__ BiasGrad p) {
  const SumPlace place = place_sum(p.width);
  const auto first = static_cast<int32_t>(p.slots.offsets[place.item]);
  const auto count = static_cast<int32_t>(p.slots.offsets[place.item + 1]) - first;
  store_bias<Format>(p, place, sum_rows(place.column < p.width ? count : 0, [&](int32_t i) {
    const auto slot = static_cast<int32_t>(p.slots.slot_order[first + i]);
    const float gate = p.gates[slot];
    const float2 sum = *reinterpret_cast<const float2*>(
        p.parts + int64_t{divide(slot, p.slots.top_k)} * p.width + place.column);
    return make_float2(gate * sum.x, gate * sum.y);
  }));
}

constexpr int GATE_THREADS = 128;  // a warp does a slot

template <class Format>
__global__ void __launch_bounds__(GATE_THREADS) gate_grad_kernel(const __grid_constant__ GateGrad p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t position = int64_t{blockIdx.x} * (GATE_THREADS / 32) + threadIdx.x / 32;
  if (position >= p.slots.num_slots) return;
  int32_t begun = 0;
  for (int32_t e = lane; e < p.slots.num_experts; e += 32) begun += p.slots.offsets[e] <= position;
  const int32_t expert = warp_sum(begun) - 1;
  const int32_t tokens = p.slots.tokens.divisor;
  const auto slot = static_cast<int32_t>(p.slots.slot_order[position]);
  const int64_t rows = int64_t{p.slots.num_slots} * tokens;
  float acc = 0.0f;
  for (int32_t part = 0; part < p.num_parts; ++part) {
    const float* of_slot = p.gate_parts + part * rows + position * tokens;
    for (int32_t token = lane; token < tokens; token += 32) acc += of_slot[token];
  }
  const float* sums = p.sums + int64_t{divide(slot, p.slots.top_k)} * p.dim;
  const uint16_t* bias = p.bias + int64_t{expert} * p.dim;
  for (int32_t d = 2 * lane; d < p.dim; d += 64) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(bias + d);
    acc = fmaf(sums[d], Format::low(word), acc);
    acc = fmaf(sums[d + 1], Format::high(word), acc);
  }
  for (int bit = 16; bit > 0; bit /= 2) acc += __shfl_xor_sync(0xffffffffu, acc, bit);
  if (lane == 0) p.dgates[slot] = acc;
}

}  // namespace

cudaError_t to_hidden_grad(const HiddenGrad& p, bool bfloat16, cudaStream_t stream) {
  const int64_t blocks = row_tiles(p.slots) * ceil_div(p.hidden, MLP_TILE);
  return launch_product(bfloat16 ? to_hidden_grad_kernel<Bfloat16> : to_hidden_grad_kernel<Float16>, p, blocks, stream);
}

cudaError_t image_sum(const ImageSum& p, bool bfloat16, cudaStream_t stream) {
  return launch_blocks(bfloat16 ? image_sum_kernel<Bfloat16> : image_sum_kernel<Float16>, p,
                       p.images * ceil_div(p.dim, SUM_COLUMNS), SUM_LANES * SUM_ROWS, 0, stream);
}

cudaError_t gate_grad(const GateGrad& p, bool bfloat16, cudaStream_t stream) {
  return launch_blocks(bfloat16 ? gate_grad_kernel<Bfloat16> : gate_grad_kernel<Float16>, p,
                       ceil_div(p.slots.num_slots, GATE_THREADS / 32), GATE_THREADS, 0, stream);
}

cudaError_t bias1_grad(const BiasGrad& p, bool bfloat16, cudaStream_t stream) {
  return launch_blocks(bfloat16 ? bias1_grad_kernel<Bfloat16> : bias1_grad_kernel<Float16>, p,
                       p.slots.num_experts * ceil_div(p.width, SUM_COLUMNS), SUM_LANES * SUM_ROWS, 0, stream);
}

cudaError_t bias2_grad(const BiasGrad& p, bool bfloat16, cudaStream_t stream) {
  return launch_blocks(bfloat16 ? bias2_grad_kernel<Bfloat16> : bias2_grad_kernel<Float16>, p,
                       p.slots.num_experts * ceil_div(p.width, SUM_COLUMNS), SUM_LANES * SUM_ROWS, 0, stream);
}

}  // namespace dex
