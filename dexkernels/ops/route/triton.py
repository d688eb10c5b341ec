"""Routing in Triton: probabilities, choice, statistics and the order of the slots, in one launch.

Letters: R rows (images, or tokens), D width, E experts, K chosen, S = R*K slots.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import MAX_ROWS, check_dtype, experts_block, on_device
from .records import Routed, RouterGrads, Saved


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


class Launch(NamedTuple):
    """One of the launches of a forward: how many programs, and what they do."""

    programs: int
    rows: bool
    sort: bool


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


def forward(r: Tensor, router_weight: Tensor, top_k: int, temperature: float, noise: Tensor | None) -> Routed:
    """``p = softmax((r @ router_weight.T + noise) / temperature)`` and the K largest, see `dexkernels.route`.

    Args:
        r: ``[R, D]``, any strides: the CLS rows, mean tokens, or every token. router_weight: ``[E, D]``.
        noise: ``[R, E]``, already scaled, or None.

    Returns: a `Routed`; p, gates, balance_loss and gate_mass are float32.
    """
    R, D, E = _sizes(r, router_weight, top_k)
    floats = {"dtype": torch.float32, "device": r.device}
    ints = {"dtype": torch.int64, "device": r.device}
    routed = Routed(
        p=torch.empty((R, E), **floats),
        gates=torch.empty((R, top_k), **floats),
        expert_indices=torch.empty((R, top_k), dtype=torch.int32, device=r.device),
        balance_loss=torch.empty((), **floats),
        gate_mass=torch.empty(E, **floats),
        slot_order=torch.empty(R * top_k, **ints),
        group_sizes=torch.empty(E, **ints),
        group_offsets=torch.empty(E + 1, **ints),
    )
    if R == 0:
        for t in routed:
            t.zero_()
        return routed
    if noise is not None:
        noise = noise.to(torch.float32).contiguous()
    c = BLOCKS[experts_block(E)]
    launches = [Launch(1, True, True)]
    if R > ONE_LAUNCH:
        launches = [Launch(triton.cdiv(R, c.rows), True, False), Launch(1, False, True)]
    with on_device(r):
        for launch in launches:
            route_kernel[(launch.programs,)](
                r=r,
                weight=router_weight,
                noise=noise,
                p=routed.p,
                gates=routed.gates,
                indices=routed.expert_indices,
                balance=routed.balance_loss,
                mass=routed.gate_mass,
                order=routed.slot_order,
                sizes=routed.group_sizes,
                offsets=routed.group_offsets,
                num_rows=R,
                dim=D,
                num_experts=E,
                top_k=top_k,
                temperature=float(temperature),
                stride_rr=r.stride(0),
                stride_rd=r.stride(1),
                stride_we=router_weight.stride(0),
                stride_wd=router_weight.stride(1),
                DO_ROWS=launch.rows,
                DO_SORT=launch.sort,
                HAS_NOISE=noise is not None,
                EXPERTS=experts_block(E),
                ROWS=c.rows,
                DEPTH=c.depth,
                SLOTS=c.slots,
                num_warps=c.warps,
            )
    return routed


def backward(grad_gates: Tensor, grad_balance: Tensor, saved: Saved, temperature: float) -> RouterGrads:
    """Gradients of `forward` in r ``[R, D]`` and router_weight ``[E, D]``, in their dtypes.

    ``grad_gates [R, K]``, ``grad_balance`` 0-dim. Nothing flows through gate_mass.
    """
    r, weight, K = saved.r, saved.router_weight, saved.gates.shape[1]
    R, D, E = _sizes(r, weight, K)
    grads = RouterGrads(r.new_empty((R, D)), weight.new_empty((E, D)))
    if R == 0:
        grads.router_weight.zero_()
        return grads
    dlogits = torch.empty_like(saved.p)
    c = BLOCKS[experts_block(E)]
    with on_device(r):
        logits_grad_kernel[(triton.cdiv(R, GRAD_ROWS),)](
            grad_gates=grad_gates.contiguous(),
            grad_balance=grad_balance,
            p=saved.p,
            indices=saved.expert_indices,
            gates=saved.gates,
            weight=weight,
            dlogits=dlogits,
            dr=grads.r,
            num_rows=R,
            dim=D,
            num_experts=E,
            top_k=K,
            temperature=float(temperature),
            stride_we=weight.stride(0),
            stride_wd=weight.stride(1),
            EXPERTS=experts_block(E),
            ROWS=GRAD_ROWS,
            COLS=c.cols,
            num_warps=c.warps,
        )
        router_grad_kernel[(triton.cdiv(D, c.cols),)](
            dlogits=dlogits,
            r=r,
            dweight=grads.router_weight,
            num_rows=R,
            dim=D,
            num_experts=E,
            stride_rr=r.stride(0),
            stride_rd=r.stride(1),
            EXPERTS=experts_block(E),
            ROWS=GRAD_ROWS,
            COLS=c.cols,
            num_warps=c.warps,
        )
    return grads


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
