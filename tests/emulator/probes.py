"""Kernels that call one device function alone: it may be told of more than a launch of its own kernel could hold."""

import triton
import triton.language as tl

from dexkernels.ops.grouped_mlp.triton.sum_kernels import sum_parts
from dexkernels.ops.grouped_mlp.triton.weight_grad_kernels import store_chunk
from dexkernels.ops.route.triton import mean_probability


@triton.jit
def mean_probability_kernel(p, out, num_rows, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """``out [EXPERTS]``: the mean of the first EXPERTS columns of ``p [num_rows, num_experts]``."""
    tl.store(out + tl.arange(0, EXPERTS), mean_probability(p, num_rows, num_experts, EXPERTS, ROWS))


@triton.jit
def sum_parts_kernel(parts, out, first, end, hidden, COLS: tl.constexpr, ROWS: tl.constexpr):
    """``out [COLS]``: the sum of rows first to end of the first COLS columns of ``parts [., hidden]``."""
    h = tl.arange(0, COLS)
    tl.store(out + h, sum_parts(tl.zeros((COLS,), tl.float32), parts, first, end, h, hidden, ROWS))


@triton.jit
def store_chunk_kernel(values, parts, out, part, height, width, SIDE: tl.constexpr):
    """``values [SIDE, SIDE]`` to the first rows and columns of a part of ``parts [., height, width]``."""
    i = tl.arange(0, SIDE)
    acc = tl.load(values + i[:, None] * SIDE + i[None, :])
    store_chunk(acc, tl.program_id(0), part, parts, out, i, i, height, width)
