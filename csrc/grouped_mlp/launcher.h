// What bind.cpp calls: raw device pointers, sizes and a stream; launches on the current device, never waits for it, and
// returns the error of its own launch.
//
// Letters: B images, N tokens, D width, H hidden, E experts, K chosen, S = B*K slots. Elements are bfloat16 or float16.
// Addresses and strides are multiples of 16 bytes, those of biases of 4; D and H are multiples of 8. Strides count
// elements.
#pragma once

#include <cuda_runtime_api.h>

#include "grouped_mlp/tiles.h"

namespace dex {

struct Matrices {
  const uint16_t* base;
  int64_t matrix_stride;
  int64_t row_stride;
};

struct Images {
  const uint16_t* base;  // [B, N, .]
  int64_t image_stride;
  int64_t token_stride;
};

// z[m] = W1_e x[image, token] + b1_e and a[m] = gelu(z[m]) of every row m; the director's rows have no z.
struct Fc1 {
  Images x;
  Matrices weight;       // [E, H, D]
  const uint16_t* bias;  // [E, H]
  uint16_t* z;           // [S*N, H], or null
  uint16_t* a;           // [S*N + director, H]
  MlpSlots slots;
  int32_t dim;
  int32_t hidden;
};

// out[slot, token] = W_e rows[m] + bias_e of row m; the director's to director_out[image, token].
struct ToSlots {
  const uint16_t* rows;  // [S*N + director, depth]
  Matrices weight;       // [E, width, depth]; transposed: [E, depth, width]
  const uint16_t* bias;  // [E, width], or null
  uint16_t* out;         // [S, N, width]
  uint16_t* director_out;
  MlpSlots slots;
  int32_t depth;
  int32_t width;
};

// out[b] = sum_k gates[b, k] by_slot[b, k], k rising; without gates the sum.
struct Combine {
  const uint16_t* by_slot;  // [B, K, size]
  const float* gates;       // [B, K], or null
  uint16_t* out;            // [B, size]
  int64_t images;
  int64_t size;             // N * width
  int32_t top_k;
};

// Back through fc2 and the GELU. With da = dout[image, token] W2_e and a = gelu(z[m]) of row m and its gate g:
// dz[m] = g da gelu'(z[m]) and gated[m] = g a. bias_parts: dz summed over each half of each row tile. gate_parts: of
// each row da . a over each 32 columns. What is null is not written.
struct HiddenGrad {
  Images grad_out;
  Matrices weight;     // [E, D, H]
  const float* gates;  // [B, K]
  const uint16_t* z;   // [S*N, H]
  uint16_t* dz;        // [S*N, H]
  uint16_t* gated;     // [S*N, H]
  float* gate_parts;   // [4 ceil(H / MLP_TILE), S*N]
  float* bias_parts;   // [2 row tiles, H]
  MlpSlots slots;
  int32_t dim;
  int32_t hidden;
};

// sums[b] = sum_n grad_out[b, n].
struct ImageSum {
  Images grad_out;
  float* sums;  // [B, D]
  int64_t images;
  int32_t tokens;
  int32_t dim;
};

// dgates[slot] = sum of its gate_parts + sums[image] . b2_e.
struct GateGrad {
  const float* gate_parts;
  const float* sums;
  const uint16_t* bias;  // [E, D]
  float* dgates;         // [B, K]
  MlpSlots slots;
  int32_t num_parts;     // 4 ceil(H / MLP_TILE)
  int32_t dim;
};

// out[e]: of fc1 the sum of its bias_parts, of fc2 the sum over its slots of gate * sums[image].
struct BiasGrad {
  const float* parts;  // bias_parts or sums
  const float* gates;  // read for fc2 alone
  void* out;           // [E, width]
  MlpSlots slots;
  int32_t width;
  int32_t float_out;   // else of the elements' format
};

// out[e] = left^T right over the rows of expert e, [E, height, width]. One of the two is gathered from [B, N, .], the
// other is [S*N, .]. An expert with more than most slots is cut into pieces of most slots, whose sums go to parts.
struct WeightGrad {
  Images gathered;
  const uint16_t* rows;
  void* out;
  float* parts;  // [S / most + S / (most + 1), height, width]; null if S <= most
  MlpSlots slots;
  int32_t most;
  int32_t height;
  int32_t width;
  int32_t float_out;
};

cudaError_t fc1(const Fc1& p, bool bfloat16, cudaStream_t stream);
cudaError_t to_slots(const ToSlots& p, bool transposed, bool bfloat16, cudaStream_t stream);
cudaError_t combine(const Combine& p, bool bfloat16, cudaStream_t stream);
cudaError_t to_hidden_grad(const HiddenGrad& p, bool bfloat16, cudaStream_t stream);
cudaError_t image_sum(const ImageSum& p, bool bfloat16, cudaStream_t stream);
cudaError_t gate_grad(const GateGrad& p, bool bfloat16, cudaStream_t stream);
cudaError_t bias1_grad(const BiasGrad& p, bool bfloat16, cudaStream_t stream);
cudaError_t bias2_grad(const BiasGrad& p, bool bfloat16, cudaStream_t stream);
// Two launches if there are parts: the second adds them up, in their order.
cudaError_t weight_grad(const WeightGrad& p, bool gather_left, bool bfloat16, cudaStream_t stream);

}  // namespace dex
