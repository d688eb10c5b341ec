"""What the plain-torch form of `grouped_mlp` saves for its backward."""

import torch

from dexkernels.ops.grouped_mlp import cpu
from dexkernels.ops.grouped_mlp.records import Slots
from dexkernels.records import MLPWeights
from dexkernels.routing import sort_slots


def test_saved_pre_activations_are_the_slots():
    g = torch.Generator().manual_seed(0)
    B, N, D, H, E = 4, 3, 5, 7, 6
    shapes = (B, N, D), (B, 2), (E, H, D), (E, H), (E, D, H), (E, D)
    x, gates, *weights = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    indices = torch.tensor([[0, 1], [2, 3], [5, 0], [1, 4]])
    slot_order, _, group_offsets = sort_slots(indices, E)
    weights = MLPWeights(*weights)
    z = cpu.forward(x, Slots(gates, slot_order, group_offsets), weights, save=True).z
    assert z.shape == (8, N, H)
    for place, slot in enumerate(slot_order.tolist()):
        e = indices.view(-1)[slot].item()
        torch.testing.assert_close(z[place], x[slot // 2] @ weights.fc1_weight[e].T + weights.fc1_bias[e])
    nothing = cpu.forward(x, Slots(gates, slot_order, group_offsets), weights, save=False).z
    assert nothing.shape == (0, N, H)
