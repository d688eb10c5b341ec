"""Routing in Triton: probabilities, choice, statistics and the order of the slots, in one launch.

Letters: R rows (images, or tokens), D width, E experts, K chosen, S = R*K slots.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import MAX_ROWS, check_dtype, experts_block, on_device


class Blocks(NamedTuple):
    """One compiled configuration: rows of a block, step along D, slots of a block, columns of a gradient, warps."""

    rows: int
    depth: int
    slots: int
    cols: int
    warps: int


BLOCKS = {
    16: Blocks(64, 64, 64, 64, 8),
    32: Blocks(32, 64, 64, 64, 8),
    64: Blocks(16, 64, 64, 32, 8),
    128: Blocks(16, 32, 32, 32, 8),
}
"""Lanes for experts -> blocks: a program holds ``[rows, experts]`` and ``[slots, experts]`` several times."""

MAX_EXPERTS = 128

GRAD_ROWS = 16
"""Rows of a block in the backward."""

ONE_LAUNCH = 4096
"""Up to so many rows one program does everything; above, the rows are spread over the GPU in a launch of their own."""


@triton.jit
def route_rows(
    block,
    r,
    weight,
    noise,
    p,
    gates,
    indices,
    num_rows,
    dim,
    num_experts,
    top_k,
    temperature,
    stride_rr,
    stride_rd,
    stride_we,
    stride_wd,
    HAS_NOISE: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``p = softmax((r @ W.T + noise) / temperature)`` of a block of rows, its K largest and their shares."""
    rows = block * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EXPERTS)
    r_valid = rows < num_rows
    e_valid = e < num_experts
    k = tl.arange(0, DEPTH)
    r_at = r + rows.to(tl.int64)[:, None] * stride_rr + k.to(tl.int64)[None, :] * stride_rd
    w_at = weight + e.to(tl.int64)[None, :] * stride_we + k.to(tl.int64)[:, None] * stride_wd
    logits = tl.zeros((ROWS, EXPERTS), tl.float32)
    for d0 in range(0, dim, DEPTH):
        inside = k < dim - d0
        r_block = tl.load(r_at, mask=r_valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
        w_block = tl.load(w_at, mask=inside[:, None] & e_valid[None, :], other=0.0).to(tl.float32)
        logits = tl.dot(r_block, w_block, logits, input_precision="ieee")
        r_at += DEPTH * stride_rd
        w_at += DEPTH * stride_wd
    at = rows.to(tl.int64)[:, None] * num_experts + e[None, :]
    inside = r_valid[:, None] & e_valid[None, :]
    if HAS_NOISE:
        logits += tl.load(noise + at, mask=inside, other=0.0)
    logits = tl.where(e_valid[None, :], logits / temperature, float("-inf"))
    exp = tl.exp(logits - tl.max(logits, 1)[:, None])
    prob = exp / tl.sum(exp, 1)[:, None]
    tl.store(p + at, prob, mask=inside)

    # A NaN counts as largest and equals itself, as in torch's sort: indices stay distinct and in range.
    key = tl.where(e_valid[None, :], tl.where(prob == prob, prob, 2.0), -1.0)
    rank = tl.full((ROWS, EXPERTS), -1, tl.int32)
    for choice in range(top_k):
        best = tl.max(key, 1)
        index = tl.min(tl.where(key == best[:, None], e[None, :], EXPERTS), 1)
        mine = e[None, :] == index[:, None]
        rank = tl.where(mine, choice, rank)
        key = tl.where(mine, -1.0, key)
    taken = rank >= 0
    gate = prob / tl.sum(tl.where(taken, prob, 0.0), 1)[:, None]
    to = rows.to(tl.int64)[:, None] * top_k + rank
    tl.store(gates + to, gate, mask=r_valid[:, None] & taken)
    tl.store(indices + to, tl.broadcast_to(e[None, :], (ROWS, EXPERTS)), mask=r_valid[:, None] & taken)


@triton.jit
def mean_probability(p, num_rows, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """``mean_r p[r]``, ``[EXPERTS]``, rows in rising order."""
    e = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.float32)
    for r0 in range(0, num_rows, ROWS):
        rows = r0 + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * num_experts + e[None, :]
        inside = (rows < num_rows)[:, None] & (e < num_experts)[None, :]
        total += tl.sum(tl.load(p + at, mask=inside, other=0.0), 0)
    return total / num_rows


@triton.jit
def sort_slots(
    p,
    gates,
    indices,
    balance,
    mass,
    order,
    sizes,
    offsets,
    num_rows,
    num_experts,
    num_slots,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Balance loss, gate mass, group sizes and offsets, and the slots stably sorted by expert, by counting."""
    e = tl.arange(0, EXPERTS)
    e_valid = e < num_experts
    mean = mean_probability(p, num_rows, num_experts, EXPERTS, ROWS)
    tl.store(balance, tl.sum(mean * mean, 0) * num_experts)

    gate_mass = tl.zeros((EXPERTS,), tl.float32)
    count = tl.zeros((EXPERTS,), tl.int32)
    for s0 in range(0, num_slots, SLOTS):
        slots = s0 + tl.arange(0, SLOTS)
        valid = slots < num_slots
        chosen = tl.load(indices + slots, mask=valid, other=-1)[:, None] == e[None, :]
        gate = tl.load(gates + slots, mask=valid, other=0.0)
        gate_mass += tl.sum(tl.where(chosen, gate[:, None], 0.0), 0)
        count += tl.sum(chosen.to(tl.int32), 0)
    ends = tl.cumsum(count, 0)
    tl.store(mass + e, gate_mass, mask=e_valid)
    tl.store(sizes + e, count.to(tl.int64), mask=e_valid)
    tl.store(offsets + e + 1, ends.to(tl.int64), mask=e_valid)
    tl.store(offsets, 0)

    next_position = ends - count
    for s0 in range(0, num_slots, SLOTS):
        slots = s0 + tl.arange(0, SLOTS)
        valid = slots < num_slots
        chosen = (tl.load(indices + slots, mask=valid, other=-1)[:, None] == e[None, :]).to(tl.int32)
        earlier = tl.cumsum(chosen, 0) - chosen
        position = tl.sum(chosen * (next_position[None, :] + earlier), 1)
        tl.store(order + position, slots.to(tl.int64), mask=valid)
        next_position += tl.sum(chosen, 0)


@triton.jit
def route_kernel(
    r,
    weight,
    noise,
    p,
    gates,
    indices,
    balance,
    mass,
    order,
    sizes,
    offsets,
    num_rows,
    dim,
    num_experts,
    top_k,
    temperature,
    stride_rr,
    stride_rd,
    stride_we,
    stride_wd,
    DO_ROWS: tl.constexpr,
    DO_SORT: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """`route_rows` of every block that falls to this program, then (with DO_SORT, by one program) `sort_slots`."""
    if DO_ROWS:
        for block in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
            route_rows(
                block,
                r,
                weight,
                noise,
                p,
                gates,
                indices,
                num_rows,
                dim,
                num_experts,
                top_k,
                temperature,
                stride_rr,
                stride_rd,
                stride_we,
                stride_wd,
                HAS_NOISE,
                EXPERTS,
                ROWS,
                DEPTH,
            )
    if DO_ROWS and DO_SORT:
        # What follows reads what other threads of this block wrote.
        tl.debug_barrier()
    if DO_SORT:
        sort_slots(
            p,
            gates,
            indices,
            balance,
            mass,
            order,
            sizes,
            offsets,
            num_rows,
            num_experts,
            num_rows * top_k,
            EXPERTS,
            ROWS,
            SLOTS,
        )


@triton.jit
def logits_grad_kernel(
    grad_gates,
    grad_balance,
    p,
    indices,
    gates,
    weight,
    dlogits,
    dr,
    num_rows,
    dim,
    num_experts,
    top_k,
    temperature,
    stride_we,
    stride_wd,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``dlogits [R, E]`` float32 and ``dr = dlogits @ W``, of a block of rows.

    ``dp = dbalance E mean(p) / R``, and for the chosen ``+ (dgate - sum_k dgate_k gate_k) / sum_k p_k``;
    ``dlogits = p (dp - sum_e dp p) / temperature``.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EXPERTS)
    r_valid = rows < num_rows
    e_valid = e < num_experts
    at = rows.to(tl.int64)[:, None] * num_experts + e[None, :]
    inside = r_valid[:, None] & e_valid[None, :]
    prob = tl.load(p + at, mask=inside, other=0.0)

    direct = tl.zeros((ROWS, EXPERTS), tl.float32)
    taken = tl.zeros((ROWS, EXPERTS), tl.int32)
    through_sum = tl.zeros((ROWS,), tl.float32)
    for k in range(top_k):
        slots = rows.to(tl.int64) * top_k + k
        index = tl.load(indices + slots, mask=r_valid, other=-1)
        grad = tl.load(grad_gates + slots, mask=r_valid, other=0.0).to(tl.float32)
        through_sum += grad * tl.load(gates + slots, mask=r_valid, other=0.0)
        mine = e[None, :] == index[:, None]
        direct = tl.where(mine, grad[:, None], direct)
        taken = tl.where(mine, 1, taken)
    chosen_sum = tl.sum(tl.where(taken == 1, prob, 0.0), 1)
    dp = tl.where(taken == 1, (direct - through_sum[:, None]) / chosen_sum[:, None], 0.0)
    mean = mean_probability(p, num_rows, num_experts, EXPERTS, ROWS)
    dp += (tl.load(grad_balance).to(tl.float32) * num_experts / num_rows * mean)[None, :]
    grad = prob * (dp - tl.sum(dp * prob, 1)[:, None]) / temperature
    tl.store(dlogits + at, grad, mask=inside)

    for d0 in range(0, dim, COLS):
        d = d0 + tl.arange(0, COLS)
        w_at = weight + e.to(tl.int64)[:, None] * stride_we + d.to(tl.int64)[None, :] * stride_wd
        w_block = tl.load(w_at, mask=e_valid[:, None] & (d < dim)[None, :], other=0.0).to(tl.float32)
        out = tl.dot(grad, w_block, input_precision="ieee")
        to = rows.to(tl.int64)[:, None] * dim + d[None, :]
        tl.store(dr + to, out.to(dr.dtype.element_ty), mask=r_valid[:, None] & (d < dim)[None, :])


@triton.jit
def router_grad_kernel(
    dlogits,
    r,
    dweight,
    num_rows,
    dim,
    num_experts,
    stride_rr,
    stride_rd,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``dweight = dlogits.T @ r``, ``[E, D]``, a block of columns of all experts, rows in rising order."""
    e = tl.arange(0, EXPERTS)
    d = tl.program_id(0) * COLS + tl.arange(0, COLS)
    e_valid = e < num_experts
    acc = tl.zeros((EXPERTS, COLS), tl.float32)
    for r0 in range(0, num_rows, ROWS):
        rows = r0 + tl.arange(0, ROWS)
        r_valid = rows < num_rows
        at = rows.to(tl.int64)[None, :] * num_experts + e[:, None]
        g_block = tl.load(dlogits + at, mask=e_valid[:, None] & r_valid[None, :], other=0.0)
        r_at = rows.to(tl.int64)[:, None] * stride_rr + d.to(tl.int64)[None, :] * stride_rd
        r_block = tl.load(r + r_at, mask=r_valid[:, None] & (d < dim)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(g_block, r_block, acc, input_precision="ieee")
    to = e.to(tl.int64)[:, None] * dim + d[None, :]
    tl.store(dweight + to, acc.to(dweight.dtype.element_ty), mask=e_valid[:, None] & (d < dim)[None, :])


def route_forward(
    r: Tensor, router_weight: Tensor, top_k: int, temperature: float = 0.5, noise: Tensor | None = None
) -> tuple[Tensor, ...]:
    """``p = softmax((r @ router_weight.T + noise) / temperature)`` and the K largest, see `dexkernels.reference.route`.

    Args:
        r: ``[R, D]``, any strides: the CLS rows, mean tokens, or every token. router_weight: ``[E, D]``.
        noise: ``[R, E]``, already scaled, or None.

    Returns ``p [R, E]``, ``gates [R, K]`` (float32), ``expert_indices [R, K]`` (int32), ``balance_loss`` (0-dim),
    ``gate_mass [E]``, ``slot_order [R*K]``, ``group_sizes [E]``, ``group_offsets [E + 1]`` (int64).
    """
    R, D, E = _sizes(r, router_weight, top_k)
    floats = {"dtype": torch.float32, "device": r.device}
    ints = {"dtype": torch.int64, "device": r.device}
    p, gates = torch.empty((R, E), **floats), torch.empty((R, top_k), **floats)
    indices = torch.empty((R, top_k), dtype=torch.int32, device=r.device)
    balance, mass = torch.empty((), **floats), torch.empty(E, **floats)
    order, sizes, offsets = torch.empty(R * top_k, **ints), torch.empty(E, **ints), torch.empty(E + 1, **ints)
    outputs = (p, gates, indices, balance, mass, order, sizes, offsets)
    if R == 0:
        for t in outputs:
            t.zero_()
        return outputs
    if noise is not None:
        noise = noise.to(torch.float32).contiguous()
    c = BLOCKS[experts_block(E)]
    launches = [((1,), True, True)]
    if R > ONE_LAUNCH:
        launches = [((triton.cdiv(R, c.rows),), True, False), ((1,), False, True)]
    with on_device(r):
        for grid, do_rows, do_sort in launches:
            route_kernel[grid](
                r,
                router_weight,
                noise,
                *outputs,
                R,
                D,
                E,
                top_k,
                float(temperature),
                *r.stride(),
                *router_weight.stride(),
                do_rows,
                do_sort,
                noise is not None,
                experts_block(E),
                c.rows,
                c.depth,
                c.slots,
                num_warps=c.warps,
            )
    return outputs


def route_backward(
    grad_gates: Tensor | None,
    grad_balance: Tensor | None,
    p: Tensor,
    expert_indices: Tensor,
    gates: Tensor,
    r: Tensor,
    router_weight: Tensor,
    top_k: int,
    temperature: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Gradients of `route_forward` in r ``[R, D]`` and router_weight ``[E, D]``, in their dtypes.

    ``grad_gates [R, K]`` and ``grad_balance`` (0-dim) may be None, for zero. Nothing flows through gate_mass.
    """
    R, D, E = _sizes(r, router_weight, top_k)
    dr, dweight = r.new_empty((R, D)), router_weight.new_empty((E, D))
    if R == 0:
        return dr, dweight.zero_()
    grad_gates = torch.zeros_like(gates) if grad_gates is None else grad_gates.contiguous()
    grad_balance = p.new_zeros(()) if grad_balance is None else grad_balance
    dlogits = torch.empty_like(p)
    c = BLOCKS[experts_block(E)]
    with on_device(r):
        logits_grad_kernel[(triton.cdiv(R, GRAD_ROWS),)](
            grad_gates,
            grad_balance,
            p,
            expert_indices,
            gates,
            router_weight,
            dlogits,
            dr,
            R,
            D,
            E,
            top_k,
            float(temperature),
            *router_weight.stride(),
            experts_block(E),
            GRAD_ROWS,
            c.cols,
            num_warps=c.warps,
        )
        router_grad_kernel[(triton.cdiv(D, c.cols),)](
            dlogits, r, dweight, R, D, E, *r.stride(), experts_block(E), GRAD_ROWS, c.cols, num_warps=c.warps
        )
    return dr, dweight


def _sizes(r: Tensor, router_weight: Tensor, top_k: int) -> tuple[int, int, int]:
    """R, D, E, after the checks that are this backend's own."""
    check_dtype("r", r)
    check_dtype("router_weight", router_weight)
    (R, D), E = r.shape, router_weight.shape[0]
    if D == 0:
        raise ValueError(f"r: expected D of at least 1, got {list(r.shape)}")
    if E > MAX_EXPERTS:
        raise ValueError(f"router_weight: the Triton kernel takes at most {MAX_EXPERTS} experts, got {E}")
    if R * top_k > MAX_ROWS:
        raise ValueError(f"r: expected at most {MAX_ROWS} slots R*K, got {R * top_k}")
    return R, D, E
