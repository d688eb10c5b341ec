// dgrad 2 for sm_90a: back through the second layer and the GELU.
#include "grouped_mlp/gelu.h"
#include "grouped_mlp_sm90/launcher.h"
#include "grouped_mlp_sm90/maps.h"
#include "grouped_mlp_sm90/turns.h"

namespace dex {
namespace {

// The sum of value j over all eight quads, in the lanes of quad j. Each exchange halves the values of a lane.
[[maybe_unused]] __device__ __forceinline__ float sum_over_quads(float (&values)[8]) {
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

// dz, g a and the sums of eight columns, whose da are given; returns da . a of them. column_sums: of dz.
template <class Format>
__device__ __forceinline__ float strip_through_gelu(const HiddenGrad& p, const float (&da)[8], float gate, int64_t at,
                                                    bool inside, float (&column_sums)[8]) {
  uint32_t z[4], gated[4], dz[4];
  float dot = 0.0f;
  load_words(p.z + at, z, inside);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float a[2] = {Format::low(z[n]), Format::high(z[n])}, grad[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const NormalAt normal = normal_at(a[j]);
      grad[j] = da[2 * n + j] * gate * fmaf(a[j], normal.pdf, normal.cdf);
      column_sums[2 * n + j] += grad[j];
      a[j] *= normal.cdf;
      dot = fmaf(da[2 * n + j], a[j], dot);
    }
    gated[n] = Format::pack(gate * a[0], gate * a[1]);
    dz[n] = Format::pack(grad[0], grad[1]);
  }
  if (p.gated != nullptr) store_words(p.gated + at, gated, inside);
  if (p.dz != nullptr) store_words(p.dz + at, dz, inside);
  return dot;
}

// Of the rows of this thread the gates; 0 past the last row.
struct RowGates {
  float of[2][2];

  __device__ __forceinline__ RowGates(const HiddenGrad& p, const Piece& piece, int first) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t row = first + i / 2 * 64 + i % 2 * 8;
      of[i / 2][i % 2] =
          row < piece.stop - piece.first ? p.gates[locate_row(p.slots, piece.first + row).slot] : 0.0f;
    }
  }
};

// parts: SM90_PARTS numbers, [half of the tile][warp][column].
template <class Format>
__device__ __forceinline__ void finish_hidden_grad(const HiddenGrad& p, const Tile& tile, const TileSums& sums,
                                                   float* parts) {
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const uint32_t barrier = 1 + threadIdx.x / 128;
  const Lane at;
  const int first = warp * 16 + at.quad();
  const RowGates gates(p, tile.piece, first);
  const int64_t num_rows = int64_t{p.slots.num_slots} * p.slots.tokens.divisor;
  if (p.bias_parts != nullptr) sync_warpgroup(barrier);  // all have read the parts of the tile before
#pragma unroll
  for (int group = 0; group < 4; ++group) {  // 32 columns
    const int32_t own = tile.column + group * 32 + at.in_quad() * 8;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float column_sums[8] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = m * 64 + half * 8 + first;
        const bool valid = row < tile.piece.stop - tile.piece.first;
        const int64_t number = int64_t{tile.piece.first} + row;
        float da[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) da[i] = sums[m][(4 * group + i / 2) * 4 + 2 * half + i % 2];
        float dot = strip_through_gelu<Format>(p, da, gates.of[m][half], number * p.hidden + own,
                                               valid && own < p.hidden, column_sums);
        dot += __shfl_xor_sync(0xffffffffu, dot, 1);
        dot += __shfl_xor_sync(0xffffffffu, dot, 2);
        const int64_t part = int64_t{tile.place.column} * 4 + group;
        if (p.gate_parts != nullptr && valid && at.in_quad() == 0) p.gate_parts[part * num_rows + number] = dot;
      }
      const float sum = sum_over_quads(column_sums);
      const int column = group * 32 + at.quad() / 2 * 8 + at.in_quad() * 2 + at.quad() % 2;
      if (p.bias_parts != nullptr) parts[(m * 4 + warp) * MLP_TILE + column] = sum;
    }
  }
  if (p.bias_parts == nullptr) return;
  sync_warpgroup(barrier);
  const int column = static_cast<int>(threadIdx.x) % 128;
  if (tile.column + column >= p.hidden) return;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += parts[(m * 4 + i) * MLP_TILE + column];
    p.bias_parts[(int64_t{tile.place.tile} * 2 + m) * p.hidden + tile.column + column] = sum;
  }
}

template <class Format>
__global__ void __launch_bounds__(SM90_THREADS, 1)
    hidden_grad_sm90_kernel(const __grid_constant__ Sm90Parameters<HiddenGrad> p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char ring[];
  take_turns<Format, true>(p, ring, [&](const Tile& tile, const TileSums& sums) {
    finish_hidden_grad<Format>(p.of, tile, sums, own_parts(ring));
  });
#else
  __trap();  // to_hidden_grad_sm90() launches it on compute capability 9.0 alone
#endif
}

}  // namespace

cudaError_t to_hidden_grad_sm90(const HiddenGrad& p, bool bfloat16, cudaStream_t stream) {
  const int64_t tiles = row_tiles(p.slots) * ceil_div(p.hidden, MLP_TILE);
  if (p.slots.num_slots == 0 || tiles == 0) return cudaSuccess;
  const Ability ability = sm90_ability();
  if (ability.error) return ability.error;
  Sm90Parameters<HiddenGrad> parameters;
  parameters.of = p;
  if (auto error = make_row_maps(parameters.rows, p.grad_out, p.slots, p.dim, bfloat16)) return error;
  const MapShape shape =
      map_shape(p.slots.num_experts, p.dim, p.hidden, p.weight.matrix_stride, p.weight.row_stride, SM90_DEPTH);
  if (auto error = make_map(&parameters.weight, p.weight.base, shape, bfloat16)) return error;
  return launch_turns(bfloat16 ? hidden_grad_sm90_kernel<Bfloat16> : hidden_grad_sm90_kernel<Float16>, parameters,
                      tiles, ability.multiprocessors, stream);
}

}  // namespace dex
