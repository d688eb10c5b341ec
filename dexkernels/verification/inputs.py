"""Inputs of the operators: the same numbers on every device.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
"""

import torch
from torch import Tensor

from ..records import MLPWeights
from ..routing import Routing, sort_slots
from .record import Sizes


class Draw:
    """``draw(2, 3)``: standard normal float64 on ``device``, drawn on the host, each call the next ones of a seed."""

    def __init__(self, device: torch.device, seed: int = 0):
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *sizes: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(sizes, generator=self._generator, dtype=torch.float32, device="cpu")
        return scale * drawn.to(self.device).double()


def cls_rows(draw: Draw, sizes: Sizes, router: Tensor) -> Tensor:
    """``[B, D]`` whose logits are permutations of evenly spaced ones, so that no decision is near a tie.

    With more experts than D they are only near that.
    """
    order = draw(sizes.images, sizes.num_experts).argsort(1).double()
    logits = order * (4.0 / sizes.num_experts)
    return logits @ torch.linalg.pinv(router.cpu()).to(router.device).T


def routing_of(draw: Draw, sizes: Sizes) -> Routing:
    """Random gates and experts; with more than two experts the last one is never chosen."""
    B, E, K = sizes.images, sizes.num_experts, sizes.top_k
    scores = draw(B, E)
    if E > max(K, 2):
        scores[:, -1] = -torch.inf
    gates = draw(B, K).softmax(1)
    indices = scores.topk(K).indices.int()
    return Routing(gates, indices, gates.sum(), gates.sum(0), *sort_slots(indices, E))


def weights_of(draw: Draw, sizes: Sizes) -> MLPWeights:
    """Of E stacked experts, at the scale of a trained layer."""
    E, D, H = sizes.num_experts, sizes.dim, sizes.hidden_dim
    return MLPWeights(
        draw(E, H, D, scale=D**-0.5), draw(E, H, scale=0.1), draw(E, D, H, scale=H**-0.5), draw(E, D, scale=0.1)
    )
