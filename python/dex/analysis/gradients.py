"""Do modalities pull the weights in different directions?

Shape letters: B images, M modalities, G groups of parameters.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dex.model import MaskedAutoencoder

MEMORY = 8 * 2**30
"""Bytes on the host that the gradients of all halves may take at once; large models take several passes."""


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
    images for as many parameters as fit within `MEMORY`. groups: of parameters; None: those of `groups_of`.
    """
    groups = groups_of(model) if groups is None else groups
    between = torch.full((len(groups), modalities, modalities), torch.nan, dtype=torch.float64)
    halves = {
        (m, half): places[half::2]
        for m in range(modalities)
        for places in [(modality.cpu() == m).nonzero().flatten()]
        if len(places) >= 2
        for half in range(2)
    }
    training = model.training
    model.eval()
    begin = 0
    try:
        for part in _passes([sum(p.numel() for p in group) for group in groups.values()], len(halves)):
            held = list(groups.values())[begin : begin + part]
            gradients = {
                key: _gradient(model, images, places, mask_noise, mask_ratio, batch_size, held)
                for key, places in halves.items()
            }
            there = sorted({m for m, _ in halves})
            for place, m, n in itertools.product(range(part), there, there):
                pairs = [(gradients[m, half][place], gradients[n, 1 - half][place]) for half in range(2)]
                between[begin + place, m, n] = sum(_cosine(one, other) for one, other in pairs) / 2
            begin += part
    finally:
        model.train(training)
    return Conflict(between, between.diagonal(dim1=1, dim2=2).clone(), tuple(groups))


def _passes(sizes: Sequence[int], halves: int) -> list[int]:
    """How many groups of parameters each pass over the images takes, so that the gradients of all halves fit within
    `MEMORY`; at least one."""
    passes, room = [], 0
    for size in sizes:
        if passes and size <= room:
            passes[-1] += 1
        else:
            passes.append(1)
            room = MEMORY // max(4 * halves, 1)
        room -= size
    return passes


def _cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    norms = one.norm() * other.norm()
    return float(one @ other / norms) if norms > 0 else float("nan")


def _gradient(
    model: MaskedAutoencoder,
    images: Tensor,
    places: Tensor,
    mask_noise: Tensor,
    mask_ratio: float,
    batch_size: int,
    groups: Sequence[Sequence[nn.Parameter]],
) -> list[Tensor]:
    """Of the mean masked loss of the images at ``places``: a float32 vector on the host for each group."""
    parameters = [p for group in groups for p in group]
    sizes = [sum(p.numel() for p in group) for group in groups]
    total = torch.zeros(sum(sizes), dtype=torch.float64)
    with torch.enable_grad():
        for part in places.to(images.device).split(batch_size):
            loss = model(images[part], mask_ratio=mask_ratio, mask_noise=mask_noise[part]).loss
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
            total += len(part) / len(places) * torch.cat([g.flatten() for g in grads]).double().cpu()
    return list(total.float().split(sizes))
