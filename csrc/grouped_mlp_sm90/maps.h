// Tensor maps, made by the driver without linking it, and launches of the kernels that take them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "grouped_mlp_sm90/turns.h"

namespace dex {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Null if the driver has none.
inline Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  const auto error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
  const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
  return error == cudaSuccess && status == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

inline cudaError_t make_map(CUtensorMap* map, const uint16_t* base, const MapShape& shape, bool bfloat16) {
  const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  const cuuint32_t along[3] = {1, 1, 1};
  const auto type = bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t size[3] = {shape.size[0], shape.size[1], shape.size[2]};
  const cuuint64_t stride[2] = {shape.stride[0], shape.stride[1]};
  const CUresult result = encode(map, type, 3, const_cast<uint16_t*>(base), size, stride, shape.box, along,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The maps of the images whose rows are multiplied.
inline cudaError_t make_row_maps(CUtensorMap (&maps)[SM90_BOX_SIZES], const Images& images, const MlpSlots& slots,
                                 int32_t dim, bool bfloat16) {
  const int64_t count = slots.num_slots / slots.top_k.divisor;
  for (int i = 0; i < SM90_BOX_SIZES; ++i) {
    const MapShape shape =
        map_shape(count, slots.tokens.divisor, dim, images.image_stride, images.token_stride, 1 << i);
    if (auto error = make_map(&maps[i], images.base, shape, bfloat16)) return error;
  }
  return cudaSuccess;
}

// Of the current device: an error unless it runs code for sm_90a.
struct Ability {
  cudaError_t error;
  int multiprocessors;
};

inline Ability sm90_ability() {
  int device = 0, major = 0, minor = 0, multiprocessors = 0;
  if (auto error = cudaGetDevice(&device)) return {error, 0};
  if (auto error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return {error, 0};
  if (auto error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) return {error, 0};
  if (major != 9 || minor != 0) return {cudaErrorNoKernelImageForDevice, 0};
  return {cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), multiprocessors};
}

template <class Of>
cudaError_t launch_turns(void (*kernel)(Sm90Parameters<Of>), Sm90Parameters<Of>& p, int64_t tiles, int multiprocessors,
                         cudaStream_t stream) {
  if (tiles > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SM90_SHARED)) return error;
  void* arguments[] = {&p};
  return cudaLaunchKernel(kernel, static_cast<unsigned>(grid_size(tiles, multiprocessors, 1)), SM90_THREADS, arguments,
                          SM90_SHARED, stream);
}

}  // namespace dex
