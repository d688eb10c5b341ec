"""`opcheck` of the operators behind `grouped_mlp`."""

import itertools

import pytest
import torch
from operator_cases import OPS, K, leaves, shadows

from dexkernels import route


@pytest.mark.parametrize("activation", ["gelu", pytest.param("gelu_tanh", marks=pytest.mark.slow)])
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("lower", [None, torch.bfloat16])
def test_opcheck_grouped_mlp(save, lower, activation):
    x, w, *weights = leaves()
    r = route(x.detach(), w.detach(), K)
    gates = r.gates.clone().requires_grad_()
    if not save:
        x, gates, *weights = (t.detach() for t in (x, gates, *weights))
    x, low = x.to(lower or x.dtype).detach().requires_grad_(save), shadows(weights, lower, director=False)
    args = (x, gates, r.slot_order, r.group_offsets, *weights, *low, save, activation, "reference")
    torch.library.opcheck(OPS.grouped_mlp, args)
    if save:
        _, z = OPS.grouped_mlp(*args)
        computed = low if lower else weights
        plain = [t.detach() for t in (torch.ones_like(x), x, gates, r.slot_order, r.group_offsets)]
        plain += [computed[0].detach(), computed[2].detach(), computed[3].detach(), z.detach()]
        for needs in itertools.product([True, False], repeat=3):
            torch.library.opcheck(OPS.grouped_mlp_backward, (*plain, *needs, weights[0].dtype, activation, "reference"))
