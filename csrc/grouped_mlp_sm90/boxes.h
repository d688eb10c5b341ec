// Which boxes of a bulk tensor copy fetch the rows of a tile: pure functions that the kernels use and tests/native
// checks.
//
// The rows of a tile are those of grouped_mlp: consecutive in slot order, over the ends of images. Four warps copy
// SM90_CHUNK rows each. The rows of a chunk that lie in one image are cut into boxes of powers of two rows, the largest
// first, so that a few tensor maps, one a size, serve any number of tokens. Rows behind the last one are boxes behind
// the last token, which are zeros and are not read.
#pragma once

#include "grouped_mlp/tiles.h"

namespace dex {

constexpr int SM90_CHUNK = 32;      // rows that one warp copies, the most of a box
constexpr int SM90_BOX_SIZES = 6;   // 1, 2, 4, ..., SM90_CHUNK rows
constexpr int SM90_DEPTH = 64;      // elements of the sum in one step: a row is 128 bytes, the width of the swizzle
constexpr int SM90_STAGES = 6;      // steps in shared memory
constexpr int SM90_CONSUMERS = 2;   // warpgroups that multiply, each a tile of its own
constexpr int SM90_THREADS = 128 * (SM90_CONSUMERS + 1);
constexpr int SM90_ROW_BYTES = SM90_DEPTH * 2;
constexpr int SM90_OPERAND_BYTES = MLP_TILE * SM90_ROW_BYTES;
constexpr int SM90_STEP_BYTES = 2 * SM90_OPERAND_BYTES;
constexpr int SM90_BARRIERS = 2 * SM90_STAGES + SM90_CONSUMERS;
constexpr int SM90_PARTS = 4 * 2 * MLP_TILE;  // numbers of a consumer that its warps add up
constexpr int SM90_SHARED = SM90_STAGES * SM90_STEP_BYTES + SM90_CONSUMERS * SM90_PARTS * 4 + SM90_BARRIERS * 8;

// 2^log2 rows of an image from token on. log2 is -1 where no box begins.
struct Box {
  int32_t log2;
  int32_t image;
  int32_t token;
};

// The box that begins at row number row of a tile, 0 <= row < MLP_TILE.
DEX_HD Box box_at(const MlpSlots& s, const Piece& piece, int32_t row) {
  const int32_t tokens = s.tokens.divisor, rows = piece.stop - piece.first;
  const int32_t chunk = row / SM90_CHUNK * SM90_CHUNK, end = chunk + SM90_CHUNK;
  Box box{-1, 0, tokens};
  int32_t before, left;  // rows of this part of the chunk above row; from row on
  if (row < rows) {
    const Row at = locate_row(s, piece.first + row);
    box.image = at.image;
    box.token = at.token;
    before = at.token < row - chunk ? at.token : row - chunk;
    left = (rows < end ? rows : end) - row;
    left = tokens - at.token < left ? tokens - at.token : left;
  } else {
    before = row - (rows > chunk ? rows : chunk);
    left = end - row;
  }
  // Boxes begin where the larger powers of two of the part's length end: the rest is below the last of them.
  if (before == 0 || left < (before & -before))
    box.log2 = (left >= 2) + (left >= 4) + (left >= 8) + (left >= 16) + (left >= 32);
  return box;
}

// A step's place in the ring of stages, and how often the ring has been passed, modulo 2.
struct RingPlace {
  uint32_t stage;
  uint32_t phase;
};

DEX_HD RingPlace advance(RingPlace at, uint32_t steps) {
  const uint32_t stage = at.stage + steps;
  return {stage % SM90_STAGES, at.phase ^ (stage / SM90_STAGES & 1)};
}

// What a tensor map of three dimensions describes, the fastest first; strides in bytes.
struct MapShape {
  uint64_t size[3];
  uint64_t stride[2];
  uint32_t box[3];
};

// matrices of rows rows of width 16-bit elements, strides in elements. A dimension of length 1 may have any stride, of
// which cuTensorMapEncodeTiled would refuse some.
inline MapShape map_shape(int64_t matrices, int64_t rows, int64_t width, int64_t matrix_stride, int64_t row_stride,
                          int32_t box_rows) {
  const int64_t row = rows == 1 ? width : row_stride;
  const int64_t matrix = matrices == 1 ? rows * row : matrix_stride;
  return {{static_cast<uint64_t>(width), static_cast<uint64_t>(rows), static_cast<uint64_t>(matrices)},
          {static_cast<uint64_t>(row) * 2, static_cast<uint64_t>(matrix) * 2},
          {SM90_DEPTH, static_cast<uint32_t>(box_rows), 1}};
}

}  // namespace dex
