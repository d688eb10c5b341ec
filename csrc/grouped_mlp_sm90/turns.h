// Products for sm_90a: a warpgroup copies by TMA, two multiply by wgmma and take turns.
//
// A block does tiles of MLP_TILE x MLP_TILE sums, one after the other, as many blocks as multiprocessors. Steps of all
// its tiles go through one ring of stages. While one consumer is in its epilogue, the other one multiplies: a turn is
// passed on when the last product of a tile is issued, so that the tensor cores work on one tile at a time.
#pragma once

#include <cuda.h>

#include "common/launch.h"
#include "grouped_mlp/strips.h"
#include "grouped_mlp_sm90/boxes.h"
#include "grouped_mlp_sm90/ptx.h"

namespace dex {

constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;  // 3 x 128 threads share 65536

// The parameters of a kernel. of: slots, dim (of the sums) and hidden (the width of the result).
template <class Of>
struct Sm90Parameters {
  CUtensorMap rows[SM90_BOX_SIZES];  // boxes of 2^i rows
  CUtensorMap weight;
  Of of;
};

struct Shared {
  uint32_t base;

  __device__ __forceinline__ uint32_t rows(uint32_t stage) const { return base + stage * SM90_STEP_BYTES; }
  __device__ __forceinline__ uint32_t weight(uint32_t stage) const { return rows(stage) + SM90_OPERAND_BYTES; }
  __device__ __forceinline__ uint32_t full(uint32_t stage) const { return rows(SM90_STAGES) + stage * 8; }
  __device__ __forceinline__ uint32_t empty(uint32_t stage) const { return full(SM90_STAGES + stage); }
  __device__ __forceinline__ uint32_t turn(uint32_t consumer) const { return full(2 * SM90_STAGES + consumer); }
};

// SM90_PARTS numbers of this consumer, behind the barriers.
__device__ __forceinline__ float* own_parts(unsigned char* ring) {
  return reinterpret_cast<float*>(ring + SM90_STAGES * SM90_STEP_BYTES + SM90_BARRIERS * 8) +
         threadIdx.x / 128 * SM90_PARTS;
}

struct Tile {
  Piece piece;
  Place place;
  int32_t column;
  uint32_t number;  // among those of the block that have rows
};

template <class Of>
__device__ __forceinline__ int32_t num_steps(const Of& of) {
  return (of.dim + SM90_DEPTH - 1) / SM90_DEPTH;
}

// Calls with(tile) for the tiles of this block that have rows, in the same order in every warp.
template <class Of, class With>
__device__ __forceinline__ void for_each_tile(const Of& of, const With& with) {
  const auto rows = static_cast<uint32_t>(row_tiles(of.slots));
  const auto columns = static_cast<uint32_t>(ceil_div(of.hidden, MLP_TILE));
  uint32_t number = 0;
#pragma unroll 1
  for (uint32_t i = blockIdx.x; i < rows * columns; i += gridDim.x) {
    const Place place = place_block(i, rows, columns);
    const Piece piece = find_row_tile(of.slots, place.tile);
    if (piece.first >= piece.stop) continue;
    with(Tile{piece, place, static_cast<int32_t>(place.column) * MLP_TILE, number++});
  }
}

// One warp: its chunk of the rows, the first warp the weights too. DOWN: these are in rows of 64 columns, a term each.
template <bool DOWN, class Of>
__device__ __forceinline__ void produce(const Sm90Parameters<Of>& p, const Shared& shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = static_cast<int>(threadIdx.x) % 32;
  const int32_t row = warp * SM90_CHUNK + lane;
  const int32_t steps = num_steps(p.of);
  const uint32_t bytes = SM90_CHUNK * SM90_ROW_BYTES + (warp == 0 ? SM90_OPERAND_BYTES : 0);
  RingPlace at{0, 0};
  for_each_tile(p.of, [&](const Tile& tile) {
    const Box box = box_at(p.of.slots, tile.piece, row);
    const CUtensorMap* map = p.rows + max(box.log2, 0);
    const int32_t expert = tile.piece.expert;
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step, at = advance(at, 1)) {
      wait(shared.empty(at.stage), at.phase ^ 1);
      const int32_t k = step * SM90_DEPTH;
      const uint32_t full = shared.full(at.stage), weight = shared.weight(at.stage);
      if (lane == 0) {
        arrive_expecting(full, bytes);
        if (warp == 0 && !DOWN) copy_box(weight, &p.weight, full, k, tile.column, expert);
        if (warp == 0 && DOWN) {
          copy_box(weight, &p.weight, full, tile.column, k, expert);
          copy_box(weight + SM90_OPERAND_BYTES / 2, &p.weight, full, tile.column + SM90_DEPTH, k, expert);
        }
      }
      __syncwarp();
      if (box.log2 >= 0)
        copy_box(shared.rows(at.stage) + row * SM90_ROW_BYTES, map, full, k, box.token, box.image);
    }
  });
}

// sums[m][i]: of row 64 m + the row of multiply_rows.
using TileSums = float[2][64];

// Returns while the last products are under way.
template <class Format, bool DOWN>
__device__ __forceinline__ void multiply_tile(const Shared& shared, RingPlace at, int32_t steps, TileSums& sums) {
  constexpr uint32_t HALF = SM90_OPERAND_BYTES / 2;  // 64 of the rows, and with DOWN of the columns
  constexpr int NEXT = DOWN ? 2048 >> 4 : 32 >> 4;
  const bool reports = threadIdx.x % 32 == 0;
  uint32_t before = 0;
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step, before = at.stage, at = advance(at, 1)) {
    wait(shared.full(at.stage), at.phase);
    const uint64_t rows = describe_operand(shared.rows(at.stage));
    const uint64_t weight = describe_operand(shared.weight(at.stage), DOWN ? HALF : 16);
    fence_products();
#pragma unroll
    for (int k = 0; k < SM90_DEPTH / 16; ++k)
#pragma unroll
      for (int m = 0; m < 2; ++m)
        multiply_rows<Format, DOWN>(sums[m], rows + 2 * k + m * (HALF >> 4), weight + NEXT * k, step > 0 || k > 0);
    commit_products();
    wait_for_products<1>();
    if (step > 0 && reports) arrive(shared.empty(before));
  }
}

// One warpgroup: every second tile. finish(tile, sums) is its epilogue.
template <class Format, bool DOWN, class Of, class Finish>
__device__ __forceinline__ void consume(const Of& of, const Shared& shared, const Finish& finish) {
  const uint32_t consumer = threadIdx.x / 128;
  const bool reports = threadIdx.x % 32 == 0;
  const auto steps = static_cast<uint32_t>(num_steps(of));
  TileSums sums = {};
  RingPlace at{0, 0};
  for_each_tile(of, [&](const Tile& tile) {
    const RingPlace first = at;
    at = advance(at, steps);
    if (tile.number % SM90_CONSUMERS != consumer) return;
    // The first consumer's first turn needs no one to pass it on.
    wait(shared.turn(consumer), (tile.number / SM90_CONSUMERS + (consumer == 0)) % 2);
    multiply_tile<Format, DOWN>(shared, first, static_cast<int32_t>(steps), sums);
    if (reports) arrive(shared.turn(1 - consumer));
    wait_for_products<0>();
    if (reports) arrive(shared.empty(advance(first, steps - 1).stage));
    finish(tile, sums);
  });
}

// The body of a kernel of SM90_THREADS threads. ring: SM90_SHARED bytes at a multiple of 1024.
template <class Format, bool DOWN, class Of, class Finish>
__device__ __forceinline__ void take_turns(const Sm90Parameters<Of>& p, unsigned char* ring, const Finish& finish) {
  const Shared shared{shared_address(ring)};
  if (threadIdx.x == 0) {
    for (uint32_t stage = 0; stage < SM90_STAGES; ++stage) {
      init_barrier(shared.full(stage), 4);   // the warps that copy
      init_barrier(shared.empty(stage), 4);  // the warps of a consumer
    }
    for (uint32_t i = 0; i < SM90_CONSUMERS; ++i) init_barrier(shared.turn(i), 4);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128 * SM90_CONSUMERS) {
    take_registers<CONSUMER_REGISTERS>();
    consume<Format, DOWN>(p.of, shared, finish);
  } else {
    give_up_registers<PRODUCER_REGISTERS>();
    produce<DOWN>(p, shared);
  }
}

}  // namespace dex
