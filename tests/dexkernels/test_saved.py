"""Bytes that a forward keeps for backward; counted, not measured: they are the same on every device.

Of two batch sizes the difference is taken, so what is kept whatever the batch (weights, their casts) is left out.
"""

import pytest
import torch

from dexkernels import DEXLayer
from dexkernels.testing import ExpertLoop, randomize_

N, D, H, E, K = 65, 64, 256, 8, 2  # H = 4 D as in a ViT: the share of z is that of the real sizes


def kept(forward, batch: int) -> int:
    storages: dict[int, tuple[torch.UntypedStorage, int]] = {}  # held, or an address could come twice

    def pack(t):
        storage = t.untyped_storage()
        storages[storage._cdata] = (storage, storage.nbytes())
        return t

    x = torch.randn(batch, N, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward(x)
    del result
    return sum(size for _, size in storages.values())


def kept_by_an_image(forward) -> float:
    return (kept(forward, 16) - kept(forward, 8)) / 8


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_a_layer_keeps_at_most_half_of_what_the_expert_loop_keeps(half):
    layer, loop = randomize_(DEXLayer(D, H, E, K)), ExpertLoop(D, H, E, K)
    loop.load_state_dict(layer.reference_state_dict())
    device = torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16, enabled=half):
        mine = kept_by_an_image(lambda x: layer(x, return_aux=True))
        theirs = kept_by_an_image(loop)
    size = 2 if half else 4
    assert K * N * H * size <= mine, "z is kept"
    assert mine <= 0.5 * theirs


def test_without_gradients_nothing_is_kept():
    layer = randomize_(DEXLayer(D, H, E, K))
    with torch.no_grad():
        assert kept(layer, 8) == 0
    layer.requires_grad_(False)
    assert kept(lambda x: layer(x.detach()), 8) == 0
