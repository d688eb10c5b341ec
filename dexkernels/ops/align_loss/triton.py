"""The align loss in Triton: no softmax in memory, one scalar or three a row saved, any D.

Letters: R rows (all leading dimensions), D width. Rows are read in chunks of ``COLS`` columns, once per pass; the mean
is taken in two stages of fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import check_dtype, on_device, unit_rows

KINDS = {"kd": 0, "cosine": 1, "mse": 2}

SAVED = {"kd": 3, "cosine": 3, "mse": 0}
"""float32 scalars per row that the backward needs."""

ROWS, MAX_COLS, WARPS = 4, 1024, 4
"""Rows of a program, and the widest chunk of columns; the last is a power of two."""

PARTS = 1024
"""Row blocks that the second stage adds at a time."""

LOG_EPS = tl.constexpr(-13.815510557964274)
"""``log(1e-6)``: where log q is below it, q is clamped."""

COSINE_EPS = tl.constexpr(1e-8)
"""The floor of a norm, that of `torch.nn.functional.cosine_similarity`."""


@triton.jit
def load_rows(base, stride, rows, d, num_rows, dim, fill):
    """``base[rows, d]`` as float32 ``[ROWS, COLS]``; ``fill`` outside."""
    inside = (rows < num_rows)[:, None] & (d < dim)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=fill).to(tl.float32)


@triton.jit
def log_sum_exp(base, stride, rows, num_rows, dim, scale, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``log sum_D exp(scale * base[row])`` of each row; NaN when the row holds NaN or +inf."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for d0 in range(0, dim, COLS):
        d = d0 + tl.arange(0, COLS)
        top = tl.maximum(top, tl.max(scale * load_rows(base, stride, rows, d, num_rows, dim, float("-inf")), 1))
    # Past the last row no NaN; and without this line Triton 3.6 fails to compile the two loops, one after the other.
    top = tl.where(rows < num_rows, top, 0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for d0 in range(0, dim, COLS):
        d = d0 + tl.arange(0, COLS)
        shifted = scale * load_rows(base, stride, rows, d, num_rows, dim, float("-inf")) - top[:, None]
        total += tl.sum(tl.where((d < dim)[None, :], tl.exp(shifted), 0.0), 1)
    return top + tl.log(total)


@triton.jit
def forward_kernel(
    experts_out,
    director_out,
    parts,
    saved,
    num_rows,
    dim,
    stride_e,
    stride_d,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``parts[block]``: the loss summed over a block of rows; ``saved [3, R]``: what each row's backward needs.

    kd: ``lse_q, lse_p, sum of p where q is not clamped``. cosine: ``|x|, max(|y|, eps), x . y``.
    """
    block = tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    loss = tl.zeros((ROWS,), tl.float32)
    if KIND == 0:
        lse_q = log_sum_exp(experts_out, stride_e, rows, num_rows, dim, 1.0, ROWS, COLS)
        lse_p = log_sum_exp(director_out, stride_d, rows, num_rows, dim, 2.0, ROWS, COLS)
        open_mass = tl.zeros((ROWS,), tl.float32)
        for d0 in range(0, dim, COLS):
            d = d0 + tl.arange(0, COLS)
            log_q = load_rows(experts_out, stride_e, rows, d, num_rows, dim, 0.0) - lse_q[:, None]
            p = tl.exp(2.0 * load_rows(director_out, stride_d, rows, d, num_rows, dim, 0.0) - lse_p[:, None])
            p = tl.where((d < dim)[None, :], p, 0.0)
            # Not tl.maximum, which would turn a NaN into the floor and hide it.
            loss -= tl.sum(p * tl.where(log_q < LOG_EPS, LOG_EPS, log_q), 1)
            open_mass += tl.sum(tl.where(log_q >= LOG_EPS, p, 0.0), 1)
        tl.store(saved + rows, lse_q, mask=valid)
        tl.store(saved + (rows.to(tl.int64) + num_rows), lse_p, mask=valid)
        tl.store(saved + (rows.to(tl.int64) + num_rows + num_rows), open_mass, mask=valid)
    elif KIND == 1:
        xx = tl.zeros((ROWS,), tl.float32)
        yy = tl.zeros((ROWS,), tl.float32)
        xy = tl.zeros((ROWS,), tl.float32)
        for d0 in range(0, dim, COLS):
            d = d0 + tl.arange(0, COLS)
            x = load_rows(experts_out, stride_e, rows, d, num_rows, dim, 0.0)
            y = load_rows(director_out, stride_d, rows, d, num_rows, dim, 0.0)
            xx += tl.sum(x * x, 1)
            yy += tl.sum(y * y, 1)
            xy += tl.sum(x * y, 1)
        x_norm = tl.sqrt(xx)
        y_norm = tl.sqrt(yy)
        y_norm = tl.where(y_norm < COSINE_EPS, COSINE_EPS, y_norm)
        loss = 1.0 - xy / (tl.where(x_norm < COSINE_EPS, COSINE_EPS, x_norm) * y_norm)
        tl.store(saved + rows, x_norm, mask=valid)
        tl.store(saved + (rows.to(tl.int64) + num_rows), y_norm, mask=valid)
        tl.store(saved + (rows.to(tl.int64) + num_rows + num_rows), xy, mask=valid)
    else:
        for d0 in range(0, dim, COLS):
            d = d0 + tl.arange(0, COLS)
            x = load_rows(experts_out, stride_e, rows, d, num_rows, dim, 0.0)
            diff = x - load_rows(director_out, stride_d, rows, d, num_rows, dim, 0.0)
            loss += tl.sum(diff * diff, 1)
    tl.store(parts + block, tl.sum(tl.where(valid, loss, 0.0), 0))


@triton.jit
def mean_kernel(parts, out, num_parts, count, PARTS: tl.constexpr):
    """``out = sum(parts) / count``."""
    acc = tl.zeros((PARTS,), tl.float32)
    for i0 in range(0, num_parts, PARTS):
        i = i0 + tl.arange(0, PARTS)
        acc += tl.load(parts + i, mask=i < num_parts, other=0.0)
    tl.store(out, tl.sum(acc, 0) / count)


@triton.jit
def backward_kernel(
    grad_loss,
    experts_out,
    director_out,
    saved,
    grad,
    num_rows,
    dim,
    count,
    stride_e,
    stride_d,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``grad [R, D]``, with ``c = grad_loss / count``.

    kd: ``c (q sum_j open_j p_j - open p)``, ``open`` where q is not clamped.
    cosine: ``c (x . y / |x|^3 x - y / |x|) / max(|y|, eps)``; where ``|x| < eps`` the norm is a constant, and it is
    ``-c y / eps / max(|y|, eps)``. mse: ``2 c (x - y)``.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    c = tl.load(grad_loss).to(tl.float32) / count
    x = load_rows(experts_out, stride_e, rows, d, num_rows, dim, 0.0)
    y = load_rows(director_out, stride_d, rows, d, num_rows, dim, 0.0)
    if KIND == 0:
        lse_q = tl.load(saved + rows, mask=valid, other=0.0)
        lse_p = tl.load(saved + (rows.to(tl.int64) + num_rows), mask=valid, other=0.0)
        open_mass = tl.load(saved + (rows.to(tl.int64) + num_rows + num_rows), mask=valid, other=0.0)
        log_q = x - lse_q[:, None]
        p = tl.where(log_q >= LOG_EPS, tl.exp(2.0 * y - lse_p[:, None]), 0.0)
        out = c * (tl.exp(log_q) * open_mass[:, None] - p)
    elif KIND == 1:
        x_norm = tl.load(saved + rows, mask=valid, other=1.0)
        y_norm = tl.load(saved + (rows.to(tl.int64) + num_rows), mask=valid, other=1.0)
        xy = tl.load(saved + (rows.to(tl.int64) + num_rows + num_rows), mask=valid, other=0.0)
        floored = tl.where(x_norm < COSINE_EPS, COSINE_EPS, x_norm)
        along = tl.where(x_norm < COSINE_EPS, 0.0, xy / floored / floored / floored)
        out = c * (along[:, None] * x - y / floored[:, None]) / y_norm[:, None]
    else:
        out = 2.0 * c * (x - y)
    inside = valid[:, None] & (d < dim)[None, :]
    to = rows.to(tl.int64)[:, None] * dim + d[None, :]
    tl.store(grad + to, out.to(grad.dtype.element_ty), mask=inside)


def forward(experts_out: Tensor, director_out: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """`dexkernels.align_loss` on a GPU.

    Returns the loss, 0-dim float32, and ``saved [3, R]`` (``[0, R]`` for mse) float32, which the backward needs.
    """
    x, y = _rows("experts_out", experts_out), _rows("director_out", director_out)
    R, D = x.shape
    saved = x.new_empty((SAVED[kind], R), dtype=torch.float32)
    loss = x.new_empty((), dtype=torch.float32)
    if x.numel() == 0:
        return loss.zero_(), saved
    blocks = triton.cdiv(R, ROWS)
    parts = x.new_empty(blocks, dtype=torch.float32)
    with on_device(x):
        forward_kernel[(blocks,)](
            experts_out=x,
            director_out=y,
            parts=parts,
            saved=saved,
            num_rows=R,
            dim=D,
            stride_e=x.stride(0),
            stride_d=y.stride(0),
            KIND=KINDS[kind],
            ROWS=ROWS,
            COLS=_cols(D),
            num_warps=WARPS,
        )
        mean_kernel[(1,)](parts=parts, out=loss, num_parts=blocks, count=float(_count(kind, R, D)), PARTS=PARTS)
    return loss, saved


def backward(grad_loss: Tensor, experts_out: Tensor, director_out: Tensor, saved: Tensor, kind: str) -> Tensor:
    """Gradient of `forward` in experts_out, in its shape and dtype. ``grad_loss`` is 0-dim."""
    x, y = _rows("experts_out", experts_out), _rows("director_out", director_out)
    R, D = x.shape
    grad = experts_out.new_empty(experts_out.shape)
    if x.numel() == 0:
        return grad
    with on_device(x):
        backward_kernel[(triton.cdiv(R, ROWS), triton.cdiv(D, _cols(D)))](
            grad_loss=grad_loss,
            experts_out=x,
            director_out=y,
            saved=saved,
            grad=grad,
            num_rows=R,
            dim=D,
            count=float(_count(kind, R, D)),
            stride_e=x.stride(0),
            stride_d=y.stride(0),
            KIND=KINDS[kind],
            ROWS=ROWS,
            COLS=_cols(D),
            num_warps=WARPS,
        )
    return grad


def _rows(name: str, t: Tensor) -> Tensor:
    check_dtype(name, t)
    return unit_rows(t.reshape(-1, t.shape[-1]) if t.shape[-1] else t.reshape(0, 0))


def _cols(dim: int) -> int:
    return min(triton.next_power_of_2(dim), MAX_COLS)


def _count(kind: str, num_rows: int, dim: int) -> int:
    """What the summed loss is divided by."""
    return num_rows * dim if kind == "mse" else num_rows
