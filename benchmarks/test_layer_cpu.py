"""The CPU backend's layer step against the loop over experts and against dense MLPs of equal work.

For B 8, N 65, D 768, H 3072, K 2: 9.8 GFLOP forward and 19.6 backward in the experts, 4.9 in the director. The layer
of the demo, B 16, D 192, H 768, takes an eighth of that. Where torch multiplies the layer's matrices too, only what
lies between the products can be saved: at D 768 the loop's GEMA, and at D 192 hardly anything.
"""

import pytest
import torch
import torch.nn.functional as F

from dexkernels import DEXLayer
from dexkernels.layer import MLP
from dexkernels.testing import ExpertLoop, randomize_

SIZES = {"ViT-B": (8, 65, 768, 3072, 8, 2), "demo": (16, 65, 192, 768, 8, 2), "tiny": (4, 5, 16, 32, 4, 2)}


@pytest.fixture(params=["ViT-B", "demo"])
def size(request):
    return request.param


@pytest.fixture
def sizes(tiny, size):
    return SIZES["tiny" if tiny else size]


@pytest.fixture
def inputs(sizes):
    B, N, D, H, E, K = sizes
    torch.manual_seed(0)
    return torch.randn(B, N, D), torch.randn(B, N, D)


@pytest.fixture
def layer(sizes):
    _, _, D, H, E, K = sizes
    return randomize_(DEXLayer(D, H, E, K))


def gflops(sizes):
    """Operations of forward and backward in the experts and forward in the director."""
    B, N, D, H, _, K = sizes
    return (6 * K + 2) * B * N * 2 * D * H / 1e9


def layer_step(layer, x, grad_out):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y, aux = layer(x, return_aux=True)
    ((y * grad_out).sum() + aux.align_loss + aux.balance_loss).backward()
    layer.update_director(aux.gate_mass, 0.99)


def test_step_against_expert_loop(size, sizes, inputs, layer, compare, report, own_library):
    """Forward, backward and GEMA."""
    _, _, D, H, E, K = sizes
    loop = ExpertLoop(D, H, E, K)
    loop.load_state_dict(layer.reference_state_dict())

    def loop_step():
        loop.zero_grad()
        x = inputs[0].detach().requires_grad_()
        y, align, balance, mass = loop(x)
        ((y * inputs[1]).sum() + align + balance).backward()
        loop.update_director(mass, 0.99)

    with torch.no_grad():
        torch.testing.assert_close(layer(inputs[0]), loop(inputs[0])[0], rtol=1e-3, atol=1e-4)
    t = compare({"layer": lambda: layer_step(layer, *inputs), "loop": loop_step})
    detail = f"{t['layer'] * 1e3:.1f} ms ({gflops(sizes) / t['layer']:.0f} GFLOP/s), loop {t['loop'] * 1e3:.1f} ms"
    least = 1.3 if own_library else {"ViT-B": 1.1, "demo": 0.9}[size]
    report(f"layer step, D {D}", "loop over nn.Linear experts", t["loop"] / t["layer"], least, detail, 1.3)


def test_step_against_dense(sizes, inputs, layer, compare, report):
    """The same products without routing: forward and backward of a dense MLP over B*K*N rows, forward over B*N rows."""
    B, N, D, H, _, K = sizes
    dense, d = MLP(D, H), MLP(D, H)
    rows, grad_rows = torch.randn(B * K * N, D), torch.randn(B * K * N, D)

    def dense_step():
        dense.zero_grad()
        x = rows.detach().requires_grad_()
        (dense(x) * grad_rows).sum().backward()
        with torch.no_grad():
            F.linear(F.gelu(F.linear(inputs[0], d.fc1.weight, d.fc1.bias)), d.fc2.weight, d.fc2.bias)

    t = compare({"layer": lambda: layer_step(layer, *inputs), "dense": dense_step})
    detail = f"{t['layer'] * 1e3:.1f} ms, dense {t['dense'] * 1e3:.1f} ms"
    report(f"layer step, D {D}", "dense MLPs of equal rows", t["dense"] / t["layer"], 0.65, detail)
