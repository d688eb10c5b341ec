"""The order of the slots."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dexkernels.routing import sort_slots


@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), max_size=20))
@settings(max_examples=100, deadline=None)
def test_slots_are_sorted_stably(rows):
    indices = torch.tensor(rows, dtype=torch.int32).view(-1, 3)
    order, sizes, offsets = sort_slots(indices, 7)
    flat = [e for row in rows for e in row]
    assert order.tolist() == sorted(range(len(flat)), key=lambda s: flat[s])
    assert sizes.tolist() == [flat.count(e) for e in range(7)]
    assert offsets.tolist() == [sum(e < bound for e in flat) for bound in range(8)]
    assert order.dtype == sizes.dtype == offsets.dtype == torch.int64
