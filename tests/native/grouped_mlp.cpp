// csrc/grouped_mlp's launch arithmetic and GELU behind C functions. Compiled and loaded by test_grouped_mlp.py.
#include <cstdint>

#include "grouped_mlp/gelu.h"
#include "grouped_mlp/tiles.h"

extern "C" {

int host_tile() {
  return dex::MLP_TILE;
}

void host_divide(const int32_t* n, int64_t count, int32_t divisor, int32_t* out) {
  const dex::Divider by = dex::make_divider(divisor);
  for (int64_t i = 0; i < count; ++i) out[i] = dex::divide(n[i], by);
}

// pieces [max_pieces, 4]: expert, first, stop, number, each found by all lanes of a warp. Returns max_pieces.
int64_t host_pieces(const int64_t* offsets, int32_t num_experts, int32_t rows_each, int64_t size, int lanes,
                    int32_t* pieces) {
  const int64_t count = dex::max_pieces(offsets[num_experts] * rows_each, num_experts, size);
  for (int64_t i = 0; i < count; ++i) {
    const auto piece = static_cast<uint32_t>(i), each = static_cast<uint32_t>(size);
    int32_t begun = 0;
    for (int lane = 0; lane < lanes; ++lane)
      begun += dex::count_begun(offsets, num_experts, rows_each, each, piece, lane, lanes);
    const dex::Piece p = dex::piece_of(offsets, begun - 1, rows_each, each, piece);
    pieces[4 * i] = p.expert, pieces[4 * i + 1] = p.first, pieces[4 * i + 2] = p.stop, pieces[4 * i + 3] = p.number;
  }
  return count;
}

// Of every expert which of those that are cut it is, and its first part.
void host_parts(const int64_t* offsets, int32_t num_experts, int32_t most, int lanes, int64_t* first) {
  for (int32_t e = 0; e < num_experts; ++e) {
    int32_t rank = 0;
    for (int lane = 0; lane < lanes; ++lane) rank += dex::count_cut(offsets, e, most, lane, lanes);
    first[e] = dex::first_part(offsets, e, most, rank);
  }
}

void host_places(uint32_t tiles, uint32_t columns, uint32_t* places) {
  for (uint32_t block = 0; block < tiles * columns; ++block) {
    const dex::Place p = dex::place_block(block, tiles, columns);
    places[2 * block] = p.tile, places[2 * block + 1] = p.column;
  }
}

// sizes: E, S, images of the director, N, K. rows [(S + images) * N, 3]: slot, image, token. director [tiles, 3]: expert,
// first, stop. Returns the row tiles of a launch.
int64_t host_rows(const int64_t* slot_order, const int64_t* offsets, const int64_t* sizes, int32_t* rows,
                  int32_t* director) {
  const dex::MlpSlots s = dex::mlp_slots(slot_order, offsets, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]);
  for (int32_t row = 0; row < (sizes[1] + sizes[2]) * sizes[3]; ++row) {
    const dex::Row r = dex::locate_row(s, row);
    rows[3 * row] = r.slot, rows[3 * row + 1] = r.image, rows[3 * row + 2] = r.token;
  }
  for (uint32_t tile = 0; tile < dex::director_tiles(s); ++tile) {
    const dex::Piece p = dex::director_piece(s, tile);
    director[3 * tile] = p.expert, director[3 * tile + 1] = p.first, director[3 * tile + 2] = p.stop;
  }
  return dex::row_tiles(s);
}

void host_normal(const float* z, float* cdf, float* pdf, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const dex::NormalAt normal = dex::normal_at(z[i]);
    cdf[i] = normal.cdf;
    pdf[i] = normal.pdf;
  }
}
}
