// The table of tensors travels by value as a kernel parameter: the launch copies it, so nothing on the host must
// outlive the call or the capture of a CUDA graph, and neither a buffer on the device nor a copy to it is needed.
// Parameters of more than 4 KB need CUDA 12.1; the usual model fits in the small table, which costs less to copy.
#include <cuda_runtime.h>

#include <algorithm>

#include "group_ema/launcher.h"

namespace dex {
namespace {

constexpr int SMALL = 60, LARGE = 500;

template <int CAPACITY>
struct Table {
  int64_t tiles;
  int64_t count;
  GroupEmaTensor tensors[CAPACITY];
};

static_assert(sizeof(Table<SMALL>) + sizeof(GroupEmaScalars) <= 4096);
static_assert(sizeof(Table<LARGE>) + sizeof(GroupEmaScalars) <= 32764);

template <int CAPACITY>
__global__ void __launch_bounds__(GROUP_EMA_THREADS, GROUP_EMA_BLOCKS_EACH)
    group_ema_kernel(const __grid_constant__ Table<CAPACITY> table, const __grid_constant__ GroupEmaScalars scalars) {
  group_ema_thread(table.tensors, static_cast<int>(table.count), table.tiles, scalars, blockIdx.x, gridDim.x,
                   static_cast<int>(threadIdx.x));
}

template <int CAPACITY>
cudaError_t launch(const GroupEmaTensor* tensors, int64_t count, GroupEmaScalars scalars, int multiprocessors,
                   cudaStream_t stream) {
  Table<CAPACITY> table;
  std::copy_n(tensors, count, table.tensors);
  table.count = count;
  table.tiles = place_tiles(table.tensors, count);
  if (table.tiles == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(grid_size(table.tiles, multiprocessors, GROUP_EMA_BLOCKS_EACH));
  void* arguments[] = {&table, &scalars};
  // Not <<<>>> and cudaGetLastError, which would report somebody else's earlier error as ours.
  return cudaLaunchKernel(group_ema_kernel<CAPACITY>, blocks, GROUP_EMA_THREADS, arguments, 0, stream);
}

}  // namespace

cudaError_t group_ema(const GroupEmaTensor* tensors, int64_t count, const GroupEmaScalars& scalars,
                      cudaStream_t stream) {
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
