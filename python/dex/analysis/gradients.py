"""Do the gradients of modalities conflict?

Shape letters: B images, M modalities, G groups of parameters.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dex.analysis.routes import evaluating
from dex.model import MaskedAutoencoder

MEMORY = 8 * 2**30
"""Largest number of bytes on the host for the gradients of all halves; large models need several passes."""


class Conflict(NamedTuple):
    """Cosines of the gradients of the masked loss, by group of parameters."""

    between: Tensor
    """float64 ``[G, M, M]``: between halves of two modalities' images; NaN for a modality with fewer than two
    images."""
    within: Tensor
    """float64 ``[G, M]``, the diagonal: between two halves of one modality's images. It is the reference: modalities
    with the same cosine do not conflict."""
    groups: tuple[str, ...]


def groups_of(model: MaskedAutoencoder) -> dict[str, list[nn.Parameter]]:
    """The trained parameters by kind and, in the encoder, by layer: ``"layer 0: attention"``, ``"layer 0: experts"``
    (``"MLP"`` if monolithic), ``"layer 0: router"``, ``"embedding"``, ``"decoder"``."""
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
    """Cosine similarity of the gradients of each modality's mean masked loss, in evaluation mode.

    A modality needs two images. Existing gradients of the model are kept. Takes one forward and backward of the images
    per pass; a pass covers as many parameters as fit in ``MEMORY``. groups: of parameters; None: ``groups_of``.
    """
    groups = groups_of(model) if groups is None else groups
    between = torch.full((len(groups), modalities, modalities), torch.nan, dtype=torch.float64)
    halves = {
        (m, half): indices[half::2]
        for m in range(modalities)
        for indices in [(modality.cpu() == m).nonzero().flatten()]
        if len(indices) >= 2
        for half in range(2)
    }
    first = 0
    with evaluating(model):
        for count in _passes([sum(p.numel() for p in group) for group in groups.values()], len(halves)):
            groups_of_pass = list(groups.values())[first : first + count]
            gradients = {
                key: _gradient(model, images, indices, mask_noise, mask_ratio, batch_size, groups_of_pass)
                for key, indices in halves.items()
            }
            present = sorted({m for m, _ in halves})
            for group, m, n in itertools.product(range(count), present, present):
                pairs = [(gradients[m, half][group], gradients[n, 1 - half][group]) for half in range(2)]
                between[first + group, m, n] = sum(_cosine(one, other) for one, other in pairs) / 2
            first += count
    return Conflict(between, between.diagonal(dim1=1, dim2=2).clone(), tuple(groups))


def _passes(sizes: Sequence[int], halves: int) -> list[int]:
    """Number of parameter groups, at least one, in each pass over the images, so that the gradients of all halves fit
    in ``MEMORY``."""
    passes, free = [], 0
    for size in sizes:
        if passes and size <= free:
            passes[-1] += 1
        else:
            passes.append(1)
            free = MEMORY // max(4 * halves, 1)
        free -= size
    return passes


def _cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    norms = one.norm() * other.norm()
    return float(one @ other / norms) if norms > 0 else float("nan")


def _gradient(
    model: MaskedAutoencoder,
    images: Tensor,
    indices: Tensor,
    mask_noise: Tensor,
    mask_ratio: float,
    batch_size: int,
    groups: Sequence[Sequence[nn.Parameter]],
) -> list[Tensor]:
    """Gradient of the mean masked loss of the images ``indices``: a float32 vector on the host for each group."""
    parameters = [p for group in groups for p in group]
    sizes = [sum(p.numel() for p in group) for group in groups]
    total = torch.zeros(sum(sizes), dtype=torch.float64)
    with torch.enable_grad():
        for part in indices.to(images.device).split(batch_size):
            loss = model(images[part], mask_ratio=mask_ratio, mask_noise=mask_noise[part]).loss
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
            total += len(part) / len(indices) * torch.cat([g.flatten() for g in grads]).double().cpu()
    return list(total.float().split(sizes))
