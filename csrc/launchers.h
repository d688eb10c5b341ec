// What bindings.cpp calls: launchers take raw device pointers, sizes and a stream, launch on the current device, never
// wait for it, and return the error of their own launch.
#pragma once

#include <cuda_runtime_api.h>

#include "group_ema.h"

namespace dex {

// One launch for up to 500 tensors. first_tile and wide of the tensors need not be set.
cudaError_t group_ema(const GroupEmaTensor* tensors, int64_t count, const GroupEmaScalars& scalars,
                      cudaStream_t stream);

}  // namespace dex
