import pytest
import torch
from planted import DEPTH, E, Planted, inputs

from dex.analysis.one_image import alternatives, change, loss_with_sets, usual_sets, with_first
from dex.analysis.routes import masked_forward


def test_the_planted_expert_is_the_best_and_every_other_costs():
    images, modality, _ = inputs(2)
    found = alternatives(Planted(), images[5], torch.zeros(3, 1), batch_size=5)
    own = int(modality[5])
    assert torch.equal(found.own, torch.zeros(3)) and len(found.swapped) == DEPTH
    for losses in found.swapped:
        assert losses.shape == (E, 3) and torch.equal(losses[own], found.own)
        others = [e for e in range(E) if e != own]
        assert torch.allclose(losses[others], torch.full((E - 1, 3), 2.0))  # one wrong unit vector of two: 1 + 1
    assert all((experts == own).all() for experts in found.routes.experts)


def test_alike_experts_cost_nothing():
    images = inputs(2)[0]
    found = alternatives(Planted(alike=True), images[0], torch.zeros(2, 1))
    assert all(torch.allclose(losses, found.own.expand(E, 2)) for losses in found.swapped)


def test_the_first_choice_is_replaced_or_trades_places():
    chosen = torch.tensor([[3, 1], [3, 1], [3, 1]], dtype=torch.int32)
    assert with_first(chosen, torch.tensor([3, 1, 0])).tolist() == [[3, 1], [1, 3], [0, 1]]


def test_what_a_modality_usually_takes_and_what_it_costs_another():
    images, modality, noise = inputs(3)
    model = Planted()
    routes = masked_forward(model, images, noise).routes
    sets = usual_sets(routes, modality, 5)
    assert sets[4] is None
    for m in range(E):
        assert [s.experts.tolist() for s in sets[m]] == [[m]] * DEPTH and sets[m][0].share == 1.0
        assert sets[m][0].gates.tolist() == [1.0]
    masks = torch.zeros(2, 1)
    assert torch.equal(loss_with_sets(model, images[0], masks, sets[0]), torch.zeros(2))
    # Both layers add a wrong unit vector: 4 + 4.
    assert torch.allclose(loss_with_sets(model, images[0], masks, sets[1]), torch.full((2,), 8.0))


def test_the_usual_set_is_the_most_frequent_one_with_the_mean_of_its_gates():
    gates = torch.tensor([[0.6, 0.4], [0.8, 0.2], [0.5, 0.5], [0.9, 0.1]])
    experts = torch.tensor([[2, 0], [0, 2], [1, 2], [3, 1]], dtype=torch.int32)
    (found,) = usual_sets((([gates]), [experts]), torch.tensor([0, 0, 0, 1]), 1)[0]
    assert found.experts.tolist() == [0, 2] and found.share == pytest.approx(2 / 3)
    assert found.gates.tolist() == pytest.approx([(0.4 + 0.8) / 2, (0.6 + 0.2) / 2])


def test_the_change_is_paired_by_mask():
    own = torch.tensor([1.0, 5.0, 9.0])
    assert change(own + 0.5, own) == pytest.approx((0.5, 0.5, 0.5))
    found = change(own + torch.tensor([0.0, 1.0, 2.0]), own)
    assert found.value == pytest.approx(1.0) and found.low < 1 < found.high
