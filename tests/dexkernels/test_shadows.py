"""Shadows under autocast: never stale, shared while weights are held, the director among them, gradients in float32."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn

from dexkernels import DEXLayer, align_loss, hold_weights, shadows
from dexkernels.layer import MLP
from dexkernels.testing import randomize_, relative_error

B, N, D, H, E, K = 3, 5, 16, 24, 4, 2
DEVICE = torch.get_default_device().type


def layer_of(**options):
    return randomize_(DEXLayer(D, H, E, K, **options)).eval()


def images(seed=0):
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed))


def autocast(dtype=torch.bfloat16):
    return torch.autocast(DEVICE, dtype)


def casts(monkeypatch):
    """The number of times that shadows were made since, as a list's length."""
    made, real = [], shadows._copies  # torch's own function is left alone: Dynamo keeps what it finds in its place
    monkeypatch.setattr(shadows, "_copies", lambda *a: made.append(1) or real(*a))
    return made


@torch.inference_mode()
def evaluate(layer, x, return_aux=False):
    with autocast():
        return layer(x, return_aux=return_aux)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_every_forward_of_an_evaluation_casts(mode, monkeypatch):
    layer, x = layer_of(), images()
    made = casts(monkeypatch)
    with mode(), autocast():
        first = layer(x)
        assert torch.equal(layer(x), first) and len(made) == 2


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_an_evaluation_sees_what_was_written_through_data(mode):
    """As every moving average of weights is written; it leaves no trace in a version."""
    layer, x = layer_of(), images()
    with mode(), autocast():
        before, aux = layer(x, return_aux=True)
    for p in layer.parameters():
        p.data.mul_(0.5).add_(0.1)
    with mode(), autocast():
        after, other = layer(x, return_aux=True)
        fresh, wanted = copy.deepcopy(layer)(x, return_aux=True)
    assert torch.equal(after, fresh) and torch.equal(other.align_loss, wanted.align_loss)
    assert not torch.equal(after, before) and not torch.equal(other.align_loss, aux.align_loss)


def test_made_in_inference_mode_they_serve_a_backward(monkeypatch):
    """Of the input alone, when weights are held."""
    layer, x = layer_of().requires_grad_(False), images()
    made = casts(monkeypatch)
    with hold_weights(layer):
        evaluate(layer, x)
        leaf = x.requires_grad_()
        with autocast():
            layer(leaf).sum().backward()
    assert leaf.grad.count_nonzero() and len(made) == 1


@pytest.mark.parametrize("training", [False, True])
def test_a_teacher_is_followed_however_it_is_written(training):
    """The moving average of a model in training, frozen, in either mode, without gradient, through ``.data``."""
    layer, x = layer_of().requires_grad_(False).train(training), images()
    for _ in range(3):
        with torch.no_grad(), autocast():
            y = layer(x)
            assert torch.equal(y, copy.deepcopy(layer)(x))
        for p in layer.parameters():
            p.data.mul_(0.9).add_(0.1)


def load(layer):
    layer.load_state_dict({n: 2 * t for n, t in layer.state_dict().items()})


def assign(layer):
    layer.load_state_dict({n: 2 * t for n, t in layer.state_dict().items()}, assign=True)


def step(layer, optimizer=torch.optim.AdamW, **options):
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer(layer.parameters(), lr=0.1, **options).step()


def update(layer):
    layer.update_director(torch.ones(E), 0.5)


def through_data(layer):
    for p in layer.parameters():
        p.data.mul_(2)


def train_through_data(layer):
    """An optimizer that leaves no trace in a version, after a forward and backward."""
    layer.train()
    with autocast():
        layer(images()).sum().backward()
    layer.eval()
    for p in layer.parameters():
        p.data.mul_(2)


def one_expert(layer):
    with torch.no_grad():
        layer.experts.fc2_bias[1] += 1


def fused(layer):
    """It bumps no version; the step before it was in float32, in the mode that it found."""
    layer(images()).sum().backward()
    step(layer, fused=True)


def between_backward_and_step(layer):
    """A forward without gradient, all of it in evaluation mode."""
    with autocast():
        layer(images()).sum().backward()
    evaluate(layer, images(), return_aux=True)
    torch.optim.AdamW(layer.experts.parameters(), lr=0.1, fused=True).step()


def director_alone(layer):
    layer.path = "director"
    layer(images()).sum().backward()
    torch.optim.AdamW(layer.director.parameters(), lr=0.1, fused=True).step()
    layer.path = "experts"


def director_by_itself(layer):
    """Trained by forwards of its own."""
    layer.director.requires_grad_(True)
    evaluate(layer, images(), return_aux=True)
    layer.director(images()).sum().backward()
    torch.optim.AdamW(layer.director.parameters(), lr=0.1, fused=True).step()


def swapped(layer):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double().float()
        load(layer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES = {
    "state dict": load,
    "assigned state dict": assign,
    "AdamW": step,
    "fused AdamW": fused,
    "SGD": lambda layer: step(layer, torch.optim.SGD, foreach=False),
    "update_director": update,
    "written through .data": through_data,
    "trained through .data": train_through_data,
    "one expert": one_expert,
    ".data replaced": lambda layer: setattr(layer.experts.fc1_weight, "data", layer.experts.fc1_weight * 2),
    "a forward between backward and fused AdamW": between_backward_and_step,
    "fine-tuned along the director": director_alone,
    "the director's own training": director_by_itself,
    "in inference mode": lambda layer: torch.inference_mode()(load)(layer),
    "tensors swapped": swapped,
    "loaded, and to float64 and back": lambda layer: (load(layer), layer.double().float()),
}


UNSEEN = (
    "written through .data",
    "trained through .data",
    "fused AdamW",
    "a forward between backward and fused AdamW",
    "fine-tuned along the director",
    "the director's own training",
)
"""Changes that leave no trace in a tensor, its storage or its version: they break the promise of `hold_weights`."""


@pytest.mark.parametrize(
    "change, held", [*((change, False) for change in CHANGES), *((c, True) for c in CHANGES if c not in UNSEEN)]
)
def test_a_change_of_the_masters_is_seen(change, held):
    """Output and losses after a change are those of a layer that never had shadows."""
    layer, x = layer_of(), images()
    with hold_weights(layer) if held else contextlib.nullcontext():
        before = evaluate(layer, x, return_aux=True)
        assert (layer.shadows._held is not None) == held
        CHANGES[change](layer)
        fresh = copy.deepcopy(layer)
        assert fresh.shadows is not layer.shadows
        y, aux = evaluate(layer, x, return_aux=True)
    want, wanted = evaluate(fresh, x, return_aux=True)
    assert torch.equal(y, want) and torch.equal(aux.align_loss, wanted.align_loss)
    assert not torch.equal(aux.align_loss, before[1].align_loss)


def test_training_casts_in_each_forward_and_holds_none_of_it(monkeypatch):
    layer, x = layer_of().train(), images()
    made = casts(monkeypatch)
    for steps in range(1, 3):
        with autocast():
            layer(x, return_aux=True)[0].sum().backward()
        assert len(made) == steps and layer.shadows._held is None


def test_held_weights_are_cast_once(monkeypatch):
    model = nn.Sequential(layer_of(), layer_of()).train()
    x = images()
    made = casts(monkeypatch)
    with autocast():
        model(x).sum().backward()
        apart = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert len(made) == 2
        model.zero_grad()
        with hold_weights(model):
            for _ in range(2):
                model(x).sum().backward()
            assert len(made) == 4
    together = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(2 * a, b) for a, b in zip(apart, together, strict=True))
    assert all(layer.shadows._held is None for layer in model)


def test_a_change_while_held_is_seen():
    layer, x = layer_of(), images()
    with hold_weights(layer):
        before = evaluate(layer, x)
        step(layer)
        after = evaluate(layer, x)
    assert not torch.equal(before, after) and torch.equal(after, evaluate(layer, x))


def test_two_forwards_before_their_backwards():
    """Shadows that a backward waits for are never written again."""
    layer, x = layer_of().train(), images().requires_grad_()
    with autocast():
        first, second = layer(x), layer(2 * x)
    (first.sum() + second.sum()).backward()
    assert x.grad.isfinite().all()


def test_no_storage_gets_the_address_of_one_that_was_seen():
    layer = layer_of()
    with hold_weights(layer):
        evaluate(layer, images())
        bias = layer.experts.fc2_bias
        address = bias.untyped_storage()._cdata
        bias.data = bias.detach() * 2
        others = [torch.empty(1).untyped_storage() for _ in range(1000)]
        assert address not in {s._cdata for s in others}


def test_another_stream_makes_its_own(monkeypatch):
    """It would read what the first stream has yet to write."""
    layer, x = layer_of(), images()
    made = casts(monkeypatch)
    with hold_weights(layer):
        for stream, count in ((1, 1), (1, 1), (2, 2), (2, 2), (1, 3)):
            monkeypatch.setattr(shadows, "stream_of", lambda device, stream=stream: stream)
            evaluate(layer, x)
            assert len(made) == count


def test_reentrant_checkpointing_holds_none():
    layer, x = layer_of().train(), images().requires_grad_()
    with autocast():
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
    assert layer.shadows._held is None
    y.sum().backward()
    assert layer.shadows._held is None and x.grad.count_nonzero()


def test_vmap_over_weights():
    layer, x = layer_of(), images()
    layers = [layer_of() for _ in range(2)]
    step(layers[1])
    held = torch.func.stack_module_state(layers)
    with torch.no_grad(), autocast():
        y = torch.vmap(lambda *held: torch.func.functional_call(layer, held, (x,)))(*held)
        assert all(torch.equal(mine, each(x)) for mine, each in zip(y, layers, strict=True))


@pytest.mark.parametrize("captured_first", [False, True])
def test_a_graph_makes_its_own(captured_first, monkeypatch):
    """Its copies are of memory that belongs to the graph: no forward outside of it shares them."""
    layer, x = layer_of(), images()
    made = casts(monkeypatch)
    with hold_weights(layer):
        if not captured_first:
            evaluate(layer, x)
        before = len(made)
        with monkeypatch.context() as m:
            m.setattr(shadows, "capturing", lambda device: True)
            for _ in range(2):
                evaluate(layer, x)
        assert len(made) == before + 2
        evaluate(layer, x)
        assert len(made) == 3, "what was made before the capture still serves"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_none(clone):
    layer, x = layer_of(), images()
    with hold_weights(layer):
        want = evaluate(layer, x)
        other = clone(layer)
        assert layer.shadows._held is not None and other.shadows._held is None
        assert torch.equal(evaluate(other, x), want) and other.shadows._held is None
    assert not any("shadow" in name for name in layer.state_dict())


@pytest.mark.parametrize("routing", ["image", "token"])
def test_the_director_computes_as_it_does_alone(routing, monkeypatch):
    layer, x = layer_of(routing=routing), images()
    seen, real = [], MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: seen.append(1) or real(self, x))
    y, aux = evaluate(layer, x, return_aux=True)
    assert not seen, "it has shadows beside the experts'"
    with autocast():
        alone = layer.director(x)
        assert torch.equal(aux.align_loss, align_loss(y, alone))
    layer(x, return_aux=True)
    assert len(seen) == 2, "without autocast it has none"


def test_a_director_with_hooks_or_of_another_kind_is_called():
    layer, x = layer_of(), images()
    y, aux = evaluate(layer, x, return_aux=True)
    seen = []
    handle = layer.director.register_forward_hook(lambda m, a, y: seen.append(y) or y + 1)
    y, other = evaluate(layer, x, return_aux=True)
    assert torch.equal(other.align_loss, align_loss(y, seen[0] + 1))
    handle.remove()
    assert torch.equal(evaluate(layer, x, return_aux=True)[1].align_loss, aux.align_loss) and len(seen) == 1
    layer.director = nn.Sequential(nn.Linear(D, D)).requires_grad_(False)
    y, other = evaluate(layer, x, return_aux=True)
    with autocast():
        assert torch.equal(other.align_loss, align_loss(y, layer.director(x)))


@pytest.mark.parametrize("half", [False, True])
def test_a_director_of_another_shape_is_refused_by_name(half):
    layer, x = layer_of(), images()
    layer.director.fc1.bias = nn.Parameter(torch.zeros(1), requires_grad=False)
    with (
        torch.autocast(DEVICE, torch.bfloat16, enabled=half),
        pytest.raises(ValueError, match=rf"director.fc1.bias: expected shape \[{H}\]"),
    ):
        layer(x, return_aux=True)


def test_gradients_are_in_float32_to_the_last_sum():
    """The gradient of a bias is a sum over all rows: rounded to bfloat16 it would have 8 bits."""
    layer, x = layer_of().train(), images()
    with autocast():
        layer(x).float().square().sum().backward()
    grad = layer.experts.fc2_bias.grad
    assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())
    exact = layer_of().double().train()
    exact(x.double()).square().sum().backward()
    assert relative_error(grad, exact.experts.fc2_bias.grad) < 1e-2


def test_two_dtypes_and_two_layers_do_not_mix():
    layer, x = layer_of(), images()
    with torch.no_grad(), autocast(torch.float16):
        half = layer(x)
    bf16 = evaluate(layer, x)
    with torch.no_grad(), autocast(torch.float16):
        assert torch.equal(layer(x), half) and half.dtype == torch.float16
    assert torch.equal(evaluate(layer, x), bf16) and bf16.dtype == torch.bfloat16


def test_compiled():
    torch._dynamo.reset()
    layer, x = layer_of(), images()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    before = evaluate(compiled, x)
    assert torch.equal(before, evaluate(layer, x))
    step(layer)
    after = evaluate(compiled, x)
    assert not torch.equal(after, before) and torch.equal(after, evaluate(layer, x))
    # Compiled forwards make their own, while weights are held too.
    with hold_weights(layer), autocast():
        compiled(x).sum().backward()
        assert layer.shadows._held is None
    torch._dynamo.reset()
