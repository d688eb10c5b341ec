"""The activation of experts and directors, the tanh GELU among them, and which backend computes it."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from layer_cases import expert, images, layer_of
from operator_cases import K, leaves

from dexkernels import DEXLayer, grouped_mlp, reference, route
from dexkernels.ops import backends
from dexkernels.testing import relative_error

operator = importlib.import_module("dexkernels.ops.grouped_mlp")


def test_the_specification_is_torchs():
    z = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    torch.testing.assert_close(reference.gelu(z, "gelu_tanh"), F.gelu(z, approximate="tanh"))
    assert (reference.gelu(z, "gelu_tanh") - reference.gelu(z, "gelu")).abs().max() > 1e-4


@pytest.mark.parametrize("routing", ["image", "token"])
def test_values_and_gradients(routing):
    x, router, *weights = leaves()
    r = route(x.detach(), router.detach(), K, routing=routing)
    r = r._replace(gates=r.gates.requires_grad_())
    inputs = [x, r.gates, *weights]
    out, want = (f(x, r, *weights, activation="gelu_tanh") for f in (grouped_mlp, reference.grouped_mlp))
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    grads, wanted = (torch.autograd.grad(y, inputs, upstream) for y in (out, want))
    exact = grouped_mlp(x, r, *weights)
    others = torch.autograd.grad(exact, inputs, upstream)
    for got, expected in zip((out, *grads), (want, *wanted), strict=True):
        assert relative_error(got, expected) < 1e-14
    assert all(
        relative_error(got, other) > 1e-5 for got, other in zip((out, *grads[:3]), (exact, *others[:3]), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_layer_computes_experts_and_director_with_it(dtype):
    """In bfloat16 the director stands among the copies of the experts."""
    layer = layer_of(activation="gelu_tanh", dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x = images(dtype=layer.usage_ema.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y, aux = layer(x, return_aux=True)
    weights = list(layer.experts.weights)
    out = sum(
        torch.stack(
            [
                aux.gates[b, k] * reference.mlp(x[b], *(w[e] for w in weights), "gelu_tanh")
                for b, e in enumerate(aux.expert_indices[:, k].tolist())
            ]
        )
        for k in range(2)
    )
    director = reference.mlp(x, *layer.director.weights, "gelu_tanh")
    bound = 1e-13 if dtype == torch.float64 else 1e-2
    assert relative_error(y, out) < bound
    assert abs(aux.align_loss / reference.align_loss(out, director) - 1) < bound
    layer.path = "director"
    if dtype == torch.float64:
        assert relative_error(layer(x), director) < bound
        assert relative_error(layer(x), expert_of_director(layer, x)) > 1e-5
        layer.director.fc1 = torch.nn.utils.parametrizations.weight_norm(layer.director.fc1)  # another kind of map
        assert relative_error(layer(x), director) < bound


def expert_of_director(layer, x):
    """The director's weights with the exact GELU."""
    layer.copy_director_to_experts_()
    return expert(layer, 0, x)


def test_unknown_activations_are_refused():
    x, router, *weights = leaves()
    r = route(x.detach(), router.detach(), K)
    with pytest.raises(ValueError, match="activation: expected one of gelu, gelu_tanh, got 'relu'"):
        grouped_mlp(x, r, *weights, activation="relu")
    with pytest.raises(ValueError, match="activation: expected one of gelu, gelu_tanh, got 'swish'"):
        DEXLayer(4, 5, activation="swish")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_the_backend_of_a_layer_computes_it(activation, monkeypatch):
    monkeypatch.setattr(backends, "_why_no_triton", lambda: None)
    asked = []
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda op, backend: asked.append((op, backend)) or load(op, "reference"))
    layer_of(activation=activation, backend="triton")(images())
    assert asked == [("route", "triton"), ("grouped_mlp", "triton")]


@pytest.mark.parametrize("routing, K", [("image", 2), ("token", 2)])
def test_sizes_past_32_bits_give_way_in_a_layer_and_are_refused_by_the_operator(routing, K, monkeypatch):
    """Rows are B*N*K, and in a layer that asks for losses B*N*(K + 1)."""
    monkeypatch.setattr(backends, "_why_no_triton", lambda: None)
    asked = []
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda op, backend: asked.append((op, backend)) or load(op, "reference"))
    layer, x = layer_of(routing=routing, backend="triton"), images().repeat(50, 1, 1)
    rows = x.shape[0] * x.shape[1] * K
    for limit, backend in ((rows, "triton"), (rows - 1, "reference")):
        monkeypatch.setattr(operator, "MAX_COUNT", limit)
        asked.clear()
        layer(x)
        assert ("grouped_mlp", backend) in asked
    x, router, *weights = leaves()
    monkeypatch.setattr(operator, "MAX_COUNT", 1)
    with pytest.raises(ValueError, match="'triton' cannot run grouped_mlp: no sizes past 32 bits: its kernels count"):
        grouped_mlp(x, route(x.detach(), router.detach(), K, routing=routing), *weights, backend="triton")
    monkeypatch.undo()
    half = torch.bfloat16, "gelu"
    assert operator.need_of(1, 1, torch.empty(1, 2**25, 1, device="meta"), *half) == operator.LARGE
    assert operator.need_of(1, 1, torch.empty(1, 2**15, 2**16, device="meta"), *half) == operator.LARGE
    assert operator.need_of(65, 2**20, torch.empty(8, 3072, 768, device="meta"), *half) is None
