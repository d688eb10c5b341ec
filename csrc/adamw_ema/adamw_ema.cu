// The table of tensors travels by value as a kernel parameter, as that of group_ema_ does, and for its reasons.
#include <cuda_runtime.h>

#include <algorithm>

#include "adamw_ema/launcher.h"

namespace dex {
namespace {

constexpr int SMALL = 40, LARGE = 300;

template <int CAPACITY>
struct Table {
  int64_t tiles;
  int64_t count;
  AdamwTensor tensors[CAPACITY];
};

static_assert(sizeof(Table<SMALL>) + sizeof(AdamwScalars) <= 4096);
static_assert(sizeof(Table<LARGE>) + sizeof(AdamwScalars) <= 32764);

template <int CAPACITY>
__global__ void __launch_bounds__(ADAMW_THREADS, ADAMW_BLOCKS_EACH)
    adamw_ema_kernel(const __grid_constant__ Table<CAPACITY> table, const __grid_constant__ AdamwScalars scalars) {
  adamw_ema_thread(table.tensors, static_cast<int>(table.count), table.tiles, scalars, blockIdx.x, gridDim.x,
                   static_cast<int>(threadIdx.x));
}

template <int CAPACITY>
cudaError_t launch(const AdamwTensor* tensors, int64_t count, AdamwScalars scalars, int multiprocessors,
                   cudaStream_t stream) {
  Table<CAPACITY> table;
  std::copy_n(tensors, count, table.tensors);
  table.count = count;
  table.tiles = place_adamw_tiles(table.tensors, count);
  if (table.tiles == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(grid_size(table.tiles, multiprocessors, ADAMW_BLOCKS_EACH));
  void* arguments[] = {&table, &scalars};
  return cudaLaunchKernel(adamw_ema_kernel<CAPACITY>, blocks, ADAMW_THREADS, arguments, 0, stream);
}

}  // namespace

cudaError_t adamw_ema(const AdamwTensor* tensors, int64_t count, const AdamwScalars& scalars, cudaStream_t stream) {
  int device, multiprocessors;
  if (auto error = cudaGetDevice(&device)) return error;
  if (auto error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) return error;
  for (int64_t i = 0; i < count; i += LARGE) {
    const int64_t n = std::min<int64_t>(count - i, LARGE);
    const auto error = n <= SMALL ? launch<SMALL>(tensors + i, n, scalars, multiprocessors, stream)
                                  : launch<LARGE>(tensors + i, n, scalars, multiprocessors, stream);
    if (error) return error;
  }
  return cudaSuccess;
}

}  // namespace dex
