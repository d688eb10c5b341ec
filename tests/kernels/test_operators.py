"""The Triton launchers behind the operators: what compilers are told of them is true, and nothing else computes."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

from dexkernels import DEXLayer  # noqa: E402
from dexkernels.ops import backends  # noqa: E402
from dexkernels.testing import randomize_, relative_error  # noqa: E402

from .conftest import embed  # noqa: E402

B, N, D, H, E, K = 3, 5, 8, 12, 4, 2
OPS = torch.ops.dexkernels


@pytest.fixture(autouse=True)
def poison():
    """Not here: `opcheck` calls the launchers with tensors that hold nothing."""


def leaves(dtype=torch.float32, rows=B):
    """x, gates, and the four expert tensors, all requiring gradient; slot order and offsets of a routing of x."""
    g = torch.Generator().manual_seed(0)
    shapes = [(rows, N, D), (rows, K), (E, H, D), (E, H), (E, D, H), (E, D)]
    x, gates, *weights = (torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes)
    indices = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(rows)]).flatten()
    offsets = torch.tensor([int((indices < e).sum()) for e in range(E + 1)])
    return x, gates.detach().float().requires_grad_(), weights, indices.argsort(stable=True), offsets


def plain(*tensors):
    return [t.detach() if isinstance(t, torch.Tensor) else t for t in tensors]


@pytest.mark.parametrize("strided", [False, True])
def test_opcheck_route(strided):
    g = torch.Generator().manual_seed(0)
    r, w, noise = (torch.randn(s, generator=g) for s in ((B, D), (E, D), (B, E)))
    r, w = (embed(t) if strided else t for t in (r, w))
    args = (r.requires_grad_(), w.requires_grad_(), noise, torch.ones(E), K, 0.5, "triton")
    torch.library.opcheck(OPS.route, args)
    p, gates, indices, balance, *_ = OPS.route(*args)
    torch.library.opcheck(OPS.route_backward, plain(gates, balance, p, gates, indices, r, w, 0.5, "triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_opcheck_grouped_mlp(dtype):
    x, gates, weights, order, offsets = leaves(dtype)
    args = (x, gates, order, offsets, *weights, *(None,) * 4, True, "gelu", "triton")
    torch.library.opcheck(OPS.grouped_mlp, args)
    torch.library.opcheck(OPS.grouped_mlp, (*plain(*args)[:12], False, "gelu", "triton"))
    _, z = OPS.grouped_mlp(*args)
    saved = plain(x, x, gates, order, offsets, weights[0], weights[2], weights[3], z)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        for grad_dtype in {dtype, torch.float32}:
            torch.library.opcheck(OPS.grouped_mlp_backward, (*saved, *needs, grad_dtype, "gelu", "triton"))


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("director", [False, True])
def test_opcheck_routed_mlp(routing, director):
    x, _, weights, *_ = leaves()
    router = torch.randn(E, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    shadows = (None,) * 4
    if director:
        shadows = tuple(torch.cat((w, w[:1])).detach().half() for w in weights)
    tail = (K, 0.5, routing, "cls", "gelu", True, "triton", "triton")
    args = (x, router, None, None, None, *weights, *shadows, *tail)
    torch.library.opcheck(OPS.routed_mlp, args)
    out, z, director_out, p, gates, indices, balance, _, order, _, offsets = OPS.routed_mlp(*args)
    assert director_out.shape == (x.shape if director else (0,))
    computed = [w[:E] for w in shadows] if director else weights
    saved = (x, router, computed[0], computed[2], computed[3], z, p, gates, indices, order, offsets)
    for needs in ((True, True, True), (True, False, False), (False, True, True)):
        backward = (
            out,
            torch.ones_like(gates),
            balance,
            *saved,
            None,
            0.5,
            routing,
            "cls",
            "gelu",
            *needs,
            torch.float32,
        )
        torch.library.opcheck(OPS.routed_mlp_backward, plain(*backward, "triton", "triton"))


@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck_align_loss(kind, strided):
    g = torch.Generator().manual_seed(0)
    y, d = (torch.randn(B, N, D, generator=g) for _ in range(2))
    y, d = (embed(t) if strided else t for t in (y, d))
    args = (y.requires_grad_(), d, None, kind, "triton")
    torch.library.opcheck(OPS.align_loss, args)
    loss, saved = OPS.align_loss(*args)
    torch.library.opcheck(OPS.align_loss_backward, plain(loss, y, d, saved, None, kind, "triton"))


@pytest.mark.parametrize("skip", [None, False, True])
def test_opcheck_group_ema(skip):
    g = torch.Generator().manual_seed(0)
    directors = [torch.randn(s, generator=g) for s in ((3, 2), (4,))]
    experts = [torch.randn(E, *d.shape, generator=g) for d in directors]
    weights = [torch.rand(E, generator=g) for _ in directors]
    skip = None if skip is None else torch.tensor(skip)
    torch.library.opcheck(OPS.group_ema_, (directors, experts, weights, torch.tensor(0.9), skip, "triton"))


def step(layer, x, noise):
    """Output, both losses, every gradient and the updated director."""
    x = x.clone().requires_grad_()
    y, aux = layer(x, noise_std=0.5, router_noise=noise, return_aux=True)
    (y.square().sum() + 3 * aux.align_loss + aux.balance_loss).backward()
    layer.update_director(aux.gate_mass, 0.9)
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    return [y.detach(), aux.align_loss, aux.balance_loss, x.grad, *grads, *layer.director.parameters(), layer.usage_ema]


@pytest.mark.parametrize("routing", ["image", "token"])
def test_a_layer_of_this_backend_runs_nothing_of_the_spec(routing, monkeypatch):
    if torch.get_default_device().type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(B, N, D, generator=g), torch.randn(B, 1 if routing == "image" else N, E, generator=g)
    want = step(randomize_(DEXLayer(D, H, E, K, routing=routing, backend="reference")), x, noise)

    def refuse(*args, **kwargs):
        raise AssertionError("the spec computes")

    for op in backends.TABLES:
        module = backends.load(op, "reference")
        for name in {"forward", "backward", "group_ema_"} & vars(module).keys():
            monkeypatch.setattr(module, name, refuse)
    got = step(randomize_(DEXLayer(D, H, E, K, routing=routing, backend="triton")), x, noise)
    assert len(got) == len(want) == 14
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-5
    with pytest.raises(AssertionError, match="the spec computes"):
        step(DEXLayer(D, H, E, K, routing=routing, backend="reference"), x, noise)


def test_what_the_kernels_lack_a_layer_computes_in_plain_torch(monkeypatch):
    """A mask leaves the experts to Triton, alone."""
    if torch.get_default_device().type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(B, N, D, generator=g), torch.arange(N) < torch.arange(1, B + 1)[:, None] % N + 1
    for options, masks in (({"route_from": "mean"}, mask), ({"route_from": "mean", "activation": "gelu_tanh"}, mask)):
        layers = [DEXLayer(D, H, E, K, backend=backend, **options) for backend in ("triton", "reference")]
        randomize_(layers[0], 0)
        layers[1].load_state_dict(layers[0].state_dict())
        answers = []
        for layer in layers:
            leaf = x.clone().requires_grad_()
            y, aux = layer(leaf, token_mask=masks, return_aux=True)
            (y.square().sum() + aux.align_loss + aux.balance_loss).backward()
            answers.append([y.detach(), aux.align_loss.detach(), aux.gate_mass, leaf.grad, layer.router_weight.grad])
        torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)
