"""`opcheck` of the operators behind `routed_mlp`."""

import itertools

import pytest
import torch
from operator_cases import OPS, B, E, K, N, leaves, noise, shadows


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("route_from", ["cls", pytest.param("mean", marks=pytest.mark.slow)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lower, director", [(None, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_opcheck_routed_mlp(routing, route_from, lower, director, masked):
    mask = torch.arange(N).expand(B, N) < torch.arange(B)[:, None] if masked else None
    x, *weights = leaves()
    rows = B if routing == "image" else B * N
    low = shadows(weights[1:], lower, director)
    args = (
        x,
        weights[0],
        noise(rows),
        torch.ones(E),
        mask,
        *weights[1:],
        *low,
        K,
        0.5,
        routing,
        route_from,
        "gelu",
        True,
    )
    args = (*args, "reference", "reference")
    torch.library.opcheck(OPS.routed_mlp, args)
    out, z, director_out, p, gates, indices, balance, _, order, _, offsets = OPS.routed_mlp(*args)
    assert director_out.shape == (x.shape if director else (0,))
    computed = [w[:E] for w in low] if lower else weights[1:]
    saved = (x, weights[0], computed[0], computed[2], computed[3], z, p, gates, indices, order, offsets)
    tensors = [t.detach() for t in (torch.ones_like(out), torch.ones_like(gates), torch.ones_like(balance), *saved)] + [
        mask
    ]
    for needs in itertools.product([True, False], repeat=3):
        backward = (*tensors, 0.5, routing, route_from, "gelu", *needs, weights[1].dtype, "reference", "reference")
        torch.library.opcheck(OPS.routed_mlp_backward, backward)
