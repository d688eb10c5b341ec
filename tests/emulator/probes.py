"""Kernels that call one device function alone: it may be told of more than a launch of its own kernel could hold."""

import triton
import triton.language as tl

from dexkernels.ops.route.triton import mean_probability


@triton.jit
def mean_probability_kernel(p, out, num_rows, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """``out [EXPERTS]``: the mean of the first EXPERTS columns of ``p [num_rows, num_experts]``."""
    tl.store(out + tl.arange(0, EXPERTS), mean_probability(p, num_rows, num_experts, EXPERTS, ROWS))
