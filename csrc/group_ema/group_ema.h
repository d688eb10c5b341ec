// group_ema_: director <- m * director + (1 - m) * sum_e weights[e] * expert_e, in place, of many tensors in one
// launch.
//
// The spec is dexkernels/reference.py. An expert of weight exactly 0 is not read; where all weights are 0 nothing is
// written. The order per element is fixed: acc = m * director, then, e ascending,
// acc = fma((1 - m) * weights[e], expert_e, acc). So neither the alignment nor the launch changes a bit of the result.
//
// All but the launch is host code too: tests/native runs group_ema_thread for every thread of a launch.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "common/math.h"

namespace dex {

struct GroupEmaTensor {
  float* director;
  const float* experts;  // expert e starts at experts + e * expert_stride
  const float* weights;  // [num_experts]
  uint16_t* shadow;      // bfloat16 copy of the new director, or null
  int64_t numel;
  int64_t expert_stride;
  int64_t first_tile;  // set by place_tiles
  int32_t num_experts;
  int32_t wide;  // set by place_tiles: 16-byte accesses are allowed
};

// Of one row of integers, as Python sends it: director, experts, weights, shadow (addresses; shadow may be 0), numel,
// expert_stride, num_experts.
inline GroupEmaTensor group_ema_tensor(const int64_t* row) {
  return {reinterpret_cast<float*>(row[0]),
          reinterpret_cast<const float*>(row[1]),
          reinterpret_cast<const float*>(row[2]),
          reinterpret_cast<uint16_t*>(row[3]),
          row[4],
          row[5],
          0,
          static_cast<int32_t>(row[6]),
          0};
}

// Read where the kernel runs: a captured graph sees the values of its replay, and the host never waits for them.
struct GroupEmaScalars {
  double momentum;
  const void* momentum_at;  // null: momentum above; else a float, or a double if momentum_is_double
  const bool* skip_at;      // null: never skip
  bool momentum_is_double;
};

constexpr int GROUP_EMA_THREADS = 256;
// Resident on one multiprocessor: 64 KB on their way, about three times what the memory of an H100 needs. A third block
// would leave 80 registers a thread, which another compiler version may find too few; a spill fails the build.
constexpr int GROUP_EMA_BLOCKS_EACH = 2;
constexpr int GROUP_EMA_BYTES_AT_ONCE = 32;  // of one expert by one thread; two 16-byte loads
constexpr int GROUP_EMA_EXPERTS_AT_ONCE = 4;
constexpr int GROUP_EMA_TILE = GROUP_EMA_THREADS * GROUP_EMA_BYTES_AT_ONCE / sizeof(float);

// Numbers the tiles of all tensors through and chooses their width of access; returns the number of tiles.
inline int64_t place_tiles(GroupEmaTensor* tensors, int64_t count) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) {
    GroupEmaTensor& t = tensors[i];
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(t.director) | reinterpret_cast<uintptr_t>(t.experts);
    const bool stride_fits = t.num_experts <= 1 || t.expert_stride % 4 == 0;
    t.wide = addresses % 16 == 0 && stride_fits && reinterpret_cast<uintptr_t>(t.shadow) % 8 == 0;
    t.first_tile = tiles;
    tiles += ceil_div(t.numel, GROUP_EMA_TILE);
  }
  return tiles;
}

DEX_HD Momentum read_momentum(const GroupEmaScalars& s) {
  if (s.momentum_at == nullptr) return split_momentum(s.momentum);
  return split_momentum(s.momentum_is_double ? *static_cast<const double*>(s.momentum_at)
                                             : *static_cast<const float*>(s.momentum_at));
}

template <class T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Pack {
  T at[WIDTH];
};

DEX_HD void store_bfloat16(Pack<float, 1> x, uint16_t* to) {
  *to = bfloat16_bits(x.at[0]);
}

DEX_HD void store_bfloat16(Pack<float, 4> x, uint16_t* to) {
  // One word: the compiler would store four halves one by one.
  uint64_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) word |= uint64_t{bfloat16_bits(x.at[i])} << 16 * i;
  *reinterpret_cast<uint64_t*>(to) = word;
}

// Updates the packs of WIDTH elements at first, first + step, ..., COUNT of them, of which those count that lie wholly
// within the next left elements.
template <int WIDTH, int COUNT>
DEX_HD void update_packs(const GroupEmaTensor& t, int64_t first, int step, int left, Momentum m) {
  using Floats = Pack<float, WIDTH>;
  constexpr int AT_ONCE = GROUP_EMA_EXPERTS_AT_ONCE;
  float* director = t.director + first;
  Floats acc[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    if (k * step + WIDTH > left) continue;
    acc[k] = *reinterpret_cast<const Floats*>(director + k * step);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) acc[k].at[i] *= m.keep;
  }
  bool moved = false;
  const float* expert = t.experts + first;
  for (int e = 0; e < t.num_experts; e += AT_ONCE) {
    // All loads of several experts before their sums: enough bytes on the way to keep the memory busy.
    float weight[AT_ONCE];
    Floats value[AT_ONCE][COUNT];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) weight[j] = e + j < t.num_experts ? t.weights[e + j] : 0.0f;
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j, expert += t.expert_stride) {
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
        if (weight[j] == 0.0f || k * step + WIDTH > left) continue;
        value[j][k] = *reinterpret_cast<const Floats*>(expert + k * step);
      }
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      if (weight[j] == 0.0f) continue;
      moved = true;
      const float scale = m.rest * weight[j];
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
        if (k * step + WIDTH > left) continue;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) acc[k].at[i] = ema_add(acc[k].at[i], scale, value[j][k].at[i]);
      }
    }
  }
  if (!moved) return;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    if (k * step + WIDTH > left) continue;
    *reinterpret_cast<Floats*>(director + k * step) = acc[k];
  }
  if (t.shadow == nullptr) return;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    if (k * step + WIDTH > left) continue;
    store_bfloat16(acc[k], t.shadow + first + k * step);
  }
}

// What one thread does of one tile.
DEX_HD void update_tile(const GroupEmaTensor* tensors, int count, int64_t tile, int thread, Momentum m) {
  const TilePiece piece = locate_tile(tensors, count, tile, GROUP_EMA_TILE);
  const GroupEmaTensor t = tensors[piece.item];
  if (t.wide) {
    constexpr int PACKS = GROUP_EMA_BYTES_AT_ONCE / 16;
    const int at = 4 * thread;
    update_packs<4, PACKS>(t, piece.start + at, 4 * GROUP_EMA_THREADS, piece.size - at, m);
  }
  // One by one: all elements, or the up to three after the last whole pack.
  for (int at = (t.wide ? piece.size & ~3 : 0) + thread; at < piece.size; at += GROUP_EMA_THREADS)
    update_packs<1, 1>(t, piece.start + at, 1, piece.size - at, m);
}

// What one thread of a launch does: the kernel's whole body.
DEX_HD void group_ema_thread(const GroupEmaTensor* tensors, int count, int64_t tiles, const GroupEmaScalars& scalars,
                             int64_t block, int64_t blocks, int thread) {
  if (scalars.skip_at != nullptr && *scalars.skip_at) return;
  const Momentum m = read_momentum(scalars);
  for (int64_t tile = block; tile < tiles; tile += blocks) update_tile(tensors, count, tile, thread, m);
}

}  // namespace dex
