// What bind.cpp calls. As every launcher it takes raw device pointers, sizes and a stream, launches on the current
// device, never waits for it, and returns the error of its own launch.
#pragma once

#include <cuda_runtime_api.h>

#include "group_ema/group_ema.h"

namespace dex {

// One launch for up to 500 tensors. first_tile and wide of the tensors need not be set.
cudaError_t group_ema(const GroupEmaTensor* tensors, int64_t count, const GroupEmaScalars& scalars,
                      cudaStream_t stream);

}  // namespace dex
