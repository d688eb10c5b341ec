// Forward 1 for sm_90a.
#include "grouped_mlp/gelu.h"
#include "grouped_mlp_sm90/launcher.h"
#include "grouped_mlp_sm90/maps.h"
#include "grouped_mlp_sm90/turns.h"

namespace dex {
namespace {

template <class Format>
__device__ __forceinline__ void finish_fc1(const Fc1& p, const Tile& tile, const TileSums& sums) {
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const Lane at;
  const uint16_t* bias = p.bias + int64_t{tile.piece.expert} * p.hidden;
  const bool saves = p.z != nullptr && tile.piece.expert < p.slots.num_experts;
#pragma unroll
  for (int group = 0; group < 4; ++group) {  // 32 columns
    const int32_t first = tile.column + group * 32, own = first + at.in_quad() * 8;
    float added[8];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int32_t column = first + 8 * n + 2 * at.in_quad();
      const uint32_t word = column < p.hidden ? *reinterpret_cast<const uint32_t*>(bias + column) : 0;
      added[2 * n] = Format::low(word);
      added[2 * n + 1] = Format::high(word);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = m * 64 + warp * 16 + half * 8 + at.quad();
        const bool inside = row < tile.piece.stop - tile.piece.first && own < p.hidden;
        const int64_t to = (int64_t{tile.piece.first} + row) * p.hidden + own;
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = sums[m][(4 * group + i / 2) * 4 + 2 * half + i % 2] + added[i];
        if (saves) store_strip<Format>(p.z + to, values, inside);
#pragma unroll
        for (float& value : values) value *= normal_at(value).cdf;
        store_strip<Format>(p.a + to, values, inside);
      }
  }
}

template <class Format>
__global__ void __launch_bounds__(SM90_THREADS, 1) fc1_sm90_kernel(const __grid_constant__ Sm90Parameters<Fc1> p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char ring[];
  take_turns<Format, false>(
      p, ring, [&](const Tile& tile, const TileSums& sums) { finish_fc1<Format>(p.of, tile, sums); });
#else
  __trap();  // fc1_sm90() launches it on compute capability 9.0 alone
#endif
}

}  // namespace

cudaError_t fc1_sm90(const Fc1& p, bool bfloat16, cudaStream_t stream) {
  const int64_t tiles = row_tiles(p.slots) * ceil_div(p.hidden, MLP_TILE);
  if (p.slots.num_slots == 0 || tiles == 0) return cudaSuccess;
  const Ability ability = sm90_ability();
  if (ability.error) return ability.error;
  Sm90Parameters<Fc1> parameters;
  parameters.of = p;
  if (auto error = make_row_maps(parameters.rows, p.x, p.slots, p.dim, bfloat16)) return error;
  const int64_t matrices = p.slots.num_experts + (p.slots.director_images > 0);
  const MapShape shape = map_shape(matrices, p.hidden, p.dim, p.weight.matrix_stride, p.weight.row_stride, MLP_TILE);
  if (auto error = make_map(&parameters.weight, p.weight.base, shape, bfloat16)) return error;
  return launch_turns(bfloat16 ? fc1_sm90_kernel<Bfloat16> : fc1_sm90_kernel<Float16>, parameters, tiles,
                      ability.multiprocessors, stream);
}

}  // namespace dex
