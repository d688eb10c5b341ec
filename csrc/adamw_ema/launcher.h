// What bind.cpp calls: raw device pointers, sizes and a stream; launches on the current device, never waits for it, and
// returns the error of its own launch.
#pragma once

#include <cuda_runtime_api.h>

#include "adamw_ema/adamw_ema.h"

namespace dex {

// One launch for up to 300 tensors. first_tile and wide of the tensors need not be set.
cudaError_t adamw_ema(const AdamwTensor* tensors, int64_t count, const AdamwScalars& scalars, cudaStream_t stream);

}  // namespace dex
