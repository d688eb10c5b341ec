"""The swap test: does the loss of an image rise with the experts of another image?

A heatmap of experts by modality is not evidence of specialisation, since a random router on a random encoder also shows
one. If experts have specialised, the loss of an image rises with another modality's experts; if they are
interchangeable, it does not. Shape letters: B images, L layers, E experts, K chosen, G groups.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis.intervals import Interval, mean_over_groups
from dex.analysis.routes import Masked, Override, Routes, masked_forward
from dex.model import MaskedAutoencoder

KINDS = ("same modality", "other modality", "random")


class Swap(NamedTuple):
    """Masked losses of B images with their own and with other experts."""

    own: Tensor
    """float ``[B]``: with the router's choice."""
    given: Tensor
    """float ``[3, L + 1, B]``: with the experts of another image of the same modality, of an image of another modality,
    and with random experts (``KINDS``); in each layer, and last in all layers at once. NaN: there is no such image."""
    modality: Tensor
    """int64 ``[B]``."""


class Gap(NamedTuple):
    """Mean rise of the loss, ``mean_b(given[b] - own[b])``."""

    kind: str
    layer: int | None
    """None: all layers at once."""
    gap: Interval
    own: float
    """Mean loss of the same images with their own experts, for comparison."""


def swap(
    model: MaskedAutoencoder,
    images: Tensor,
    modality: Tensor,
    mask_noise: Tensor,
    *,
    mask_ratio: float = 0.75,
    seed: int = 0,
    batch_size: int = 64,
) -> Swap:
    """Masked losses of ``images [B, C, S, S]`` with their own and with other routes, under the same masks.

    Only the experts are swapped: after a swap in layer l, later layers route the inputs that they then get, unless they
    are swapped too. Takes ``1 + 3 (L + 1)`` forwards of the images. modality: int64 ``[B]``.
    """

    def forward(overrides: Sequence[Override | None] | None) -> Masked:
        return masked_forward(
            model, images, mask_noise, overrides=overrides, mask_ratio=mask_ratio, batch_size=batch_size
        )

    own = forward(None)
    return swapped(lambda overrides: forward(overrides).loss, own, modality, seed=seed)


def swapped(
    loss_under: Callable[[Sequence[Override | None]], Tensor],
    own: Masked,
    modality: Tensor,
    *,
    kinds: Sequence[str] = KINDS,
    layers_apart: bool = True,
    seed: int = 0,
) -> Swap:
    """``swap`` with a custom forward: ``loss_under(overrides)`` returns the masked losses ``[B]``.

    kinds: some of ``KINDS``; losses of the others are NaN. layers_apart: False swaps only all layers at once, with one
    forward per kind.
    """
    generator = torch.Generator().manual_seed(seed)
    modality = modality.cpu()
    layers = len(own.routes.gates)
    given = torch.full((len(KINDS), layers + 1, len(modality)), float("nan"))
    for k, kind in enumerate(KINDS):
        routes, has_partner = _others(kind, own.routes, modality, generator)
        if kind not in kinds or not has_partner.any():
            continue
        for place in range(layers + 1) if layers_apart else (layers,):
            overrides = [r if place in (layer, layers) else None for layer, r in enumerate(routes)]
            given[k, place] = torch.where(has_partner, loss_under(overrides).float().cpu(), torch.nan)
    return Swap(own.loss.float().cpu(), given, modality)


def gaps(swap: Swap, groups: Tensor) -> list[Gap]:
    """A gap for each kind and layer, and for all layers at once, with its BCa interval over groups.

    groups: int64 ``[B]``: patients or sources, within which images are not independent. A kind for which no image has a
    partner is left out.
    """
    layers = swap.given.shape[1] - 1
    result = []
    for k, kind in enumerate(KINDS):
        for place in range(layers + 1):
            layer = None if place == layers else place
            if gap := _gap(kind, layer, swap.given[k, place] - swap.own, swap, groups):
                result.append(gap)
    return result


def modality_gap(swap: Swap, groups: Tensor) -> Gap | None:
    """The cost of another modality beyond that of another image: ``mean_b(other[b] - same[b])`` in all layers at once,
    over the images that have both partners, with its interval over ``groups [B]``; kind ``"other less same modality"``.

    Above 0, experts are specialised by modality. This gap is paired, so its interval may exclude 0 even if the
    intervals of the two gaps of ``gaps`` overlap. None if no image has both partners.
    """
    same, other = swap.given[0, -1], swap.given[1, -1]
    return _gap("other less same modality", None, other - same, swap, groups)


def _gap(kind: str, layer: int | None, difference: Tensor, swap: Swap, groups: Tensor) -> Gap | None:
    """The gap of the images whose ``difference [B]`` is finite; None if there are none."""
    finite = difference.isfinite()
    if not finite.any():
        return None
    interval = mean_over_groups(difference[finite], groups[finite])
    return Gap(kind, layer, interval, float(swap.own[finite].double().mean()))


def _others(kind: str, routes: Routes, modality: Tensor, generator: torch.Generator) -> tuple[list[Override], Tensor]:
    """Another route per layer for each image, and whether there is one for the image ``[B]``."""
    if kind == "random":
        overrides = []
        for gates, p in zip(routes.gates, routes.probabilities, strict=True):
            drawn = torch.rand(p.shape, generator=generator).argsort(1)[:, : gates.shape[1]]
            overrides.append(Override(gates, drawn.to(gates.device)))
        return overrides, torch.ones(len(modality), dtype=torch.bool)
    partner = torch.arange(len(modality))
    has_partner = torch.zeros(len(modality), dtype=torch.bool)
    for b in range(len(modality)):
        candidates = (modality == modality[b]) if kind == "same modality" else (modality != modality[b])
        candidates[b] = False
        choices = candidates.nonzero().flatten()
        if len(choices):
            partner[b] = choices[int(torch.randint(len(choices), (1,), generator=generator))]
            has_partner[b] = True
    other = routes.of(partner.to(routes.gates[0].device))
    return [Override(g, e) for g, e in zip(other.gates, other.experts, strict=True)], has_partner
