"""GEMA in Triton: every director tensor of every layer in one launch, in place, float32.

The kernel reads which tensors there are from a table of int64, a `Row` per tensor. Parameters keep their addresses,
so the table of a network is made and copied to the device once; a step, or a captured graph of it, only launches (call
once before capturing: the copy of the table cannot be captured).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import on_device

BLOCK, WARPS = 4096, 8
"""Elements of a director that one program updates."""

SEARCH = 64
"""Table rows that the search for a program's tensor reads at a time."""


class Entry(NamedTuple):
    """One director and what it follows: addresses and sizes."""

    director: int
    experts: int
    """Address of expert 0."""
    size: int
    """Elements of the director."""
    stride: int
    """Elements from one expert to the next."""
    num_experts: int
    first_weight: int
    """Its place among the weights of all."""


class Row(NamedTuple):
    """One row of the table, in the order in which the kernel reads it."""

    director: int
    experts: int
    size: int
    stride: int
    first_block: int
    num_experts: int
    first_weight: int


class Table(NamedTuple):
    """What `group_ema_kernel` is told of all tensors."""

    rows: Tensor
    """int64 ``[tensors, fields of Row]``, on the device."""
    blocks: int
    most_experts: int


@triton.jit
def update_block(director, experts, weights, i, size, num_experts, stride, m, rest):
    """``d <- m d + sum_e (rest a_e) * expert_e`` of the elements i, e rising; a scale of exactly 0 reads nothing."""
    inside = i < size
    acc = m * tl.load(director + i, mask=inside, other=0.0)
    for e in range(num_experts):
        scale = rest * tl.load(weights + e).to(tl.float32)
        if scale != 0.0:
            acc += scale * tl.load(experts + i, mask=inside, other=0.0)
        experts += stride
    tl.store(director + i, acc, mask=inside)


@triton.jit
def group_ema_kernel(
    table,
    weights,
    momentum,
    one_less,
    skip,
    num_tensors,
    HAS_SKIP: tl.constexpr,
    MOMENTUM_ON_DEVICE: tl.constexpr,
    FIELDS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`update_block` for the tensor that owns this program, unless skip is true or all of its weights are 0.

    ``weights [sum of E]`` holds the weights of all tensors one after the other. ``one_less`` is 1 - momentum, which the
    host takes in float64: of 1 - 0.999 in float32 only four digits would be right.
    """
    pid = tl.program_id(0)
    if HAS_SKIP:
        if tl.load(skip) != 0:
            return
    before = 0
    for t0 in range(0, num_tensors, SEARCH):
        t = t0 + tl.arange(0, SEARCH)
        first = tl.load(table + t * FIELDS + 4, mask=t < num_tensors, other=9223372036854775807)
        before += tl.sum((first <= pid).to(tl.int32), 0)
    row = table + (before - 1) * FIELDS
    director = tl.load(row).to(tl.pointer_type(tl.float32))
    experts = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    size = tl.load(row + 2)
    stride = tl.load(row + 3)
    i = (pid - tl.load(row + 4)) * BLOCK + tl.arange(0, BLOCK)
    num_experts = tl.load(row + 5).to(tl.int32)
    weights += tl.load(row + 6)
    e = tl.arange(0, EXPERTS)
    used = tl.load(weights + e, mask=e < num_experts, other=0.0) != 0.0
    if tl.sum(used.to(tl.int32), 0) == 0:
        return
    if MOMENTUM_ON_DEVICE:
        m = tl.load(momentum)
        rest = (1.0 - m).to(tl.float32)
        m = m.to(tl.float32)
    else:
        m = momentum
        rest = one_less
    # Wide loads need 16-byte alignment and whole groups of four, which only the numbers themselves can show.
    if (tl.load(row) | tl.load(row + 1) | (stride * 4) | (size * 4)) % 16 == 0:
        director = tl.multiple_of(director, 16)
        experts = tl.multiple_of(experts, 16)
        update_block(director, experts, weights, i, size // 4 * 4, num_experts, stride // 4 * 4, m, rest)
    else:
        update_block(director, experts, weights, i, size, num_experts, stride, m, rest)


def group_ema_(
    directors: list[Tensor],
    experts: list[Tensor],
    group_weights: list[Tensor],
    momentum: float | Tensor,
    skip: Tensor | None = None,
) -> None:
    """`dexkernels.group_ema_` on a GPU: ``director <- m * director + (1 - m) * sum_e a_e * experts[e]``.

    directors: float32, any shape; experts: ``[E, *shape]``; group_weights: ``[E]``. An expert whose ``(1 - m) * a_e``
    is exactly 0 contributes nothing, whatever it holds; when all weights of a tensor are 0, or ``skip`` is true, it
    keeps its bits. Tensors that are not contiguous are updated through a contiguous copy.
    """
    for i, t in enumerate(directors):
        if t.dtype != torch.float32:
            raise ValueError(f"directors[{i}]: the Triton kernel takes float32, got {t.dtype}")
    keep = [i for i, t in enumerate(directors) if t.numel() > 0]
    if not keep:
        return
    device = directors[keep[0]].device
    targets = [directors[i].contiguous() for i in keep]
    sources = [experts[i] if experts[i][0].is_contiguous() else experts[i].contiguous() for i in keep]
    # One entry per distinct tensor of weights: the tensors of a layer share theirs.
    starts, parts, total = {}, [], 0
    for w in (group_weights[i] for i in keep):
        if id(w) not in starts:
            starts[id(w)] = total
            parts.append(w.to(torch.float32))
            total += w.numel()
    entries = tuple(
        Entry(
            director=d.data_ptr(),
            experts=s.data_ptr(),
            size=d.numel(),
            stride=s.stride(0),
            num_experts=s.shape[0],
            first_weight=starts[id(group_weights[i])],
        )
        for i, d, s in zip(keep, targets, sources, strict=True)
    )
    # Copies have new addresses at every call: their tables are not worth keeping.
    kept = all(t is directors[i] and s is experts[i] for i, t, s in zip(keep, targets, sources, strict=True))
    table = (_table if kept else _table.__wrapped__)(entries, device)
    on_tensor = isinstance(momentum, Tensor)
    if on_tensor and momentum.device != device:
        momentum = momentum.to(device)
    with on_device(directors[keep[0]]):
        group_ema_kernel[(table.blocks,)](
            table=table.rows,
            weights=torch.cat(parts),
            momentum=momentum if on_tensor else float(momentum),
            one_less=None if on_tensor else 1.0 - float(momentum),
            skip=skip,
            num_tensors=len(entries),
            HAS_SKIP=skip is not None,
            MOMENTUM_ON_DEVICE=on_tensor,
            FIELDS=len(Row._fields),
            EXPERTS=triton.next_power_of_2(table.most_experts),
            SEARCH=SEARCH,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    for i, d in zip(keep, targets, strict=True):
        if d.data_ptr() != directors[i].data_ptr():
            directors[i].copy_(d)
    # torch saw no write: without this, a backward that needs the old values would take the new ones in silence.
    torch.autograd.graph.increment_version([directors[i] for i in keep])


# Large, because a captured graph goes on reading the table of its tensors: it must not be the one thrown out.
@functools.lru_cache(maxsize=4096)
def _table(entries: tuple[Entry, ...], device: torch.device) -> Table:
    """Made of addresses and sizes alone: nothing is kept alive."""
    rows, block = [], 0
    for e in entries:
        rows.append(Row(e.director, e.experts, e.size, e.stride, block, e.num_experts, e.first_weight))
        block += triton.cdiv(e.size, BLOCK)
    most = max(e.num_experts for e in entries)
    return Table(torch.tensor(rows, dtype=torch.int64).to(device), block, max(most, 1))
