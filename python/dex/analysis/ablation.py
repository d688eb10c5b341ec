"""What is lost without an expert, by modality.

Shape letters: B images, E experts, K chosen, L layers, M modalities.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis.routes import Override, Routes, masked_forward
from dex.model import MaskedAutoencoder


class Ablation(NamedTuple):
    """Of each expert of one layer; float64 ``[E, M]`` each, NaN for a modality without images."""

    rise: Tensor
    """Mean rise of the masked loss over the modality's images when the expert is taken away; images that did not use it
    count 0."""
    users: Tensor
    """Share of the modality's images that used it."""


@torch.no_grad()
def ablate(
    model: MaskedAutoencoder,
    images: Tensor,
    modality: Tensor,
    mask_noise: Tensor,
    modalities: int,
    *,
    mask_ratio: float = 0.75,
    batch_size: int = 64,
) -> list[Ablation]:
    """Take the experts away one by one: an image that used one takes its next most probable one, with new gates.

    Per layer, with the other layers' routers left to themselves. Takes K forwards of the images a layer. The reference
    beside a rise is the spread over experts: one that matters no more than the others says nothing.
    """
    options = {"mask_ratio": mask_ratio, "batch_size": batch_size}
    own = masked_forward(model, images, mask_noise, **options)
    member = (modality.cpu()[:, None] == torch.arange(modalities)).double()
    counts = member.sum(0)
    found = []
    for place, layer in enumerate(model.encoder.dex_layers):
        rise = torch.zeros(layer.num_experts, len(images), dtype=torch.float64)
        used = torch.zeros(layer.num_experts, len(images), dtype=torch.float64)
        for expert in range(layer.num_experts):
            users = (own.routes.experts[place] == expert).any(1).nonzero().flatten()
            if not len(users) or layer.num_experts <= layer.top_k:
                continue
            route = without(own.routes.of(users), place, expert)
            overrides = [route if i == place else None for i in range(len(model.encoder.dex_layers))]
            left = masked_forward(model, images[users], mask_noise[users], overrides=overrides, **options)
            rise[expert, users.cpu()] = (left.loss - own.loss[users]).double().cpu()
            used[expert, users.cpu()] = 1.0
        of_none = torch.where(counts > 0, 1.0, torch.nan)
        found.append(Ablation(*((t @ member) / counts.clamp(min=1) * of_none for t in (rise, used))))
    return found


def without(routes: Routes, layer: int, expert: int) -> Override:
    """The route that a layer's images take when ``expert`` is gone: the K most probable of the others."""
    p = routes.probabilities[layer].clone()
    p[:, expert] = -1.0
    chosen = p.topk(routes.gates[layer].shape[1], dim=1)
    return Override(chosen.values / chosen.values.sum(1, keepdim=True), chosen.indices)
