// The host code of csrc/adamw_ema behind a C function: what its kernel computes, without a GPU.
#include <cstdint>
#include <vector>

#include "adamw_ema/adamw_ema.h"

extern "C" {

int host_adamw_tile() {
  return dex::ADAMW_TILE;
}

// rows [count, 10] as bind.cpp takes them. Runs every thread of every block, one after the other; wide [count].
int64_t host_adamw_ema(const int64_t* rows, int64_t count, const double* rule, const double* momentum_at,
                       const float* clip_at, const bool* skip_at, int64_t blocks, int64_t* wide) {
  std::vector<dex::AdamwTensor> tensors;
  for (int64_t i = 0; i < count; ++i) tensors.push_back(dex::adamw_tensor(rows + dex::ADAMW_ROW * i));
  const int64_t tiles = dex::place_adamw_tiles(tensors.data(), count);
  for (int64_t i = 0; i < count; ++i) wide[i] = tensors[i].wide;
  const dex::AdamwScalars scalars{momentum_at,
                                  clip_at,
                                  skip_at,
                                  static_cast<float>(rule[0]),
                                  static_cast<float>(rule[1]),
                                  static_cast<float>(rule[2]),
                                  static_cast<float>(rule[3]),
                                  static_cast<float>(rule[4])};
  for (int64_t block = 0; block < blocks; ++block)
    for (int thread = 0; thread < dex::ADAMW_THREADS; ++thread)
      dex::adamw_ema_thread(tensors.data(), static_cast<int>(count), tiles, scalars, block, blocks, thread);
  return tiles;
}
}
