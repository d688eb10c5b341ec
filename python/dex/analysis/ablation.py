"""The loss without an expert, by modality.

Shape letters: B images, E experts, K chosen, L layers, M modalities.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis.routes import Override, Routes, masked_forward
from dex.analysis.usage import one_hot
from dex.model import MaskedAutoencoder


class Ablation(NamedTuple):
    """Ablations of each expert in one layer; float64 ``[E, M]`` each, NaN for a modality without images."""

    rise: Tensor
    """Mean rise of the masked loss over the modality's images when the expert is removed; images that did not use it
    count as 0."""
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
    """Remove experts one by one: an image that used the expert takes its next most probable one, with new gates.

    One layer at a time; later layers route as usual. Takes K forwards of the images per layer. The reference of a rise
    is the spread over experts: the rise of one expert is meaningful only if it differs from the others'.
    """
    options = {"mask_ratio": mask_ratio, "batch_size": batch_size}
    own = masked_forward(model, images, mask_noise, **options)
    by_modality = one_hot(modality.cpu(), modalities)
    counts = by_modality.sum(0)
    ablations = []
    for number, layer in enumerate(model.encoder.dex_layers):
        rise = torch.zeros(layer.num_experts, len(images), dtype=torch.float64)
        used = torch.zeros(layer.num_experts, len(images), dtype=torch.float64)
        for expert in range(layer.num_experts):
            users = (own.routes.experts[number] == expert).any(1).nonzero().flatten()
            if not len(users) or layer.num_experts <= layer.top_k:
                continue
            route = without(own.routes.of(users), number, expert)
            overrides = [route if i == number else None for i in range(len(model.encoder.dex_layers))]
            ablated = masked_forward(model, images[users], mask_noise[users], overrides=overrides, **options)
            rise[expert, users.cpu()] = (ablated.loss - own.loss[users]).double().cpu()
            used[expert, users.cpu()] = 1.0
        nan_if_empty = torch.where(counts > 0, 1.0, torch.nan)
        ablations.append(Ablation(*((t @ by_modality) / counts.clamp(min=1) * nan_if_empty for t in (rise, used))))
    return ablations


def without(routes: Routes, layer: int, expert: int) -> Override:
    """The route of a layer's images without ``expert``: the K most probable of the other experts."""
    p = routes.probabilities[layer].clone()
    p[:, expert] = -1.0
    chosen = p.topk(routes.gates[layer].shape[1], dim=1)
    return Override(chosen.values / chosen.values.sum(1, keepdim=True), chosen.indices)
