"""The masked loss of one image with other experts, under several masks.

Shape letters: V masks, P patches, L layers, E experts, K chosen, B images, M modalities.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis.intervals import Interval, bca
from dex.analysis.routes import Override, Routes, masked_forward, sets_of
from dex.model import MaskedAutoencoder


class Alternatives(NamedTuple):
    """Masked losses of one image under V masks."""

    own: Tensor
    """float ``[V]``"""
    routes: Routes
    """Under each mask."""
    swapped: list[Tensor]
    """Per layer float ``[E, V]``: with each expert in place of the first choice, only in this layer."""


class UsualSet(NamedTuple):
    """The most frequent expert set of a modality's images in one layer."""

    experts: Tensor
    """int64 ``[K]``, by descending gate."""
    gates: Tensor
    """float ``[K]``, mean over the images that use the set; sums to 1."""
    share: float
    """Share of the modality's images that use the set."""


def alternatives(
    model: MaskedAutoencoder, image: Tensor, mask_noise: Tensor, *, mask_ratio: float = 0.75, batch_size: int = 64
) -> Alternatives:
    """Losses of ``image [C, S, S]`` under the masks of ``mask_noise [V, P]``, with its own experts, and with each
    expert in place of the most probable one in one layer, with the same gate.

    If that expert was also chosen, the two trade places. Takes ``V (1 + L E)`` forwards of an image.
    """
    options = {"mask_ratio": mask_ratio, "batch_size": batch_size}
    count = len(mask_noise)
    own = masked_forward(model, image.expand(count, *image.shape), mask_noise, **options)
    swapped = []
    layers = model.encoder.dex_layers
    for number, layer in enumerate(layers):
        experts = layer.num_experts
        chosen = own.routes.experts[number].repeat(experts, 1)
        first = torch.arange(experts, device=chosen.device).repeat_interleave(count)
        route = Override(own.routes.gates[number].repeat(experts, 1), with_first(chosen, first))
        overrides = [route if i == number else None for i in range(len(layers))]
        images = image.expand(experts * count, *image.shape)
        loss = masked_forward(model, images, mask_noise.repeat(experts, 1), overrides=overrides, **options).loss
        swapped.append(loss.view(experts, count).cpu())
    return Alternatives(own.loss.cpu(), own.routes, swapped)


def with_first(chosen: Tensor, first: Tensor) -> Tensor:
    """``chosen [B, K]`` with ``first [B]`` as the first expert; if it was already chosen, the two trade places."""
    first = first.to(chosen.dtype)[:, None]
    out = torch.where(chosen == first, chosen[:, :1], chosen)
    out[:, :1] = first
    return out


def usual_sets(routes: Routes, modality: Tensor, modalities: int) -> list[list[UsualSet] | None]:
    """Per modality the ``UsualSet`` of each layer, None for a modality without images. modality: int64 ``[B]``."""
    usual: list[list[UsualSet] | None] = []
    for m in range(modalities):
        images = (modality.cpu() == m).nonzero().flatten()
        if not len(images):
            usual.append(None)
            continue
        usual.append([_usual(g[images].cpu(), e[images].cpu().long()) for g, e in zip(*routes[:2], strict=True)])
    return usual


def _usual(gates: Tensor, experts: Tensor) -> UsualSet:
    sets = sets_of(experts)
    in_set = sets == sets.bincount().argmax()
    by_expert = torch.zeros(int(experts.max()) + 1, dtype=torch.float64)
    by_expert.index_add_(0, experts[in_set].flatten(), gates[in_set].flatten().double())
    mean, order = (by_expert / in_set.sum()).sort(descending=True)
    count = experts.shape[1]
    return UsualSet(order[:count], mean[:count], float(in_set.double().mean()))


def loss_with_sets(
    model: MaskedAutoencoder,
    image: Tensor,
    mask_noise: Tensor,
    sets: list[UsualSet],
    *,
    mask_ratio: float = 0.75,
    batch_size: int = 64,
) -> Tensor:
    """Losses ``[V]`` of ``image [C, S, S]`` with given experts and gates in all layers; one set per layer."""
    count = len(mask_noise)
    device = mask_noise.device
    overrides = [Override(s.gates.to(device).expand(count, -1), s.experts.to(device).expand(count, -1)) for s in sets]
    images = image.expand(count, *image.shape)
    options = {"mask_ratio": mask_ratio, "batch_size": batch_size}
    return masked_forward(model, images, mask_noise, overrides=overrides, **options).loss.cpu()


def change(losses: Tensor, own: Tensor) -> Interval:
    """Mean of ``losses - own``, ``[V]`` each, with its interval over the masks of this image."""
    difference = (losses - own).double()
    return bca(lambda weights: (weights @ difference) / weights.sum(1), len(difference))
