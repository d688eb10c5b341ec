// adamw_ema_: GEMA of a director with its experts, AdamW of the experts, and bfloat16 copies of both, in one pass; and
// AdamW of every other parameter, which is a stack of one without a director. Many tensors in one launch.
//
// The spec is dexkernels/reference.py. The order per element is fixed and every fma is spelt out: neither the alignment
// nor the launch changes a bit. An expert of weight 0 adds nothing; where all weights are 0 the director keeps its bits.
//
// All but the launch is host code too: tests/native runs adamw_ema_thread for every thread of a launch.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/launch.h"
#include "common/math.h"

namespace dex {

struct AdamwTensor {
  float* parameter;  // expert e starts at parameter + e * numel, and so in gradient and moments
  const float* gradient;
  float* exp_avg;
  float* exp_avg_sq;
  float* director;       // or null
  uint16_t* copy;        // bfloat16 of the experts, then of the director, or null
  const float* weights;  // [num_experts], where there is a director
  const float* rates;    // 1 - lr * weight_decay, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
  int64_t numel;         // of one expert
  int64_t first_tile;    // set by place_adamw_tiles
  int32_t num_experts;
  int32_t wide;  // set by place_adamw_tiles: 16-byte accesses are allowed
};

constexpr int ADAMW_ROW = 10;

// Of one row of integers, as Python sends it: the eight addresses above in their order, numel, num_experts.
inline AdamwTensor adamw_tensor(const int64_t* row) {
  return {reinterpret_cast<float*>(row[0]),
          reinterpret_cast<const float*>(row[1]),
          reinterpret_cast<float*>(row[2]),
          reinterpret_cast<float*>(row[3]),
          reinterpret_cast<float*>(row[4]),
          reinterpret_cast<uint16_t*>(row[5]),
          reinterpret_cast<const float*>(row[6]),
          reinterpret_cast<const float*>(row[7]),
          row[8],
          0,
          static_cast<int32_t>(row[9]),
          0};
}

// Read where the kernel runs: a captured graph sees the values of its replay, and the host never waits for them.
struct AdamwScalars {
  const double* momentum_at;
  const float* clip_at;  // null: 1
  const bool* skip_at;   // null: never skip
  float beta1, rest1, beta2, rest2, eps;
};

constexpr int ADAMW_THREADS = 256;
constexpr int ADAMW_BLOCKS_EACH = 4;
constexpr int ADAMW_WIDTH = 4;  // elements of one expert by one thread: one 16-byte access of each array
constexpr int ADAMW_TILE = ADAMW_THREADS * ADAMW_WIDTH;

// Numbers the tiles of all tensors through and chooses their width of access; returns the number of tiles.
inline int64_t place_adamw_tiles(AdamwTensor* tensors, int64_t count) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) {
    AdamwTensor& t = tensors[i];
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(t.parameter) | reinterpret_cast<uintptr_t>(t.gradient) |
                                reinterpret_cast<uintptr_t>(t.exp_avg) | reinterpret_cast<uintptr_t>(t.exp_avg_sq) |
                                reinterpret_cast<uintptr_t>(t.director);
    const bool rows_fit = (t.num_experts <= 1 && t.copy == nullptr) || t.numel % ADAMW_WIDTH == 0;
    t.wide = addresses % 16 == 0 && reinterpret_cast<uintptr_t>(t.copy) % 8 == 0 && rows_fit;
    t.first_tile = tiles;
    tiles += ceil_div(t.numel, ADAMW_TILE);
  }
  return tiles;
}

struct AdamwRates {
  float keep, rate, root, clip;
};

template <int WIDTH>
struct alignas(sizeof(float) * WIDTH) Floats {
  float at[WIDTH];
};

DEX_HD void adamw_element(float& p, float g, float& exp_avg, float& exp_avg_sq, const AdamwScalars& s,
                          const AdamwRates& r) {
  g *= r.clip;
  exp_avg = fmaf(s.beta1, exp_avg, s.rest1 * g);
  exp_avg_sq = fmaf(s.beta2, exp_avg_sq, s.rest2 * g * g);
  p = fmaf(-r.rate, exp_avg / fmaf(sqrtf(exp_avg_sq), r.root, s.eps), r.keep * p);
}

template <int WIDTH>
DEX_HD void store_copy(const Floats<WIDTH>& x, uint16_t* to) {
  if (WIDTH == 1) {
    *to = bfloat16_bits(x.at[0]);
    return;
  }
  uint64_t word = 0;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) word |= uint64_t{bfloat16_bits(x.at[i])} << 16 * i;
  *reinterpret_cast<uint64_t*>(to) = word;
}

// The WIDTH elements from at on, of every expert in turn, of the director and of the copies.
template <int WIDTH>
DEX_HD void adamw_pack(const AdamwTensor& t, int64_t at, const AdamwScalars& s, const AdamwRates& r, Momentum m,
                       bool moves) {
  using Pack = Floats<WIDTH>;
  Pack d{};
  if (t.director != nullptr) d = *reinterpret_cast<const Pack*>(t.director + at);
  if (moves) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) d.at[i] *= m.keep;
  }
  int64_t of_expert = at;
  for (int e = 0; e < t.num_experts; ++e, of_expert += t.numel) {
    Pack p = *reinterpret_cast<const Pack*>(t.parameter + of_expert);
    const Pack g = *reinterpret_cast<const Pack*>(t.gradient + of_expert);
    Pack exp_avg = *reinterpret_cast<const Pack*>(t.exp_avg + of_expert);
    Pack exp_avg_sq = *reinterpret_cast<const Pack*>(t.exp_avg_sq + of_expert);
    const float weight = moves ? t.weights[e] : 0.0f;
    if (weight != 0.0f) {
      const float scale = m.rest * weight;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) d.at[i] = ema_add(d.at[i], scale, p.at[i]);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) adamw_element(p.at[i], g.at[i], exp_avg.at[i], exp_avg_sq.at[i], s, r);
    *reinterpret_cast<Pack*>(t.parameter + of_expert) = p;
    *reinterpret_cast<Pack*>(t.exp_avg + of_expert) = exp_avg;
    *reinterpret_cast<Pack*>(t.exp_avg_sq + of_expert) = exp_avg_sq;
    if (t.copy != nullptr) store_copy<WIDTH>(p, t.copy + of_expert);
  }
  if (moves) *reinterpret_cast<Pack*>(t.director + at) = d;
  if (t.copy != nullptr) store_copy<WIDTH>(d, t.copy + of_expert);
}

// What one thread does of one tile.
DEX_HD void adamw_tile(const AdamwTensor* tensors, int count, int64_t tile, int thread, const AdamwScalars& s,
                       Momentum m, float clip) {
  const TilePiece piece = locate_tile(tensors, count, tile, ADAMW_TILE);
  const AdamwTensor t = tensors[piece.item];
  const AdamwRates r{t.rates[0], t.rates[1], t.rates[2], clip};
  bool moves = false;
  if (t.director != nullptr)
    for (int e = 0; e < t.num_experts; ++e) moves = moves || t.weights[e] != 0.0f;
  if (t.wide && ADAMW_WIDTH * thread + ADAMW_WIDTH <= piece.size)
    adamw_pack<ADAMW_WIDTH>(t, piece.start + ADAMW_WIDTH * thread, s, r, m, moves);
  // One by one: all elements, or the up to three after the last whole pack.
  for (int at = (t.wide ? piece.size & ~3 : 0) + thread; at < piece.size; at += ADAMW_THREADS)
    adamw_pack<1>(t, piece.start + at, s, r, m, moves);
}

// What one thread of a launch does: the kernel's whole body.
DEX_HD void adamw_ema_thread(const AdamwTensor* tensors, int count, int64_t tiles, const AdamwScalars& scalars,
                             int64_t block, int64_t blocks, int thread) {
  if (scalars.skip_at != nullptr && *scalars.skip_at) return;
  const Momentum m = split_momentum(*scalars.momentum_at);
  const float clip = scalars.clip_at == nullptr ? 1.0f : *scalars.clip_at;
  for (int64_t tile = block; tile < tiles; tile += blocks) adamw_tile(tensors, count, tile, thread, scalars, m, clip);
}

}  // namespace dex
