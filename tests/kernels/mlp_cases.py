"""Inputs of the grouped MLP, a loop over images that computes it, and the comparison of the launchers with that loop.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dexkernels.ops.dense import ACTIVATIONS
from dexkernels.ops.grouped_mlp import triton as grouped_mlp
from dexkernels.ops.grouped_mlp.records import Needs, Saved, Slots
from dexkernels.ops.grouped_mlp.triton.configurations import TILES
from dexkernels.ops.triton_common import Tile
from dexkernels.records import MLPWeights
from dexkernels.testing import relative_error

NAMES = ("out", "dx", "dgates", "dfc1_weight", "dfc1_bias", "dfc2_weight", "dfc2_bias")
FLOOR = {torch.float32: 4e-7, torch.float16: 2e-4}
"""Error that is granted whatever plain torch's is: a few units in the last place."""


def tiles(rows=32, cols=32, depth=16, halves=False):
    return {key: Tile(rows, cols, depth, 4, 2, halves) for key in TILES}


def loop(x, gates, indices, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation="gelu"):
    """``out[b] = sum_k gates[b, k] * fc2(gelu(fc1(x[b])))``, image by image; the sum over k in the gates' dtype."""
    rows = []
    for b in range(x.shape[0]):
        total = 0
        for k, e in enumerate(indices[b].tolist()):
            hidden = gelu(F.linear(x[b], fc1_weight[e], fc1_bias[e]), activation)
            total = total + gates[b, k] * F.linear(hidden, fc2_weight[e], fc2_bias[e]).to(gates.dtype)
        rows.append(total.to(x.dtype))
    return torch.stack(rows)


def gelu(z, activation):
    return F.gelu(z, approximate=ACTIVATIONS[activation])


def with_gradients(dtype, gate_dtype, activation, grad_out, x, gates, indices, *weights):
    leaves = [t.to(dtype).clone().requires_grad_() for t in (x, gates, *weights)]
    leaves[1] = gates.to(gate_dtype).clone().requires_grad_()
    out = loop(leaves[0], leaves[1], indices, *leaves[2:], activation)
    grads = torch.autograd.grad(out, leaves, grad_out.to(dtype), allow_unused=True)
    return [out.detach()] + [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]


def make(B, N, D, H, E, K, dtype, indices=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    if indices is None:
        indices = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(B)])
    gates = torch.rand(B, K, generator=generator) + 0.1
    weights = (draw(E, H, D, scale=D**-0.5), draw(E, H), draw(E, D, H, scale=H**-0.5), draw(E, D))
    return draw(B, N, D), draw(B, N, D), gates / gates.sum(1, keepdim=True), indices, weights


def slots_of(gates, indices, E):
    return Slots(gates, *sort(indices, E))


def sort(indices, E):
    """Slots sorted by expert, and the offsets: by Python's sort."""
    flat = indices.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda s: flat[s])
    offsets = [sum(e < limit for e in flat) for limit in range(E + 1)]
    return torch.tensor(order, dtype=torch.int64), torch.tensor(offsets)


class How(NamedTuple):
    """How the launchers are called."""

    layout: Callable = lambda t: t
    """Puts the same values into other strides."""
    needs: tuple[bool, bool, bool] = (True, True, True)
    tiling: dict | None = None
    path: str | None = None
    director: list | None = None
    """Its four tensors; then its output is asked for."""
    activation: str = "gelu"
    grad_dtype: torch.dtype | None = None
    """Of the weights' gradients; None: that of x."""


def run(x, grad_out, gates, indices, weights, **how):
    """The launchers' results in the order of NAMES; with a director, its output comes last. ``how``: see `How`."""
    layout, needs, tiling, path, director, activation, grad_dtype = How(**how)
    E = weights[1].shape[0]
    if director is not None:
        weights = [torch.cat((w, d[None])) for w, d in zip(weights, director, strict=True)]
    weights = MLPWeights(*(layout(w) for w in weights))
    x, grad_out, slots = layout(x), layout(grad_out), slots_of(layout(gates), indices, E)
    options = {"path": path, "tiles": tiling or tiles()}
    out, z, director_out = grouped_mlp.forward(x, slots, weights, True, activation, **options)
    saved = Saved(x, *slots, weights.fc1_weight[:E], weights.fc2_weight[:E], weights.fc2_bias[:E], z)
    grads = grouped_mlp.backward(grad_out, saved, Needs(*needs), grad_dtype or x.dtype, activation, **options)
    if director is None:
        assert director_out.shape == (0, *x.shape[1:])
        return [out, *grads]
    return [out, *grads, director_out]


def check(x, grad_out, gates, indices, weights, **kwargs):
    got, activation = run(x, grad_out, gates, indices, weights, **kwargs), How(**kwargs).activation
    exact = with_gradients(torch.float64, torch.float64, activation, grad_out, x, gates, indices, *weights)
    plain = with_gradients(x.dtype, torch.float32, activation, grad_out, x, gates, indices, *weights)
    names, director = NAMES, kwargs.get("director")
    if director is not None:
        names = (*NAMES, "director_out")
        for results, dtype in ((exact, torch.float64), (plain, x.dtype)):
            fc1_weight, fc1_bias, fc2_weight, fc2_bias = (t.to(dtype) for t in director)
            hidden = gelu(F.linear(x.to(dtype), fc1_weight, fc1_bias), activation)
            results.append(F.linear(hidden, fc2_weight, fc2_bias))
    for name, g, want, p in zip(names, got, exact, plain, strict=True):
        bound = 2 * relative_error(p, want) + FLOOR[x.dtype]
        assert relative_error(g, want) <= bound, f"{name}: {relative_error(g, want):.2e} > {bound:.2e}"
        of_weights = name.startswith("dfc") and kwargs.get("grad_dtype")
        assert g.dtype == (torch.float32 if name == "dgates" else of_weights or x.dtype)
    return got
