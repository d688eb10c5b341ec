"""What a user does to a `DEXLayer` by accident works, or is refused in words that blame the right thing."""

import copy
import inspect
import pickle

import pytest
import torch
from layer_cases import changed, images, layer_of, snapshot, step
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from dexkernels import DEXLayer, align_loss, grouped_mlp, route

HALVES = [torch.float16, torch.bfloat16]


OTHERS = {
    "routing": "token", "temperature": 0.25, "align": "mse", "usage_momentum": 0.5, "route_from": "mean",
    "path": "director", "activation": "gelu_tanh", "layout": "channels_last", "windows": 2, "backend": "reference",
}  # fmt: skip


def test_repr_says_every_argument_that_is_not_at_its_default():
    options = {n for n, p in inspect.signature(DEXLayer).parameters.items() if p.kind == p.KEYWORD_ONLY}
    assert options == set(OTHERS)
    assert repr(DEXLayer(4, 5, 6, 3)).startswith("DEXLayer(\n  4, 5, num_experts=6, top_k=3\n")
    layer = DEXLayer(4, 5, **OTHERS)
    head = repr(layer).split("\n")[1].strip()
    assert all(f"{name}={value!r}" in head for name, value in OTHERS.items())
    assert eval(f"DEXLayer({head})").extra_repr() == head
    layer.path = "experts"
    assert "path" not in layer.extra_repr()


@pytest.mark.parametrize("path", ["experts", "director"])
def test_what_the_path_does_not_use_takes_no_gradient_whoever_asks(path):
    model = nn.Sequential(layer_of(path=path), nn.Linear(2, 2))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    unused = "0.director." if path == "experts" else "0.experts."
    assert trained and not any(n.startswith(unused) for n in trained)
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    before = snapshot(model)
    model[0](images(), return_aux=path == "experts")[0].square().sum().backward()
    optimizer.step()
    assert not any(n.startswith(unused) for n in changed(model, before))
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", HALVES)
def test_training_in_half_precision_is_refused_at_once(dtype):
    layer, x = layer_of(dtype=torch.float32).to(dtype), images(dtype=dtype)
    with pytest.raises(ValueError, match=f"parameters: expected float32 or float64 for training, got {dtype}"):
        layer(x)
    with torch.autocast(x.device.type, torch.bfloat16), pytest.raises(ValueError, match="parameters: expected float32"):
        layer(x.float())
    with torch.no_grad():
        assert layer(x).dtype == dtype
    assert layer.eval()(x).dtype == dtype
    assert layer.train().requires_grad_(False)(x).dtype == dtype


@pytest.mark.parametrize(
    "of_x, of_layer, message",
    [
        (torch.float64, torch.float32, r"x: expected torch.float32, .* got torch.float64: x.to\(torch.float32\), or"),
        (torch.float32, torch.float64, r"x: expected torch.float64, .* got torch.float32: x.to\(torch.float64\), or"),
        (torch.bfloat16, torch.float32, "x: expected torch.float32, .* got torch.bfloat16: wrap .* in torch.autocast"),
        (torch.float16, torch.float64, "x: expected torch.float64, .* got torch.float16: wrap .* in torch.autocast"),
    ],
)
@pytest.mark.parametrize("path", ["experts", "director"])
def test_an_input_of_another_dtype_is_blamed(of_x, of_layer, message, path):
    with pytest.raises(ValueError, match=message):
        layer_of(dtype=of_layer, path=path)(images(dtype=of_x))


def test_float64_under_autocast_is_refused():
    layer, x = layer_of(dtype=torch.float32), images()
    with torch.autocast(x.device.type, torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="x: expected torch.float32, .* got torch.float64"):
            layer(x)
        with pytest.raises(ValueError, match="x: expected torch.float64, .* got torch.float32"):
            layer.double()(x.float())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("part", ["experts", "director", "router_weight"])
def test_a_part_of_another_dtype_is_blamed(part, dtype):
    layer, x = layer_of(dtype=torch.float32), images(dtype=torch.float32)
    if part == "router_weight":
        layer.router_weight = nn.Parameter(layer.router_weight.to(dtype))
        message = f"experts.fc1_weight: expected {dtype}, the dtype of router_weight, got torch.float32"
    else:
        getattr(layer, part).to(dtype)
        wanted = "experts.fc1_weight: expected torch.float32, the dtype of router_weight"
        message = wanted if part == "experts" else "director: expected torch.float32, the dtype of the experts"
        message += f", got {dtype}"
    with pytest.raises(ValueError, match=message):
        layer(x, return_aux=True)


def test_derivatives_of_torch_func_are_refused_by_name():
    """`jvp` took the operators for constants: a derivative of zero, and no error."""
    layer, x = layer_of().eval(), images()
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(p, image):
        return functional_call(layer, p, (image[None],)).square().sum()

    experts = [p.detach() for p in layer.experts.weights]
    routing = route(x, layer.router_weight, 2)
    for act in (
        lambda: jvp(layer, (x,), (x,)),
        lambda: jacrev(layer)(x),
        lambda: grad(loss)(parameters, x[0]),
        lambda: vmap(grad(loss), in_dims=(None, 0))(parameters, x),
        lambda: grad(lambda p: vmap(lambda image: loss(p, image))(x).sum())(parameters),
        lambda: jvp(lambda w: route(x, w, 2).gates, (layer.router_weight.detach(),), (layer.router_weight.detach(),)),
        lambda: jvp(lambda w: grouped_mlp(x, routing, w, *experts[1:]), (experts[0],), (experts[0],)),
        lambda: jvp(lambda y: align_loss(y, x), (x,), (x,)),
    ):
        with pytest.raises(ValueError, match="torch.func: expected torch.autograd .* once for each image"):
            act()


def test_per_sample_gradients_by_autograd_as_the_message_says():
    layer, x = layer_of().eval(), images()
    weights = [p for p in layer.parameters() if p.requires_grad]
    apart = [torch.autograd.grad(layer(image[None]).square().sum(), weights, materialize_grads=True) for image in x]
    whole = torch.autograd.grad(layer(x).square().sum(), weights)
    for parts, total in zip(zip(*apart, strict=True), whole, strict=True):
        torch.testing.assert_close(sum(parts), total)


def test_functional_call_and_vmap_work():
    layer, x = layer_of().eval(), images()
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    want = layer(x).detach()
    torch.testing.assert_close(functional_call(layer, parameters, (x,)), want)
    torch.testing.assert_close(vmap(lambda image: functional_call(layer, parameters, (image[None],))[0])(x), want)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_routes_other_images_anew():
    layer, x, other = layer_of().eval(), images(), images(B=7, seed=1)
    with pytest.raises(ValueError, match="torch.jit.trace: expected it under torch.no_grad"):
        torch.jit.trace(layer, x)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(layer, x)(other), layer(other))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:torch.quantize_per_tensor")
def test_dynamic_quantisation_leaves_the_experts_path_alone():
    model, x = nn.Sequential(layer_of(dtype=torch.float32).eval(), nn.Linear(2, 2)), images(dtype=torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with torch.no_grad():
        assert torch.equal(quantised[0](x), model[0](x))
        quantised[0].path = "director"
        model[0].path = "director"
        torch.testing.assert_close(quantised[0](x), model[0](x), rtol=0.1, atol=0.2)


def test_a_layer_is_copied_and_pickled_whatever_it_replaced():
    layer = layer_of()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        got, want = step(twin, images()), step(layer, images())
        assert all(torch.equal(got[name], want[name]) for name in want)
