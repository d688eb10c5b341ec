"""Inputs of verifications: no decision near a tie, an expert without images, the same numbers each time."""

import torch

from dexkernels.verification.inputs import Draw, cls_rows, routing_of, weights_of
from dexkernels.verification.record import Sizes

SIZES = Sizes(6, 5, 16, 32, 4, 2)
CPU = torch.device("cpu")


def test_the_same_numbers_each_time_and_others_in_each_call():
    draw, again = Draw(CPU), Draw(CPU)
    first = draw(3, 4)
    assert torch.equal(first, again(3, 4)) and not torch.equal(first, draw(3, 4)) and first.dtype == torch.float64


def test_decisions_are_far_apart():
    draw = Draw(CPU)
    router = draw(4, 16)
    logits = (cls_rows(draw, SIZES, router) @ router.T).sort(1).values
    assert torch.allclose(logits.diff(dim=1), torch.ones(6, 3, dtype=torch.float64))


def test_routing_is_one_that_route_could_return():
    routing = routing_of(Draw(CPU), SIZES)
    assert routing.group_sizes.sum() == 12 and routing.group_sizes[-1] == 0
    assert torch.equal(routing.slot_order.sort().values, torch.arange(12))
    assert torch.allclose(routing.gates.sum(1), torch.ones(6, dtype=torch.float64))
    assert routing_of(Draw(CPU), SIZES._replace(num_experts=2)).group_sizes.tolist() == [6, 6]


def test_weights_have_the_shapes_of_a_layer():
    assert [tuple(w.shape) for w in weights_of(Draw(CPU), SIZES)] == [(4, 32, 16), (4, 32), (4, 16, 32), (4, 16)]
