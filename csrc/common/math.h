// Scalar maths, one text for the device and the host: tests/native compiles it with the host compiler against float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DEX_HD __host__ __device__ __forceinline__
#else
#define DEX_HD inline
#endif

namespace dex {

// x * Phi(x), the exact GELU. Written as torch writes it, so that the errors in the far negative tail are the same.
DEX_HD float gelu(float x) {
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}

// d gelu / dx = Phi(x) + x * phi(x).
DEX_HD float gelu_grad(float x) {
  const float cdf = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
  const float pdf = 0.39894228040143268f * expf(-0.5f * x * x);
  return fmaf(x, pdf, cdf);
}

// m and 1 - m of an EMA, each rounded once from double: at m = 0.999 a float 1 - m would be wrong in its fifth digit.
struct Momentum {
  float keep;
  float rest;
};

DEX_HD Momentum split_momentum(double m) {
  return {static_cast<float>(m), static_cast<float>(1.0 - m)};
}

// acc + scale * value with one rounding. The fma is spelt out, so that no compiler flag decides about the bits.
DEX_HD float ema_add(float acc, float scale, float value) {
  return fmaf(scale, value, acc);
}

// Bits of the nearest bfloat16, ties to even; every NaN becomes 0x7fc0, as in torch on a CPU.
DEX_HD uint16_t bfloat16_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace dex
