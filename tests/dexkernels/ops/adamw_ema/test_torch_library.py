"""`opcheck` of the operator behind `adamw_ema_`, and `adamw_ema_` and `DEXAdamW` under torch.compile."""

import copy

import pytest
import torch
from layer_cases import layer_of
from operator_cases import OPS

from dexkernels.ops.adamw_ema import _flat, adamw_ema_
from dexkernels.ops.adamw_ema.records import Rule, Scalars, Update
from dexkernels.optim import DEXAdamW

E = 3


def updates_of():
    def draw(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))

    def moments(*shape):
        return draw(*shape), draw(*shape).flip(0), draw(*shape).square(), torch.tensor(2.0)

    copies = torch.empty(E + 1, 4, 2, dtype=torch.bfloat16).fill_(-1)
    return [
        Update(draw(4), *moments(4)),
        Update(draw(E, 4, 2), *moments(E, 4, 2), draw(4, 2), torch.rand(E), copies),
        Update(draw(E, 5), *moments(E, 5), draw(5), torch.rand(E)),
    ]


@pytest.mark.parametrize("skip", [None, torch.tensor(False), torch.tensor(True)])
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["a number", "a tensor"])
def test_opcheck(skip, lr):
    scalars = Scalars(torch.tensor(0.9, dtype=torch.float64), None if skip is None else torch.tensor(0.5), skip)
    torch.library.opcheck(OPS.adamw_ema_, (*_flat(updates_of(), Rule(lr), scalars), "reference", False))


@pytest.mark.slow
def test_compiled_without_a_break():
    eager, compiled = updates_of(), updates_of()
    for u, v in zip(eager, compiled, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(u.moved, v.moved, strict=True))
    eager[1].group_weights.copy_(compiled[1].group_weights), eager[2].group_weights.copy_(compiled[2].group_weights)

    def step(updates, momentum, clip_scale):
        adamw_ema_(updates, Rule(1e-2), momentum=momentum, clip_scale=clip_scale)

    scalars = torch.tensor(0.75), torch.tensor(0.5)
    before = [t.clone() for u in eager for t in u.moved]
    step(eager, *scalars)
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, *scalars)
    moved = [[t for u in updates for t in (*u.moved, u.step)] for updates in (eager, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, [t for u in eager for t in u.moved], strict=True))


@pytest.mark.slow
def test_a_compiled_step_of_the_optimizer():
    """It runs eagerly, as a step of torch's optimizers may."""
    layer = layer_of().float()
    layers = [layer, copy.deepcopy(layer)]
    for one, wrap in zip(layers, (lambda f: f, lambda f: torch.compile(f, backend="aot_eager")), strict=True):
        optimizer = DEXAdamW(one, lr=1e-2, copies=torch.bfloat16)
        step = wrap(lambda mass, optimizer=optimizer: optimizer.step(gate_mass=[mass], momentum=0.5))
        for i in range(2):
            optimizer.zero_grad()
            x = torch.randn(3, 2, one.dim, generator=torch.Generator().manual_seed(i))
            y, aux = one(x, return_aux=True)
            (y.square().mean() + aux.balance_loss).backward()
            step(aux.gate_mass)
    assert all(torch.equal(a, b) for a, b in zip(*(one.state_dict().values() for one in layers), strict=True))
    assert not torch.equal(layers[0].director.fc1.weight, layer_of().float().director.fc1.weight)
