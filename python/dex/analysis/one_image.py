"""Why these experts for one image: what its masked loss is with others, under several masks.

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
    """Per layer float ``[E, V]``: with an expert in the place of the first choice, in this layer alone."""


class UsualSet(NamedTuple):
    """What a modality's images most often take in one layer."""

    experts: Tensor
    """int64 ``[K]``, by descending gate."""
    gates: Tensor
    """float ``[K]``, the mean of the images that take it; sums to 1."""
    share: float
    """Of the modality's images that take it."""


def alternatives(
    model: MaskedAutoencoder, image: Tensor, mask_noise: Tensor, *, mask_ratio: float = 0.75, batch_size: int = 64
) -> Alternatives:
    """Losses of ``image [C, S, S]`` under the masks of ``mask_noise [V, P]``, with its own experts and, in each layer
    in turn, with each expert in the place, and with the gate, of its most probable one; an expert that was among the
    chosen trades places with it. Takes ``V (1 + L E)`` forwards of an image."""
    options = {"mask_ratio": mask_ratio, "batch_size": batch_size}
    count = len(mask_noise)
    own = masked_forward(model, image.expand(count, *image.shape), mask_noise, **options)
    swapped = []
    layers = model.encoder.dex_layers
    for place, layer in enumerate(layers):
        experts = layer.num_experts
        chosen = own.routes.experts[place].repeat(experts, 1)
        wanted = torch.arange(experts, device=chosen.device).repeat_interleave(count)
        route = Override(own.routes.gates[place].repeat(experts, 1), with_first(chosen, wanted))
        overrides = [route if i == place else None for i in range(len(layers))]
        images = image.expand(experts * count, *image.shape)
        loss = masked_forward(model, images, mask_noise.repeat(experts, 1), overrides=overrides, **options).loss
        swapped.append(loss.view(experts, count).cpu())
    return Alternatives(own.loss.cpu(), own.routes, swapped)


def with_first(chosen: Tensor, wanted: Tensor) -> Tensor:
    """``chosen [B, K]`` with ``wanted [B]`` in the first place; where it stood elsewhere, the first one goes there."""
    wanted = wanted.to(chosen.dtype)[:, None]
    out = torch.where(chosen == wanted, chosen[:, :1], chosen)
    out[:, :1] = wanted
    return out


def usual_sets(routes: Routes, modality: Tensor, modalities: int) -> list[list[UsualSet] | None]:
    """Per modality the `UsualSet` of each layer; None for one without images. modality: int64 ``[B]``."""
    found: list[list[UsualSet] | None] = []
    for m in range(modalities):
        places = (modality.cpu() == m).nonzero().flatten()
        if not len(places):
            found.append(None)
            continue
        found.append([_usual(g[places].cpu(), e[places].cpu().long()) for g, e in zip(*routes[:2], strict=True)])
    return found


def _usual(gates: Tensor, experts: Tensor) -> UsualSet:
    kinds = sets_of(experts)
    most = kinds.bincount().argmax()
    there = kinds == most
    by_expert = torch.zeros(int(experts.max()) + 1, dtype=torch.float64)
    by_expert.index_add_(0, experts[there].flatten(), gates[there].flatten().double())
    mean, order = (by_expert / there.sum()).sort(descending=True)
    count = experts.shape[1]
    return UsualSet(order[:count], mean[:count], float(there.double().mean()))


def loss_with_sets(
    model: MaskedAutoencoder,
    image: Tensor,
    mask_noise: Tensor,
    sets: list[UsualSet],
    *,
    mask_ratio: float = 0.75,
    batch_size: int = 64,
) -> Tensor:
    """Losses ``[V]`` of ``image [C, S, S]`` with these experts and gates, one set for each layer, in all layers."""
    count = len(mask_noise)
    device = mask_noise.device
    overrides = [Override(s.gates.to(device).expand(count, -1), s.experts.to(device).expand(count, -1)) for s in sets]
    images = image.expand(count, *image.shape)
    options = {"mask_ratio": mask_ratio, "batch_size": batch_size}
    return masked_forward(model, images, mask_noise, overrides=overrides, **options).loss.cpu()


def change(losses: Tensor, own: Tensor) -> Interval:
    """Mean of ``losses - own`` over the masks, ``[V]`` each, and its interval over them: of this image, no other."""
    difference = (losses - own).double()
    return bca(lambda weights: (weights @ difference) / weights.sum(1), len(difference))
