"""The torch.library operators: `opcheck` of each, and `routed_mlp` against `route` followed by `grouped_mlp`."""

import itertools

import pytest
import torch

from dexkernels import align_loss, group_ema_, grouped_mlp, ops, route
from dexkernels.layer import update_directors
from dexkernels.testing import relative_error

B, N, D, H, E, K = 4, 3, 5, 7, 6, 2
OPS = torch.ops.dexkernels


def leaves(dtype=torch.float64, seed=0):
    """x, router weight and the four expert tensors, all requiring gradient."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, N, D), (E, D), (E, H, D), (E, H), (E, D, H), (E, D)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def shadows(weights, dtype=torch.bfloat16, director=True):
    """Of the expert tensors in ``dtype``, with a director's behind them; without a dtype there are none."""
    if dtype is None:
        return (None,) * 4
    return tuple(torch.cat((w, w[:1] / 2)[: 1 + director]).detach().to(dtype) for w in weights)


def noise(rows=B, dtype=torch.float64):
    return torch.randn(rows, E, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("noisy", [False, True])
def test_opcheck_route(noisy):
    x, w, *_ = leaves()
    r = x[:, 0].detach().clone().requires_grad_()
    args = (r, w, noise() if noisy else None, torch.ones(E) if noisy else None, K, 0.5, "reference")
    torch.library.opcheck(OPS.route, args)
    p, gates, indices, balance, *_ = OPS.route(*args)
    backward = (torch.ones_like(gates), balance, p, gates, indices, r, w, 0.5, "reference")
    torch.library.opcheck(OPS.route_backward, tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in backward))


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("lower", [None, torch.bfloat16])
def test_opcheck_grouped_mlp(save, lower):
    x, w, *weights = leaves()
    r = route(x.detach(), w.detach(), K)
    gates = r.gates.clone().requires_grad_()
    if not save:
        x, gates, *weights = (t.detach() for t in (x, gates, *weights))
    x, low = x.to(lower or x.dtype).detach().requires_grad_(save), shadows(weights, lower, director=False)
    args = (x, gates, r.slot_order, r.group_offsets, *weights, *low, save, "reference")
    torch.library.opcheck(OPS.grouped_mlp, args)
    if save:
        _, z = OPS.grouped_mlp(*args)
        computed = low if lower else weights
        plain = [t.detach() for t in (torch.ones_like(x), x, gates, r.slot_order, r.group_offsets)]
        plain += [computed[0].detach(), computed[2].detach(), computed[3].detach(), z.detach()]
        for needs in itertools.product([True, False], repeat=3):
            torch.library.opcheck(OPS.grouped_mlp_backward, (*plain, *needs, weights[0].dtype, "reference"))


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("route_from", ["cls", "mean"])
@pytest.mark.parametrize("lower, director", [(None, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_opcheck_routed_mlp(routing, route_from, lower, director):
    x, *weights = leaves()
    rows = B if routing == "image" else B * N
    low = shadows(weights[1:], lower, director)
    args = (x, weights[0], noise(rows), torch.ones(E), *weights[1:], *low, K, 0.5, routing, route_from, True)
    args = (*args, "reference", "reference")
    torch.library.opcheck(OPS.routed_mlp, args)
    out, z, director_out, p, gates, indices, balance, _, order, _, offsets = OPS.routed_mlp(*args)
    assert director_out.shape == (x.shape if director else (0,))
    computed = [w[:E] for w in low] if lower else weights[1:]
    saved = (x, weights[0], computed[0], computed[2], computed[3], z, p, gates, indices, order, offsets)
    tensors = [t.detach() for t in (torch.ones_like(out), torch.ones_like(gates), torch.ones_like(balance), *saved)]
    for needs in itertools.product([True, False], repeat=3):
        backward = (*tensors, 0.5, routing, route_from, *needs, weights[1].dtype, "reference", "reference")
        torch.library.opcheck(OPS.routed_mlp_backward, backward)


@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
def test_opcheck_align_loss(kind):
    y, d = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True), torch.randn(B, N, D, dtype=torch.float64)
    torch.library.opcheck(OPS.align_loss, (y, d, kind, "reference"))
    torch.library.opcheck(
        OPS.align_loss_backward, (torch.ones(()).double(), y.detach(), d, y.new_empty(0, B * N), kind, "reference")
    )


@pytest.mark.parametrize("skip", [None, torch.tensor(False), torch.tensor(True)])
def test_opcheck_group_ema(skip):
    directors, experts = [torch.randn(3, 2), torch.randn(4)], [torch.randn(E, 3, 2), torch.randn(E, 4)]
    args = (directors, experts, [torch.rand(E), torch.rand(E)], torch.tensor(0.9), skip, "reference")
    torch.library.opcheck(OPS.group_ema_, args)


def both(tensors, **options):
    """Output, the routing, and the gradients in all leaves: of the fused node and of the two nodes."""
    results = []
    for fused in (True, False):
        x, w, *weights = tensors
        if fused:
            y, r, _ = ops.routed_mlp(x, w, *weights, K, **options)
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
        y, r, _ = ops.routed_mlp(x, w, *weights, K)
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


def test_group_ema_tells_autograd_that_directors_changed():
    d = torch.zeros(3)
    version = d._version
    group_ema_([d], [torch.ones(2, 3)], [torch.ones(2) / 2], 0.5)
    assert d._version > version and d.tolist() == [0.5] * 3
    update_directors([], [], 0.5)
