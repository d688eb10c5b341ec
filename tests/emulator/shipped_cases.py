"""Inputs of the operators, the launchers' results for them, and what the specification says in other precisions.

Every function takes ``shipped``, the module `ptx_emulator.shipped`, from the fixture of that name.
Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
"""

from typing import NamedTuple

import torch

NAMES = ("out", "dx", "dgates", "dfc1_weight", "dfc1_bias", "dfc2_weight", "dfc2_bias")

FLOOR = {torch.float32: 4e-7, torch.float16: 2e-4, torch.bfloat16: 1.6e-3}
"""Error that is granted whatever plain torch's is: a few units in the last place."""


class MLPCase(NamedTuple):
    x: torch.Tensor
    grad_out: torch.Tensor
    gates: torch.Tensor
    indices: torch.Tensor
    weights: list[torch.Tensor]


def make_mlp(B, N, D, H, E, K, dtype, seed=0) -> MLPCase:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    indices = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(B)])
    gates = torch.rand(B, K, generator=generator) + 0.1
    weights = [draw(E, H, D, scale=D**-0.5), draw(E, H), draw(E, D, H, scale=H**-0.5), draw(E, D)]
    return MLPCase(draw(B, N, D), draw(B, N, D), gates / gates.sum(1, keepdim=True), indices, weights)


def small_tiles(shipped):
    """Blocks that small shapes fill, for kernels whose own would be mostly empty."""
    table = shipped.configurations.GATHER
    return shipped.configurations.TILES | {k: shipped.Tile(64, 64, 32, 4, 3, k[0] == "to_hidden_grad") for k in table}


def run_mlp(shipped, case: MLPCase, path, tiles=None, director=None, grad_dtype=None) -> dict[str, torch.Tensor]:
    """Forward and backward of the launchers."""
    E = case.weights[1].shape[0]
    flat = case.indices.flatten()
    offsets = torch.tensor([int((flat < limit).sum()) for limit in range(E + 1)])
    slots = shipped.mlp_records.Slots(case.gates, flat.sort(stable=True).indices, offsets)
    stacked = case.weights
    if director is not None:
        stacked = [torch.cat((w, d[None])) for w, d in zip(case.weights, director, strict=True)]
    weights = shipped.MLPWeights(*stacked)
    options = {"path": path, "tiles": tiles}
    out, z, director_out = shipped.grouped_mlp.forward(case.x, slots, weights, True, **options)
    saved = shipped.mlp_records.Saved(case.x, *slots, *(w[:E] for w in (stacked[0], stacked[2], stacked[3])), z)
    needs = shipped.mlp_records.Needs()
    grads = shipped.grouped_mlp.backward(case.grad_out, saved, needs, grad_dtype or case.x.dtype, **options)
    results = dict(zip(NAMES, (out, *grads), strict=True))
    return results if director is None else results | {"director_out": director_out}


def want_mlp(shipped, case: MLPCase, dtype, gate_dtype, director=None) -> dict[str, torch.Tensor]:
    """The same by the specification, and autograd, in another precision."""
    leaves = [t.to(dtype).requires_grad_() for t in (case.x, *case.weights)]
    gates = case.gates.to(gate_dtype).requires_grad_()
    routing = shipped.Routing(gates, case.indices, None, None, None, None, None)
    out = shipped.reference.grouped_mlp(leaves[0], routing, *leaves[1:])
    grads = torch.autograd.grad(out, (leaves[0], gates, *leaves[1:]), case.grad_out.to(dtype))
    results = dict(zip(NAMES, (out.detach(), *grads), strict=True))
    if director is not None:
        results["director_out"] = shipped.reference.mlp(case.x.to(dtype), *(t.to(dtype) for t in director))
    return results


def check_errors(shipped, got, exact, plain, dtype) -> None:
    """Errors against float64 are at most twice plain torch's in the same precision."""
    for name, value in got.items():
        bound = 2 * shipped.relative_error(plain[name], exact[name]) + FLOOR[dtype]
        error = shipped.relative_error(value, exact[name])
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


def check_mlp(shipped, case, emulated, path, tiles=None, director=None, grad_dtype=None):
    with emulated as emulator:
        got = run_mlp(shipped, case, path, tiles, director, grad_dtype)
    exact = want_mlp(shipped, case, torch.float64, torch.float64, director)
    plain = want_mlp(shipped, case, case.x.dtype, torch.float32, director)
    check_errors(shipped, got, exact, plain, case.x.dtype)
    return got, emulator
