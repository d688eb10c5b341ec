"""The balance loss over a batch, against the layer's own where the batch is computed at once."""

import pytest
import torch

from dex.model.balance import batch_balance, mean_probabilities, probabilities
from dexkernels import DEXLayer

B, N, D, E, K = 6, 5, 16, 4, 2


@pytest.fixture(params=["cls", "mean"])
def layer(request):
    torch.manual_seed(0)
    made = DEXLayer(D, 8, E, K, route_from=request.param, temperature=0.7)
    made.usage_ema.copy_(torch.tensor([4.0, 0.0, 1.0, 2.0]))
    return made


def inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, N, D, generator=generator).requires_grad_()
    return x, torch.randn(B, 1, E, generator=generator)


@pytest.mark.parametrize("noise_std", [0.0, 0.8])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_probabilities_are_those_the_layer_chooses_by(layer, noise_std, precision):
    x, noise = inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
        _, aux = layer(x, noise_std=noise_std, router_noise=noise, return_aux=True)
        p = probabilities(layer, x, noise_std, noise)
    assert p.dtype == torch.float32 and p.sum(1).allclose(torch.ones(B))
    chosen = p.gather(1, aux.expert_indices.long())
    torch.testing.assert_close(chosen / chosen.sum(1, keepdim=True), aux.gates)
    assert torch.equal(p.argmax(1), aux.expert_indices[:, 0].long())
    layer.eval()
    assert torch.equal(probabilities(layer, x, 0.8, noise), probabilities(layer, x))  # no noise in evaluation


def gradients(loss, layer, x):
    return torch.autograd.grad(loss, (x, layer.router_weight))


def test_one_part_has_the_layers_own_loss_and_gradient(layer):
    x, noise = inputs()
    _, aux = layer(x, noise_std=0.5, router_noise=noise, return_aux=True)
    p = probabilities(layer, x, 0.5, noise)
    ours = batch_balance([p], mean_probabilities([[p]], B), depth=1)
    torch.testing.assert_close(ours, aux.balance_loss)
    for got, want in zip(gradients(ours, layer, x), gradients(aux.balance_loss, layer, x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_any_cut_of_a_batch_has_one_gradient(layer, cut):
    """Parts and ranks alike: their losses are averaged, and their mean probabilities are of all of them."""
    x, noise = inputs()
    p = probabilities(layer, x, 0.5, noise)
    want = batch_balance([p], mean_probabilities([[p]], B), depth=1)
    parts = [probabilities(layer, x[i : i + cut], 0.5, noise[i : i + cut]) for i in range(0, B, cut)]
    means = mean_probabilities([[part] for part in parts], B)
    total = torch.stack([batch_balance([part], means, depth=1) for part in parts]).mean()
    torch.testing.assert_close(total, want)
    for got, expected in zip(gradients(total, layer, x), gradients(want, layer, x), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_gradient_is_the_one_that_is_written_down():
    """``d loss / d p_be = E P_e / (L B)``, in float64."""
    generator = torch.Generator().manual_seed(2)
    layers = [torch.rand(B, e, generator=generator, dtype=torch.float64).softmax(1).requires_grad_() for e in (3, 5)]
    means = mean_probabilities([layers], B)
    batch_balance(layers, means, depth=2).backward()
    for p in layers:
        torch.testing.assert_close(p.grad, (p.shape[1] * p.detach().mean(0) / (2 * B)).expand_as(p))
