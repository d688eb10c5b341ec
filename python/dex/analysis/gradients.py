"""Do modalities pull the weights in different directions?

Shape letters: B images, M modalities, G groups of parameters.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dex.model import MaskedAutoencoder


class Conflict(NamedTuple):
    """Cosines of the gradients of the masked loss, by group of parameters."""

    between: Tensor
    """float64 ``[G, M, M]``: of halves of two modalities' images; NaN for a modality without two images."""
    within: Tensor
    """float64 ``[G, M]``, the diagonal: of two halves of one modality's images. It is the reference: modalities whose
    cosine is that of two halves of one do not conflict."""
    groups: tuple[str, ...]


def groups_of(model: MaskedAutoencoder) -> dict[str, list[nn.Parameter]]:
    """The trained parameters by what they are and, in the encoder, by layer: ``"layer 0: attention"``, ``"layer 0:
    experts"`` (``"MLP"`` of a monolithic one), ``"layer 0: router"``, ``"embedding"``, ``"decoder"``."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        parts = name.split(".")
        if parts[:2] != ["encoder", "blocks"]:
            key = "embedding" if parts[0] == "encoder" else "decoder"
        elif "router_weight" in name:
            key = f"layer {parts[2]}: router"
        elif parts[3] in ("dex", "mlp"):
            key = f"layer {parts[2]}: {'experts' if parts[3] == 'dex' else 'MLP'}"
        else:
            key = f"layer {parts[2]}: attention"
        groups.setdefault(key, []).append(p)
    return groups


def conflict(
    model: MaskedAutoencoder,
    images: Tensor,
    modality: Tensor,
    mask_noise: Tensor,
    modalities: int,
    *,
    mask_ratio: float = 0.75,
    batch_size: int = 64,
    groups: Mapping[str, Sequence[nn.Parameter]] | None = None,
) -> Conflict:
    """Cosine similarity of the gradients of each modality's mean masked loss, in evaluation.

    A modality needs two images. Gradients of the model that were there are kept. Takes one forward and backward of the
    images. groups: of parameters; None: those of `groups_of`.
    """
    groups = groups_of(model) if groups is None else groups
    parameters = [p for group in groups.values() for p in group]
    halves: dict[tuple[int, int], Tensor] = {}
    training = model.training
    model.eval()
    try:
        for m in range(modalities):
            places = (modality.cpu() == m).nonzero().flatten()
            for half in range(2) if len(places) >= 2 else ():
                halves[m, half] = _gradient(
                    model, images, places[half::2], mask_noise, mask_ratio, batch_size, parameters
                )
    finally:
        model.train(training)
    sizes = [sum(p.numel() for p in group) for group in groups.values()]
    cut = {key: g.split(sizes) for key, g in halves.items()}
    between = torch.full((len(groups), modalities, modalities), torch.nan, dtype=torch.float64)
    for place in range(len(groups)):
        for m, n in ((m, n) for m in range(modalities) for n in range(modalities) if (m, 0) in cut and (n, 0) in cut):
            pairs = ((cut[m, 0][place], cut[n, 1][place]), (cut[m, 1][place], cut[n, 0][place]))
            between[place, m, n] = sum(_cosine(one, other) for one, other in pairs) / 2
    return Conflict(between, between.diagonal(dim1=1, dim2=2).clone(), tuple(groups))


def _cosine(one: Tensor, other: Tensor) -> float:
    norms = one.norm() * other.norm()
    return float(one @ other / norms) if norms > 0 else float("nan")


def _gradient(
    model: MaskedAutoencoder,
    images: Tensor,
    places: Tensor,
    mask_noise: Tensor,
    mask_ratio: float,
    batch_size: int,
    parameters: Sequence[nn.Parameter],
) -> Tensor:
    """Of the mean masked loss of the images at ``places``, float64, one vector."""
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    with torch.enable_grad():
        for part in places.to(images.device).split(batch_size):
            loss = model(images[part], mask_ratio=mask_ratio, mask_noise=mask_noise[part]).loss
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
            total += len(part) / len(places) * torch.cat([g.flatten() for g in grads]).double().cpu()
    return total
