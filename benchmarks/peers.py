"""Other implementations that the kernels are measured against, and why some are not timed.

A peer of the MLP is ``f(x, gates, slot_order, group_offsets, *weights) -> out``, differentiable by autograd, with the
arguments of `dexkernels.ops.grouped_mlp.records`. Like every result, its result is checked before it is timed.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NO_ADAPTER = {
    "megablocks": "tanh GELU, and torch pinned to one minor version",
    "scattermoe": "no bias",
    "sonicmoe": "gated activations",
    "quack": "gated activations or tanh GELU",
    "deep_gemm": "rows permuted and padded by the caller, no epilogue",
    "liger_kernel": "gated activations, no bias",
    "transformer_engine": "tanh GELU, a separate permutation",
}
"""Module -> why it is named but not timed: it computes something else."""


class Peer(NamedTuple):
    run: Callable
    module: str = "torch"
    compiled: bool = False
    """Whether it is compiled, which takes long, so it is measured on few shapes."""


def rows_of(x: Tensor, gates: Tensor, slot_order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images of the slots ``[S]``, a permuted copy of x ``[S*N, D]``, gates ``[S, 1, 1]``."""
    images = slot_order // gates.shape[1]
    return images, x[images].flatten(0, 1), gates.reshape(-1)[slot_order][:, None, None]


def combined(y: Tensor, images: Tensor, gates: Tensor, like: Tensor) -> Tensor:
    """``out [B, N, D]``: the slots' rows, weighted by their gates and summed by image."""
    y = y.view(len(images), like.shape[1], -1) * gates
    return torch.zeros_like(like, dtype=y.dtype).index_add(0, images, y).to(like.dtype)


def expert_loop(x, gates, slot_order, group_offsets, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> Tensor:
    """One MLP after the other on the rows of its images; the host reads the group sizes."""
    images, rows, g = rows_of(x, gates, slot_order)
    parts = rows.split((group_offsets.diff() * x.shape[1]).tolist())
    done = [
        F.linear(F.gelu(F.linear(part, fc1_weight[e], fc1_bias[e])), fc2_weight[e], fc2_bias[e])
        for e, part in enumerate(parts)
    ]
    return combined(torch.cat(done), images, g, x)


def by_grouped_mm(product: Callable, x, gates, slot_order, group_offsets, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """Rows permuted, two grouped products, and plain torch for the rest."""
    images, rows, g = rows_of(x, gates, slot_order)
    ends = (group_offsets[1:] * x.shape[1]).to(torch.int32)
    expert = torch.searchsorted(group_offsets[1:], torch.arange(len(images), device=x.device), right=True)

    def linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = product(rows, weight, ends).view(len(images), x.shape[1], -1)
        return (out + bias[expert][:, None]).flatten(0, 1)

    y = linear(F.gelu(linear(rows, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return combined(y, images, g, x)


def torch_grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weight.mT, offs=ends)


def grouped_gemm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    from grouped_gemm import ops

    sizes = ends.diff(prepend=ends.new_zeros(1)).to("cpu", torch.int64)  # It needs them on the host.
    return ops.gmm(rows, weight, sizes, trans_b=True)


PEERS = {
    "expert loop by autograd": Peer(expert_loop),
    "expert loop, compiled": Peer(expert_loop, compiled=True),
    "grouped_mm + torch": Peer(functools.partial(by_grouped_mm, torch_grouped_mm)),
    "grouped_mm + torch, compiled": Peer(functools.partial(by_grouped_mm, torch_grouped_mm), compiled=True),
    "grouped_gemm + torch": Peer(functools.partial(by_grouped_mm, grouped_gemm), "grouped_gemm"),
}
"""Name of the baseline -> its implementation. ``--baseline NAME`` chooses among them."""


def present(dtype: torch.dtype) -> dict[str, Peer]:
    """The peers that can run here in this dtype."""
    installed = {name: peer for name, peer in PEERS.items() if importlib.util.find_spec(peer.module)}
    if dtype != torch.bfloat16:  # Grouped products support only bf16.
        return {name: peer for name, peer in installed.items() if "grouped" not in name}
    return installed


def compiled(peer: Peer, tiny: bool) -> Callable:
    if not peer.compiled:
        return peer.run
    return torch.compile(peer.run, backend="eager" if tiny else "inductor", dynamic=False)


def cupy_group_ema(directors: list[Tensor], experts: list[Tensor], weights: list[Tensor], momentum: float) -> Callable:
    """GEMA as a CuPy elementwise kernel, with one launch per tensor."""
    import cupy

    kernel = cupy.ElementwiseKernel(
        "raw float32 expert, raw float32 weight, float32 m, int32 count, int64 size",
        "float32 director",
        "float sum = 0; for (int e = 0; e < count; ++e) sum += weight[e] * expert[e * size + i];"
        "director = m * director + (1 - m) * sum",
        "group_ema",
    )
    sets = [
        (cupy.asarray(e).reshape(-1), cupy.asarray(a), e.shape[0], d.numel(), cupy.asarray(d).reshape(-1))
        for d, e, a in zip(directors, experts, weights, strict=True)
    ]

    def run() -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            for expert, weight, count, size, director in sets:
                kernel(expert, weight, momentum, count, size, director)

    return run


def absent() -> dict[str, str]:
    """Module of every peer that is not timed -> why."""
    modules = {peer.module for peer in PEERS.values()} | {"cupy"}
    missing = {m: "not installed" for m in sorted(modules | NO_ADAPTER.keys()) if not importlib.util.find_spec(m)}
    return missing | {m: f"computes something else: {NO_ADAPTER[m]}" for m in NO_ADAPTER if m not in missing}


def versions() -> dict[str, str]:
    """The entries of a results file about peers: the version of each timed one, and why the others are not timed."""
    missing, names = absent(), importlib.metadata.packages_distributions()
    timed = {"cupy", *(peer.module for peer in PEERS.values())} - {"torch", *missing}
    version = {module: importlib.metadata.version(names[module][0]) for module in sorted(timed) if names.get(module)}
    return version | {f"without {module}": reason for module, reason in missing.items()}
