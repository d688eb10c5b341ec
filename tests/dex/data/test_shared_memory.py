"""Memory that several processes share."""

import torch

from dex.data.shared_memory import Slots


def test_slots():
    slots = Slots(2, (3, 4))
    first, second = slots.take(), slots.take()
    assert sorted((first, second)) == [0, 1] and slots.take() is None
    slots.array(first)[:] = 7
    slots.array(second)[:] = 9
    lent = slots.lend(first)
    view = lent[1:]
    assert lent.shape == (3, 4) and lent.dtype == torch.uint8 and (lent == 7).all()
    del lent
    assert slots.take() is None and (view == 7).all()
    del view
    assert slots.take() == first and slots.take() is None
