"""The tanh GELU of experts and directors: that of the specification, in plain torch whatever backend a layer names."""

import pytest
import torch
import torch.nn.functional as F
from layer_cases import expert, images, layer_of
from operator_cases import K, leaves

from dexkernels import DEXLayer, grouped_mlp, reference, route
from dexkernels.ops import backends
from dexkernels.testing import relative_error


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


def test_a_backend_without_it_is_refused_by_the_operator_and_gives_way_in_a_layer(monkeypatch):
    x, router, *weights = leaves()
    r = route(x.detach(), router.detach(), K)
    with pytest.raises(
        ValueError, match="'triton' cannot run grouped_mlp: no gelu_tanh: its kernels compute the exact"
    ):
        grouped_mlp(x, r, *weights, activation="gelu_tanh", backend="triton")
    with pytest.raises(ValueError, match="activation: expected one of gelu, gelu_tanh, got 'relu'"):
        grouped_mlp(x, r, *weights, activation="relu")
    with pytest.raises(ValueError, match="activation: expected one of gelu, gelu_tanh, got 'swish'"):
        DEXLayer(4, 5, activation="swish")
    monkeypatch.setattr(backends, "_why_no_triton", lambda: None)
    asked = []
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda op, backend: asked.append((op, backend)) or load(op, "reference"))
    layer_of(activation="gelu_tanh", backend="triton")(images())
    layer_of(backend="triton")(images())
    assert asked == [("route", "triton"), ("grouped_mlp", "reference"), ("route", "triton"), ("grouped_mlp", "triton")]
