"""`DEXLayer`: forward is pure, and the order of a step is kept, also where forwards are recomputed."""

import pytest
import torch
from layer_cases import changed, images, layer_of, objective, run, snapshot

BAD = float("nan")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [0.0, BAD, float("inf")])
@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("recompute", [False, True])
def test_forward_and_backward_change_no_state(training, bad, routing, recompute):
    layer, x = layer_of(routing=routing).train(training), images().requires_grad_()
    layer.usage_ema.fill_(0.2)
    before = snapshot(layer)
    with torch.no_grad():
        x[1, 0, 0] += bad
    for _ in range(3):
        y, aux = run(layer, x, recompute, noise_std=0.5)
        (y.sum() + aux.align_loss + aux.balance_loss).backward()
    assert y.isfinite().all() == (bad == 0)
    assert changed(layer, before) == []
    assert aux.gate_mass.isfinite().all() == (bad == 0)
    if bad != 0:
        layer.update_director(aux.gate_mass, 0.5)
        assert changed(layer, before) == []


def test_other_images_do_not_see_a_nan_image():
    layer, x = layer_of(), images()
    x[1] = BAD
    y = layer(x)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[[0, 2, 3, 4]], layer(x[[0, 2, 3, 4]]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("used", ["all", "align", "balance", "output"])
@pytest.mark.parametrize("noise_std", [0.0, 1.0])
def test_early_update_is_an_error(recompute, used, noise_std):
    """Never a wrong gradient: backward raises, or what it gives is what it would have given."""
    layer, x = layer_of(), images().requires_grad_()
    layer.usage_ema.copy_(torch.linspace(0, 0.5, 6))
    noise = torch.randn(5, 1, 6, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def gradients(early):
        layer.zero_grad()
        y, aux = run(layer, x, recompute, noise_std=noise_std, router_noise=noise)
        loss = {
            "all": objective(y, aux),
            "align": aux.align_loss,
            "balance": aux.balance_loss,
            "output": y.square().sum(),
        }
        if early:
            layer.update_director(aux.gate_mass, 0.1)
        loss[used].backward()
        return [layer.router_weight.grad.clone()]

    want = gradients(early=False)
    if used in ("all", "align"):
        with pytest.raises(RuntimeError, match="update_director after backward"):
            gradients(early=True)
    else:
        try:
            got = gradients(early=True)
        except RuntimeError:
            return
        assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_the_right_order_works_step_after_step(recompute):
    layer, twin, x = layer_of(), layer_of(), images()
    for _ in range(3):
        y, aux = run(layer, x.requires_grad_(), recompute)
        objective(y, aux).backward()
        layer.update_director(aux.gate_mass, 0.5)
        z, twin_aux = twin(x, return_aux=True)
        objective(z, twin_aux).backward()
        twin.update_director(twin_aux.gate_mass, 0.5)
    assert changed(layer, snapshot(twin)) == []
    assert "director.fc1.weight" in changed(layer, snapshot(layer_of()))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("noise_std", [0.0, 1.0])
def test_checkpointing_gives_the_same_bits(half, noise_std):
    results = []
    for recompute in (False, True):
        layer, x = layer_of(dtype=torch.float32), images(dtype=torch.float32).requires_grad_()
        torch.manual_seed(7)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            y, aux = run(layer, x, recompute, noise_std=noise_std)
        objective(y, aux).backward()
        results.append([y, *aux, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_several_forwards_before_one_backward():
    layer, x = layer_of(), images()
    (y1, a1), (y2, a2) = layer(x[:2], return_aux=True), layer(x[2:], return_aux=True)
    (objective(y1, a1) + objective(y2, a2)).backward()
    layer.update_director(a1.gate_mass + a2.gate_mass, 0.5)
    twin = layer_of()
    twin.update_director(twin(x, return_aux=True)[1].gate_mass, 0.5)
    torch.testing.assert_close(layer.director.fc1.weight, twin.director.fc1.weight, rtol=1e-13, atol=1e-14)
