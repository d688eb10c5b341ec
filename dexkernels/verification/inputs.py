"""Inputs of the operators, for verification and benchmarks.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
"""

import torch
from torch import Tensor

from ..records import MLPWeights
from ..routing import Routing, sort_slots
from .record import Sizes

CPU = torch.device("cpu")


class Draw:
    """``draw(2, 3)`` returns a standard normal tensor ``[2, 3]``; each call continues the random sequence of ``seed``.

    device, dtype: of the tensors. generated_on: the device of the random generator. The CPU gives the same numbers for
    every ``device``; a GPU is faster for large tensors.
    """

    def __init__(
        self,
        device: torch.device,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float64,
        generated_on: torch.device = CPU,
    ):
        self.device: torch.device = device
        self._dtype = dtype
        self._generator = torch.Generator(generated_on).manual_seed(seed)

    def __call__(self, *sizes: int, scale: float = 1.0) -> Tensor:
        numbers = torch.randn(sizes, generator=self._generator, dtype=torch.float32, device=self._generator.device)
        return (scale * numbers.to(self.device, torch.promote_types(self._dtype, torch.float32))).to(self._dtype)


def cls_rows(draw: Draw, sizes: Sizes, router: Tensor, always: int | None = None) -> Tensor:
    """``[B, D]`` float64, the CLS tokens of images whose logits are permutations of evenly spaced values.

    So no decision is near a tie. With more experts than D the logits are only approximately evenly spaced.

    router: ``[E, D]``. always: an expert that is chosen for every image.
    """
    order = draw(sizes.images, sizes.num_experts).argsort(1).double()
    if always is not None:
        order[:, always] = sizes.num_experts
    logits = order * (4.0 / sizes.num_experts)
    return logits @ torch.linalg.pinv(router.double().cpu()).to(router.device).T


def routing_of(draw: Draw, sizes: Sizes, *, always: int | None = None, never: int | None = None) -> Routing:
    """Random gates and experts. always, never: an expert that is chosen for every image, or for none."""
    E, K = sizes.num_experts, sizes.top_k
    scores = draw(sizes.images, E)
    if always is not None:
        scores[:, always] = torch.inf
    if never is not None:
        scores[:, never] = -torch.inf
    gates = draw(sizes.images, K).softmax(1)
    indices = scores.topk(K).indices.int()
    return Routing(gates, indices, gates.sum(), gates.sum(0), *sort_slots(indices, E))


def weights_of(draw: Draw, sizes: Sizes) -> MLPWeights:
    """The weights of E stacked experts, at the scale of a trained layer."""
    E, D, H = sizes.num_experts, sizes.dim, sizes.hidden_dim
    return MLPWeights(
        draw(E, H, D, scale=D**-0.5), draw(E, H, scale=0.1), draw(E, D, H, scale=H**-0.5), draw(E, D, scale=0.1)
    )
