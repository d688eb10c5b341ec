// Launch arithmetic: pure functions that kernels use and tests/native checks on the host.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace dex {

DEX_HD int64_t ceil_div(int64_t a, int64_t b) {
  return a / b + (a % b != 0);
}

// Blocks of a grid-stride launch: block b does tiles b, b + grid, b + 2 * grid, ...
DEX_HD int64_t grid_size(int64_t tiles, int64_t multiprocessors, int64_t blocks_each) {
  const int64_t resident = multiprocessors * blocks_each;
  return tiles < resident ? tiles : resident;
}

// Index of the item that tile belongs to: the last one whose first_tile is not above it. Items are in ascending order
// of first_tile, the first has 0; an item without tiles shares its first_tile with its successor and is never returned.
template <class Item>
DEX_HD int find_item(const Item* items, int count, int64_t tile) {
  int low = 0, high = count;  // items[low].first_tile <= tile < items[high].first_tile
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (items[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct TilePiece {
  int item;
  int size;       // elements, 1 .. tile_size
  int64_t start;  // the first of them, within the item
};

// The elements that tile covers. Items have numel and first_tile, and ceil_div(numel, tile_size) tiles each.
template <class Item>
DEX_HD TilePiece locate_tile(const Item* items, int count, int64_t tile, int tile_size) {
  const int item = find_item(items, count, tile);
  const int64_t start = (tile - items[item].first_tile) * tile_size;
  const int64_t left = items[item].numel - start;
  return {item, left < tile_size ? static_cast<int>(left) : tile_size, start};
}

}  // namespace dex
