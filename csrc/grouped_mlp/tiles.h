// Which rows a block computes: pure functions that the kernels use and tests/native checks on the host.
//
// The S*N rows of a grouped product are numbered in slot order: row m is token m % N of slot slot_order[m / N], and
// expert e owns the rows offsets[e] * N up to offsets[e + 1] * N. The director's rows, one slot an image, come behind.
// Each expert's rows are cut into pieces of one size. The pieces of expert e are numbered from begin / size + e on,
// where begin is its first row: these numbers do not overlap, and no block has to add up how many pieces come before.
// At most one number of each expert stands for no rows.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace dex {

constexpr int MLP_TILE = 128;  // rows and columns of a block of output
constexpr int MLP_DEPTH = 32;  // elements of the sum in one step
constexpr int MLP_STAGES = 4;  // steps in shared memory
constexpr int MLP_THREADS = 256;
constexpr int MLP_GROUP = 8;  // row tiles that go through the columns together and share what L2 holds
constexpr int MLP_STEP_BYTES = 2 * MLP_TILE * MLP_DEPTH * 2;
constexpr int MLP_SHARED = MLP_STAGES * MLP_STEP_BYTES;

// n / divisor for 0 <= n < 2^31, as a product.
struct Divider {
  uint32_t multiplier;
  int32_t shift;
  int32_t divisor;
};

// multiplier = ceil(2^shift / divisor), and 2^(shift - 31) >= divisor. The product exceeds n / divisor by less than
// n / 2^shift < 1 / divisor, which changes no quotient.
inline Divider make_divider(int32_t divisor) {
  int32_t bits = 0;
  while ((int64_t{1} << bits) < divisor) ++bits;
  const uint64_t power = uint64_t{1} << (31 + bits);
  return {static_cast<uint32_t>((power + divisor - 1) / divisor), 31 + bits, divisor};
}

DEX_HD int32_t divide(int32_t n, Divider by) {
  return static_cast<int32_t>(uint64_t{static_cast<uint32_t>(n)} * by.multiplier >> by.shift);
}

// The routing. director_images: B, or 0 without a director.
struct MlpSlots {
  const int64_t* slot_order;  // [S]
  const int64_t* offsets;     // [E + 1]
  int32_t num_experts;
  int32_t num_slots;
  int32_t director_images;
  Divider tokens;
  Divider top_k;
};

inline MlpSlots mlp_slots(const int64_t* slot_order, const int64_t* offsets, int64_t num_experts, int64_t num_slots,
                          int64_t director_images, int64_t tokens, int64_t top_k) {
  return {slot_order,
          offsets,
          static_cast<int32_t>(num_experts),
          static_cast<int32_t>(num_slots),
          static_cast<int32_t>(director_images),
          make_divider(static_cast<int32_t>(tokens)),
          make_divider(static_cast<int32_t>(top_k))};
}

// Rows first up to stop of an expert; none where the two are equal. number: of the piece among those of its expert.
struct Piece {
  int32_t expert;
  int32_t first;
  int32_t stop;
  int32_t number;
};

// Number of the first piece of an expert whose rows begin at begin.
DEX_HD uint32_t first_piece(int64_t begin, int32_t expert, uint32_t size) {
  return static_cast<uint32_t>(begin) / size + expert;
}

// How many of the experts lane, lane + lanes, ... begin at piece or before. The sum over all lanes, less 1, is the
// expert of the piece. rows_each: of a slot.
DEX_HD int32_t count_begun(const int64_t* offsets, int32_t num_experts, int32_t rows_each, uint32_t size,
                           uint32_t piece, int lane, int lanes) {
  int32_t count = 0;
  for (int32_t e = lane; e < num_experts; e += lanes) count += first_piece(offsets[e] * rows_each, e, size) <= piece;
  return count;
}

DEX_HD Piece piece_of(const int64_t* offsets, int32_t expert, int32_t rows_each, uint32_t size, uint32_t piece) {
  const int64_t begin = offsets[expert] * rows_each, stop = offsets[expert + 1] * rows_each;
  const int32_t number = static_cast<int32_t>(piece - first_piece(begin, expert, size));
  const int64_t first = begin + int64_t{number} * size;
  const int64_t end = first + size;
  return {expert, static_cast<int32_t>(first < stop ? first : stop), static_cast<int32_t>(end < stop ? end : stop),
          number};
}

// An upper bound of the numbers for any split of the rows over the experts: the host does not know the split.
DEX_HD int64_t max_pieces(int64_t rows, int64_t num_experts, int64_t size) {
  return rows / size + num_experts;
}

// The director's tile number tile, as expert num_experts.
DEX_HD Piece director_piece(const MlpSlots& s, uint32_t tile) {
  const int64_t begin = int64_t{s.num_slots} * s.tokens.divisor;
  const int64_t stop = begin + int64_t{s.director_images} * s.tokens.divisor;
  const int64_t first = begin + int64_t{tile} * MLP_TILE, end = first + MLP_TILE;
  return {s.num_experts, static_cast<int32_t>(first), static_cast<int32_t>(end < stop ? end : stop),
          static_cast<int32_t>(tile)};
}

DEX_HD int64_t director_tiles(const MlpSlots& s) {
  return (int64_t{s.director_images} * s.tokens.divisor + MLP_TILE - 1) / MLP_TILE;
}

// Row tiles of a launch: the director's first, then the pieces of the experts.
DEX_HD int64_t row_tiles(const MlpSlots& s) {
  return director_tiles(s) + max_pieces(int64_t{s.num_slots} * s.tokens.divisor, s.num_experts, MLP_TILE);
}

struct Place {
  uint32_t tile;
  uint32_t column;
};

// Row tile and column tile of a block.
DEX_HD Place place_block(uint32_t block, uint32_t tiles, uint32_t columns) {
  const uint32_t group = block / (MLP_GROUP * columns) * MLP_GROUP;
  const uint32_t size = tiles - group < MLP_GROUP ? tiles - group : MLP_GROUP;
  const uint32_t within = block % (MLP_GROUP * columns);
  return {group + within % size, within / size};
}

// Image and token of a row.
struct Row {
  int32_t slot;  // the director's are numbered behind the others
  int32_t image;
  int32_t token;
};

DEX_HD Row locate_row(const MlpSlots& s, int32_t row) {
  const int32_t position = divide(row, s.tokens), token = row - position * s.tokens.divisor;
  if (position >= s.num_slots) return {position, position - s.num_slots, token};
  const int32_t slot = static_cast<int32_t>(s.slot_order[position]);
  return {slot, divide(slot, s.top_k), token};
}

// How many of the experts lane, lane + lanes, ... before expert have more than most slots. The sum over all lanes is
// the rank of expert among those whose weight gradients are cut.
DEX_HD int32_t count_cut(const int64_t* offsets, int32_t expert, int32_t most, int lane, int lanes) {
  int32_t count = 0;
  for (int32_t e = lane; e < expert; e += lanes) count += offsets[e + 1] - offsets[e] > most;
  return count;
}

// The first part of an expert that is cut. All parts are fewer than S / most + S / (most + 1) + 1.
DEX_HD int64_t first_part(const int64_t* offsets, int32_t expert, int32_t most, int32_t rank) {
  return offsets[expert] / most + rank;
}

}  // namespace dex
