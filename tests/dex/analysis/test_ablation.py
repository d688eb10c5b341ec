import torch
from planted import DEPTH, E, M, Planted, inputs

from dex.analysis.ablation import ablate, without
from dex.analysis.routes import masked_forward


def test_each_modality_misses_its_own_expert_and_no_other():
    images, modality, noise = inputs()
    found = ablate(Planted(), images, modality, noise, M, batch_size=5)
    assert len(found) == DEPTH
    for layer in found:  # one unit vector of two is wrong then
        torch.testing.assert_close(layer.rise, 2 * torch.eye(E, M, dtype=torch.float64))
        torch.testing.assert_close(layer.users, torch.eye(E, M, dtype=torch.float64))


def test_equal_experts_are_missed_by_nobody():
    images, modality, noise = inputs()
    for layer in ablate(Planted(alike=True), images, modality, noise, M):
        assert layer.rise.abs().max() < 1e-6 and layer.users.sum() == M


def test_a_modality_without_images_is_no_number():
    images, modality, noise = inputs()
    layer = ablate(Planted(), images, modality, noise, M + 1)[0]
    assert layer.rise[:, M].isnan().all() and layer.rise[:, :M].isfinite().all()


def test_the_next_most_probable_experts_take_over():
    images, _, noise = inputs()
    routes = masked_forward(Planted("noise"), images, noise).routes
    first = routes.probabilities[0].argmax(1)
    route = without(routes, 0, 2)
    second = routes.probabilities[0].topk(2, dim=1).indices[:, 1]
    assert torch.equal(route.experts[:, 0], torch.where(first == 2, second, first))
    assert torch.equal(route.gates, torch.ones(len(images), 1))
