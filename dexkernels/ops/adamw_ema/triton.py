"""`adamw_ema_` in Triton: every parameter of a call in one launch, in place, float32.

As `group_ema_`'s, the kernel reads which tensors there are from a table of int64, a `Row` per update. Gradients that
are allocated anew mostly come to lie where they lay, so a table is used again; a new one travels from pinned memory,
and nobody waits. A captured graph goes on reading the table of its tensors (call once before capturing).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import on_device
from .records import Rule, Scalars, Update, rates

BLOCK, WARPS = 512, 4
"""Elements of an expert that one program updates, of every expert in turn."""

SEARCH = 64
"""Table rows that the search for a program's update reads at a time."""


class Row(NamedTuple):
    """One row of the table, in the order in which the kernel reads it; addresses, of which 0 is none."""

    parameter: int
    gradient: int
    exp_avg: int
    exp_avg_sq: int
    director: int
    copy: int
    size: int
    """Elements of one expert."""
    num_experts: int
    first_weight: int
    """Its place among the weights of all."""
    first_block: int


class Table(NamedTuple):
    rows: Tensor
    """int64 ``[updates, fields of Row]``, on the device."""
    blocks: int
    most_experts: int
    source: Tensor
    """The same on the host: pinned, it must outlive the copy, and a graph that holds the copy."""


@triton.jit
def adamw(p, g, exp_avg, exp_avg_sq, keep, rate, root, beta1, rest1, beta2, rest2, eps):
    """``(p, exp_avg, exp_avg_sq)`` after a step; keep, rate, root: see `records.rates`."""
    exp_avg = beta1 * exp_avg + rest1 * g
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * g * g
    return keep * p - rate * exp_avg / (tl.sqrt(exp_avg_sq) * root + eps), exp_avg, exp_avg_sq


@triton.jit
def update_block(
    parameter, gradient, first_moment, second_moment, director, copy, i, size, num_experts, follows, moves, copies,
    shares, m, rest, clip, keep, rate, root, beta1, rest1, beta2, rest2, eps, COPY: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """The elements i of every expert in turn, of the director if one follows, and of the copies if there are any."""
    inside = i < size
    e = tl.arange(0, EXPERTS)
    d = tl.load(director + i, mask=inside & follows, other=0.0)
    d = tl.where(moves, m * d, d)
    for expert in range(num_experts):
        p = tl.load(parameter + i, mask=inside, other=0.0)
        scale = rest * tl.sum(tl.where(e == expert, shares, 0.0), 0)
        if scale != 0.0:
            d += scale * p
        p, exp_avg, exp_avg_sq = adamw(
            p,
            clip * tl.load(gradient + i, mask=inside, other=0.0),
            tl.load(first_moment + i, mask=inside, other=0.0),
            tl.load(second_moment + i, mask=inside, other=0.0),
            keep, rate, root, beta1, rest1, beta2, rest2, eps,
        )  # fmt: skip
        tl.store(parameter + i, p, mask=inside)
        tl.store(first_moment + i, exp_avg, mask=inside)
        tl.store(second_moment + i, exp_avg_sq, mask=inside)
        tl.store(copy + i, p.to(COPY), mask=inside & copies)
        parameter += size
        gradient += size
        first_moment += size
        second_moment += size
        copy += size
    tl.store(director + i, d, mask=inside & moves)
    tl.store(copy + i, d.to(COPY), mask=inside & copies)


@triton.jit
def adamw_ema_kernel(
    table,
    rates,
    weights,
    momentum,
    clip_scale,
    skip,
    num_updates,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    COPY: tl.constexpr,
    FIELDS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same BLOCK elements of every expert of one update, of its director and of their copies.

    ``weights [sum of E]`` holds those of all directors; ``rates [updates, 3]``. COPY: the dtype of copies, where there
    are any. An expert whose scale is exactly 0 adds nothing; a director without any weight keeps its bits.
    """
    pid = tl.program_id(0)
    if skip is not None:
        if tl.load(skip) != 0:
            return
    before = 0
    for t0 in range(0, num_updates, SEARCH):
        t = t0 + tl.arange(0, SEARCH)
        first = tl.load(table + t * FIELDS + 9, mask=t < num_updates, other=9223372036854775807)
        before += tl.sum((first <= pid).to(tl.int32), 0)
    row = table + (before - 1) * FIELDS
    parameter = tl.load(row).to(tl.pointer_type(tl.float32))
    gradient = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    first_moment = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    second_moment = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    director_at = tl.load(row + 4)
    director = director_at.to(tl.pointer_type(tl.float32))
    copy_at = tl.load(row + 5)
    copy = copy_at.to(tl.pointer_type(COPY))
    size = tl.load(row + 6)
    num_experts = tl.load(row + 7).to(tl.int32)
    keep = tl.load(rates + (before - 1) * 3)
    rate = tl.load(rates + (before - 1) * 3 + 1)
    root = tl.load(rates + (before - 1) * 3 + 2)
    m = tl.load(momentum).to(tl.float64)
    rest = (1.0 - m).to(tl.float32)
    m = m.to(tl.float32)
    clip = 1.0
    if clip_scale is not None:
        clip = tl.load(clip_scale).to(tl.float32)
    i = (pid - tl.load(row + 9)) * BLOCK + tl.arange(0, BLOCK)
    follows = director_at != 0
    weights += tl.load(row + 8)
    e = tl.arange(0, EXPERTS)
    shares = tl.load(weights + e, mask=follows & (e < num_experts), other=0.0)
    moves = tl.sum((shares != 0.0).to(tl.int32), 0) > 0
    # Wide loads need 16-byte alignment and whole groups of four, which only the numbers themselves can show.
    addresses = tl.load(row) | tl.load(row + 1) | tl.load(row + 2) | tl.load(row + 3) | director_at | copy_at
    if (addresses | (size * 4)) % 16 == 0:
        update_block(
            tl.multiple_of(parameter, 16), tl.multiple_of(gradient, 16), tl.multiple_of(first_moment, 16),
            tl.multiple_of(second_moment, 16), tl.multiple_of(director, 16), tl.multiple_of(copy, 16), i,
            size // 4 * 4, num_experts, follows, moves, copy_at != 0, shares, m, rest, clip, keep, rate, root,
            beta1, rest1, beta2, rest2, eps, COPY, EXPERTS,
        )  # fmt: skip
    else:
        update_block(
            parameter, gradient, first_moment, second_moment, director, copy, i, size, num_experts, follows, moves,
            copy_at != 0, shares, m, rest, clip, keep, rate, root, beta1, rest1, beta2, rest2, eps, COPY, EXPERTS,
        )  # fmt: skip


def why_not(update: Update) -> str | None:
    """What of an update the kernel cannot take, beginning with the field; None where there is nothing."""
    for name, t in update._asdict().items():
        if t is None or name in ("step", "group_weights"):
            continue
        if name != "copy" and t.dtype != torch.float32:
            return f"{name}: the kernel takes float32, got {t.dtype}"
        if not t.is_contiguous():
            return f"{name}: the kernel takes contiguous tensors, got strides {t.stride()}"
        if t.data_ptr() % t.element_size():
            return f"{name}: expected an address that is a multiple of {t.element_size()} bytes, got {t.data_ptr():#x}"
    return None


def adamw_ema_(updates: list[Update], rule: Rule, scalars: Scalars) -> None:
    """See `dexkernels.ops.adamw_ema.adamw_ema_`; what it cannot take is in `why_not`."""
    steps = [u.step for u in updates]
    if scalars.skip is None:
        torch._foreach_add_(steps, 1)
    else:
        torch._foreach_add_(steps, [(~scalars.skip).to(torch.float32)] * len(steps))
    parts: dict[torch.dtype, list[Update]] = {}
    for u in updates:
        if u.parameter.numel():
            parts.setdefault(torch.bfloat16 if u.copy is None else u.copy.dtype, []).append(u)
    for dtype, part in parts.items():
        _launch(part, rule, scalars, dtype)


def _launch(updates: list[Update], rule: Rule, scalars: Scalars, dtype: torch.dtype) -> None:
    device = updates[0].parameter.device
    # One entry per distinct tensor of weights: the tensors of a layer share theirs.
    starts, parts, total = {}, [], 0
    for w in (u.group_weights for u in updates if u.director is not None):
        if id(w) not in starts:
            starts[id(w)] = total
            parts.append(w.to(torch.float32))
            total += w.numel()
    rows = tuple(
        (
            *(0 if t is None else t.data_ptr() for t in (*u[:4], u.director, u.copy)),
            u.parameter.numel() // u.num_experts,
            u.num_experts,
            starts.get(id(u.group_weights), 0),
        )
        for u in updates
    )
    table, of_each = _table(rows, device), rates(updates, rule)
    first, second = rule.betas
    with on_device(updates[0].parameter):
        adamw_ema_kernel[(table.blocks,)](
            table=table.rows,
            rates=of_each,
            weights=torch.cat(parts) if parts else of_each,
            momentum=scalars.momentum,
            clip_scale=scalars.clip_scale,
            skip=scalars.skip,
            num_updates=len(rows),
            beta1=first,
            rest1=1.0 - first,
            beta2=second,
            rest2=1.0 - second,
            eps=rule.eps,
            COPY=tl.float16 if dtype == torch.float16 else tl.bfloat16,
            FIELDS=len(Row._fields),
            EXPERTS=triton.next_power_of_2(table.most_experts),
            SEARCH=SEARCH,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


# Large, because a captured graph goes on reading the table of its tensors: it must not be the one thrown out.
@functools.lru_cache(maxsize=4096)
def _table(entries: tuple[tuple[int, ...], ...], device: torch.device) -> Table:
    """Made of addresses and sizes alone: nothing is kept alive. entries: the fields of `Row` but the last."""
    rows, block = [], 0
    for entry in entries:
        rows.append(Row(*entry, block))
        block += triton.cdiv(rows[-1].size, BLOCK)
    source = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cuda":
        source = source.pin_memory()
    most = max(row.num_experts for row in rows)
    return Table(source.to(device, non_blocking=True), block, most, source)
