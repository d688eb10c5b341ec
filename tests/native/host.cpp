// csrc's host code behind C functions: what a kernel computes, without a GPU. Compiled and loaded by conftest.py.
#include <cstdint>
#include <vector>

#include "group_ema/group_ema.h"

namespace {

struct Item {
  int64_t first_tile;
  int64_t numel;
};

}  // namespace

extern "C" {

void host_gelu(const float* x, float* value, float* grad, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    value[i] = dex::gelu(x[i]);
    grad[i] = dex::gelu_grad(x[i]);
  }
}

void host_ema_add(const float* acc, const float* scale, const float* value, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = dex::ema_add(acc[i], scale[i], value[i]);
}

void host_split_momentum(double m, float* keep_and_rest) {
  const auto s = dex::split_momentum(m);
  keep_and_rest[0] = s.keep;
  keep_and_rest[1] = s.rest;
}

void host_bfloat16(const float* x, uint16_t* bits, int64_t n) {
  for (int64_t i = 0; i < n; ++i) bits[i] = dex::bfloat16_bits(x[i]);
}

int host_tile_size() {
  return dex::GROUP_EMA_TILE;
}

int64_t host_grid_size(int64_t tiles, int64_t multiprocessors, int64_t blocks_each) {
  return dex::grid_size(tiles, multiprocessors, blocks_each);
}

// items [count, 2]: first tile, numel. piece: item, size, start.
void host_locate_tile(const int64_t* items, int count, int64_t tile, int tile_size, int64_t* piece) {
  std::vector<Item> list;
  for (int i = 0; i < count; ++i) list.push_back({items[2 * i], items[2 * i + 1]});
  const auto p = dex::locate_tile(list.data(), count, tile, tile_size);
  piece[0] = p.item;
  piece[1] = p.size;
  piece[2] = p.start;
}

// rows [count, 7] as bindings.cpp takes them. Runs every thread of every block, one after the other, as the kernel
// does; placed [count, 2] gets first_tile and wide. Returns the number of tiles.
int64_t host_group_ema(const int64_t* rows, int64_t count, double momentum, const void* momentum_at,
                       int momentum_is_double, const bool* skip_at, int64_t multiprocessors, int64_t* placed) {
  std::vector<dex::GroupEmaTensor> tensors;
  for (int64_t i = 0; i < count; ++i) tensors.push_back(dex::group_ema_tensor(rows + 7 * i));
  const int64_t tiles = dex::place_tiles(tensors.data(), count);
  for (int64_t i = 0; i < count; ++i) {
    placed[2 * i] = tensors[i].first_tile;
    placed[2 * i + 1] = tensors[i].wide;
  }
  const dex::GroupEmaScalars scalars{momentum, momentum_at, skip_at, momentum_is_double != 0};
  const int64_t blocks = dex::grid_size(tiles, multiprocessors, dex::GROUP_EMA_BLOCKS_EACH);
  for (int64_t block = 0; block < blocks; ++block)
    for (int thread = 0; thread < dex::GROUP_EMA_THREADS; ++thread)
      dex::group_ema_thread(tensors.data(), static_cast<int>(count), tiles, scalars, block, blocks, thread);
  return tiles;
}
}
