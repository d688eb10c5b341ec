// The exact GELU and its slope for results of 16 bits, one text for the device and the host.
//
// The tail of the normal distribution is exp(-z^2 / 2), which the slope needs too, times a smooth function. A
// polynomial in 1 / (1 + 0.2625 |z|) gives that function with a relative error below 8e-7 for |z| <= 14; beyond, the
// tail is 0 in float32. erff and expf need twice the instructions, and spill registers beside the sums of a tile.
#pragma once

#include <cmath>

#include "common/math.h"

namespace dex {

DEX_HD float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

DEX_HD float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

struct NormalAt {
  float cdf;  // Phi(z): gelu(z) = z Phi(z)
  float pdf;  // phi(z): gelu'(z) = Phi(z) + z phi(z)
};

DEX_HD NormalAt normal_at(float z) {
  const float bell = power_of_two(-0.72134752044448170f * z * z);
  const float t = reciprocal(fmaf(0.2625f, fabsf(z), 1.0f));
  float p = -0.070195459f;
  p = fmaf(p, t, 0.2112197f);
  p = fmaf(p, t, -0.085051358f);
  p = fmaf(p, t, 0.15358871f);
  p = fmaf(p, t, 0.078410529f);
  p = fmaf(p, t, 0.10746815f);
  p = fmaf(p, t, 0.10456009f);
  const float tail = p * t * bell;
  return {z < 0.0f ? tail : 1.0f - tail, 0.39894228040143268f * bell};
}

}  // namespace dex
