// Forward 1 and dgrad 2 of grouped_mlp by TMA and wgmma: the contracts of fc1() and to_hidden_grad(), on devices of
// compute capability 9.0. Another device is cudaErrorNoKernelImageForDevice, strides that no tensor map can have are
// cudaErrorInvalidValue.
#pragma once

#include "grouped_mlp/launcher.h"

namespace dex {

cudaError_t fc1_sm90(const Fc1& p, bool bfloat16, cudaStream_t stream);
cudaError_t to_hidden_grad_sm90(const HiddenGrad& p, bool bfloat16, cudaStream_t stream);

}  // namespace dex
