"""Inputs of verifications: no decision near a tie, an expert without images, the same numbers each time."""

import pytest
import torch

from dexkernels.verification.inputs import Draw, cls_rows, routing_of, weights_of
from dexkernels.verification.record import Sizes

SIZES = Sizes(6, 5, 16, 32, 4, 2)
CPU = torch.device("cpu")


def test_the_same_numbers_each_time_and_others_in_each_call():
    draw, again = Draw(CPU), Draw(CPU)
    first = draw(3, 4)
    assert torch.equal(first, again(3, 4)) and not torch.equal(first, draw(3, 4)) and first.dtype == torch.float64


def test_the_dtype_of_a_draw_rounds_the_same_numbers():
    exact, rounded = (
        Draw(CPU, 3)(4, 5, scale=0.3),
        Draw(CPU, 3, dtype=torch.bfloat16, generated_on=CPU)(4, 5, scale=0.3),
    )
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, exact.to(torch.bfloat16))
    assert not torch.equal(exact, Draw(CPU, 4)(4, 5, scale=0.3))


@pytest.mark.parametrize("always", [None, 0])
def test_decisions_are_far_apart(always):
    draw = Draw(CPU)
    router = draw(4, 16)
    logits = cls_rows(draw, SIZES, router, always) @ router.T
    assert (logits.sort(1).values.diff(dim=1) > 0.999).all()
    assert always is None or (logits.argmax(1) == always).all()


def test_routing_is_one_that_route_could_return():
    routing = routing_of(Draw(CPU), SIZES, never=3)
    assert routing.group_sizes.sum() == 12 and routing.group_sizes[-1] == 0
    assert torch.equal(routing.slot_order.sort().values, torch.arange(12))
    assert torch.allclose(routing.gates.sum(1), torch.ones(6, dtype=torch.float64))
    assert routing_of(Draw(CPU), SIZES._replace(num_experts=2)).group_sizes.tolist() == [6, 6]
    assert routing_of(Draw(CPU), SIZES, always=0).group_sizes[0] == 6


def test_weights_have_the_shapes_of_a_layer():
    assert [tuple(w.shape) for w in weights_of(Draw(CPU), SIZES)] == [(4, 32, 16), (4, 32), (4, 16, 32), (4, 16)]
