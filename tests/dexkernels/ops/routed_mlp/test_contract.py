"""`routed_mlp` against `route` followed by `grouped_mlp`."""

import pytest
import torch
from operator_cases import B, E, K, N, leaves, noise

from dexkernels import align_loss, grouped_mlp, route
from dexkernels.ops.route import Noise
from dexkernels.ops.routed_mlp import Settings, routed_mlp
from dexkernels.records import MLPWeights
from dexkernels.testing import relative_error


def both(tensors, **options):
    """Output, the routing, and the gradients in all leaves: of the fused node and of the two nodes."""
    results = []
    for fused in (True, False):
        x, w, *weights = tensors
        if fused:
            settings = {name: options[name] for name in Settings._fields if name in options}
            noise = Noise(options.get("noise_std", 0.0), options.get("router_noise"), options.get("usage_ema"))
            y, r, _ = routed_mlp(x, w, MLPWeights(*weights), Settings(K, **settings), noise)
        else:
            r = route(x, w, K, **options)
            y = grouped_mlp(x, r, *weights)
        scale = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
        loss = (y * scale).sum() + 0.7 * r.balance_loss + (r.gates.square().sum() if y.dtype.itemsize > 2 else 0)
        results.append([y, *r, *torch.autograd.grad(loss, tensors)])
    return results


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("route_from", ["cls", "mean"])
@pytest.mark.parametrize("noisy", [False, True])
def test_routed_mlp_is_route_and_grouped_mlp(routing, route_from, noisy):
    options = {"routing": routing, "route_from": route_from, "temperature": 0.8}
    if noisy:
        rows = 1 if routing == "image" else N
        options |= {"noise_std": 0.7, "router_noise": noise(B * rows).view(B, rows, E), "usage_ema": torch.rand(E)}
    fused, apart = both(leaves(), **options)
    assert len(fused) == len(apart) == 14
    for a, b in zip(fused, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("routing", ["image", "token"])
def test_routed_mlp_under_autocast(routing):
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        fused, apart = both(leaves(torch.float32), routing=routing)
    exact = both(leaves(), routing=routing)[0]
    assert fused[0].dtype == torch.bfloat16
    for a, b, tensor in zip(fused[-6:], apart[-6:], leaves(torch.float32), strict=True):
        assert a.dtype == tensor.dtype and relative_error(a, b) < 2e-2
    assert torch.equal(fused[2].long(), exact[2].long())


def test_compiled_layer_graph_equals_eager():
    """AOT autograd sees the operators through their fake kernels: shapes, dtypes and gradients are those of eager."""
    x, w, *weights = leaves()

    def run(x, w, *weights):
        y, r, _ = routed_mlp(x, w, MLPWeights(*weights), Settings(K), Noise())
        return y, align_loss(y, x.detach()), r.balance_loss

    got = torch.compile(run, backend="aot_eager", fullgraph=True)(x, w, *weights)
    want = run(x, w, *weights)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        *(torch.autograd.grad(sum(t.sum() for t in out), (x, w, *weights)) for out in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()
