"""The GELU of the experts, exact or by tanh: what every kernel with an activation calls."""

import triton
import triton.language as tl

from ...triton_common import gelu_cdf, gelu_pdf


@triton.jit
def gelu_factor(z, TANH: tl.constexpr):
    """``gelu(z) / z``: the normal distribution's, or its approximation ``(1 + tanh u) / 2 = sigmoid(2 u)``.

    ``u = sqrt(2 / pi) (z + 0.044715 z^3)``. The square is bounded, far beyond where the sigmoid is 0 or 1: its
    infinity times that 0 would make a slope NaN.
    """
    if TANH:
        square = tl.minimum(z * z, 1e4)
        return 1.0 / (1.0 + tl.exp(-1.5957691216057308 * z * (1.0 + 0.044715 * square)))
    else:
        return gelu_cdf(z)


@triton.jit
def gelu_factor_slope(z, factor, TANH: tl.constexpr):
    """The derivative of `gelu_factor`, whose value at z is factor: ``gelu'(z) = factor + z * slope``."""
    if TANH:
        square = tl.minimum(z * z, 1e4)
        return factor * (1.0 - factor) * (1.5957691216057308 * (1.0 + 0.134145 * square))
    else:
        return gelu_pdf(z)
