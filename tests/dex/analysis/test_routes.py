import pytest
import torch
from planted import DEPTH, E, Planted, inputs

from dex.analysis.routes import Override, masked_forward, sets_of, with_route
from dex.model.balance import probabilities
from dex.model.build import build_model
from dexkernels import DEXLayer
from dexkernels.testing import randomize_


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    return build_model(tiny)


@pytest.fixture
def batch(tiny):
    generator = torch.Generator().manual_seed(1)
    size = tiny.model.img_size
    patches = (size // tiny.model.patch_size) ** 2
    return torch.randn(7, 3, size, size, generator=generator), torch.rand(7, patches, generator=generator)


def test_the_same_losses_and_routes_as_the_models_own_whatever_the_batch(model, batch):
    images, noise = batch
    seen = masked_forward(model, images, noise, batch_size=3)
    assert model.training
    with torch.no_grad():
        want = model.eval()(images, mask_noise=noise)
    torch.testing.assert_close(seen.loss, want.image_loss)
    for layer in range(len(want.gates)):
        torch.testing.assert_close(seen.routes.gates[layer], want.gates[layer])
        assert torch.equal(seen.routes.experts[layer], want.expert_indices[layer])
        p = seen.routes.probabilities[layer]
        torch.testing.assert_close(p.sum(1), torch.ones(7))
        top = p.topk(want.gates[layer].shape[1], dim=1)
        assert torch.equal(top.indices.int(), want.expert_indices[layer])
        torch.testing.assert_close(top.values / top.values.sum(1, keepdim=True), want.gates[layer])


def test_an_images_own_route_given_to_it_changes_nothing_and_another_one_does(model, batch):
    images, noise = batch
    own = masked_forward(model, images, noise)
    routes = [Override(g, e) for g, e in zip(own.routes.gates, own.routes.experts, strict=True)]
    torch.testing.assert_close(masked_forward(model, images, noise, overrides=routes, batch_size=2).loss, own.loss)
    experts = model.encoder.dex_layers[0].num_experts
    other = [Override(r.gates, (r.experts + 1) % experts) for r in routes]
    for layer in range(len(routes)):
        one = [r if i == layer else None for i, r in enumerate(other)]
        assert not torch.allclose(masked_forward(model, images, noise, overrides=one).loss, own.loss, rtol=1e-6)
    with pytest.raises(ValueError, match="overrides: expected one per layer"):
        masked_forward(model, images, noise, overrides=other[:1])


@pytest.mark.parametrize("route_from", ["cls", "mean"])
def test_a_route_computes_what_its_experts_compute(route_from):
    layer = randomize_(DEXLayer(8, 12, 5, 2, route_from=route_from), 1).eval()
    x = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, aux = layer(x, return_aux=True)
        torch.testing.assert_close(with_route(layer, x, Override(aux.gates, aux.expert_indices)), y)
        assert torch.equal(probabilities(layer, x).argmax(1).int(), aux.expert_indices[:, 0])
        one = with_route(layer, x, Override(torch.ones(6, 1), torch.full((6, 1), 3)))
        w = [t[3] for t in layer.experts.weights]
        want = torch.nn.functional.gelu(x @ w[0].T + w[1]) @ w[2].T + w[3]
        torch.testing.assert_close(one, want)


def test_the_planted_network_goes_where_it_was_planted():
    images, modality, noise = inputs()
    routes = masked_forward(Planted(), images, noise).routes
    assert len(routes.experts) == DEPTH and all(torch.equal(e[:, 0].long(), modality) for e in routes.experts)
    assert routes.of(modality == 2).gates[0].shape == (6, 1) and routes.probabilities[0].shape == (24, E)


def test_sets_are_equal_in_whatever_order():
    sets = sets_of(torch.tensor([[2, 5], [5, 2], [1, 2], [2, 5]]))
    assert sets.tolist() == [1, 1, 0, 1]
