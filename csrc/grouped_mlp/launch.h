// How the kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include "grouped_mlp/tiles.h"

namespace dex {

// One launch of a kernel whose only parameter is a record.
template <class Parameters>
cudaError_t launch_blocks(void (*kernel)(Parameters), const Parameters& parameters, int64_t blocks, int threads,
                          int shared, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  Parameters copy = parameters;
  void* arguments[] = {&copy};
  return cudaLaunchKernel(kernel, static_cast<unsigned>(blocks), threads, arguments, shared, stream);
}

// A product's: more shared memory than a kernel has without asking.
template <class Parameters>
cudaError_t launch_product(void (*kernel)(Parameters), const Parameters& parameters, int64_t blocks,
                           cudaStream_t stream) {
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MLP_SHARED)) return error;
  return launch_blocks(kernel, parameters, blocks, MLP_THREADS, MLP_SHARED, stream);
}

}  // namespace dex
