"""The swap test: is an image worse off with the experts of another one?

A heatmap of experts by modality is no evidence of specialisation: a random router on a random encoder shows one too. If
experts have specialised, an image's loss rises when it is given another modality's experts; if they are
interchangeable, it does not. Shape letters: B images, L layers, E experts, K chosen, G groups.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis.intervals import Interval, bca
from dex.analysis.routes import Masked, Override, Routes, masked_forward
from dex.model import MaskedAutoencoder

KINDS = ("same modality", "other modality", "random")


class Swap(NamedTuple):
    """Masked losses of B images by whose experts they were given."""

    own: Tensor
    """float ``[B]``: with the router's own choice."""
    given: Tensor
    """float ``[3, L + 1, B]``: with those of another image of the same modality, of an image of another modality, and
    of random experts (`KINDS`); in one layer alone, and last in all layers at once. NaN: there is no such image."""
    modality: Tensor
    """int64 ``[B]``."""


class Gap(NamedTuple):
    """How much worse off images are, mean over images: ``mean_b(given[b] - own[b])``."""

    kind: str
    layer: int | None
    """None: all layers at once."""
    gap: Interval
    own: float
    """Mean loss of the same images with their own experts: what the gap is to be compared with."""


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
    """The masked losses of ``images [B, C, S, S]`` under their own and under others' routes; masks are the same.

    Everything else of the forward is the image's own: with swapped experts in layer l, later layers route what they see
    then, unless they are swapped too. Takes ``1 + 3 (L + 1)`` forwards of the images. modality: int64 ``[B]``.
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
    """The same for whoever carries out the forwards: ``loss_under(overrides)`` gives the masked losses ``[B]``.

    kinds: those of `KINDS` that are wanted; the others' losses are NaN. layers_apart: False swaps all layers at once
    alone, with one forward for each kind.
    """
    generator = torch.Generator().manual_seed(seed)
    modality = modality.cpu()
    layers = len(own.routes.gates)
    given = torch.full((len(KINDS), layers + 1, len(modality)), float("nan"))
    for k, kind in enumerate(KINDS):
        routes, there = _others(kind, own.routes, modality, generator)
        if kind not in kinds or not there.any():
            continue
        for place in range(layers + 1) if layers_apart else (layers,):
            chosen = [r if place in (layer, layers) else None for layer, r in enumerate(routes)]
            given[k, place] = torch.where(there, loss_under(chosen).float().cpu(), torch.nan)
    return Swap(own.loss.float().cpu(), given, modality)


def gaps(swap: Swap, groups: Tensor, *, level: float = 0.95, seed: int = 0) -> list[Gap]:
    """A gap for each kind and layer, and for all layers at once, with its BCa interval over groups.

    groups: int64 ``[B]``: patients or sources; images of one are not independent of each other. No gap of a kind for
    which no image has a partner.
    """
    numbers = groups.unique(return_inverse=True)[1]
    count, layers = int(numbers.max()) + 1, swap.given.shape[1] - 1
    found = []
    for k, kind in enumerate(KINDS):
        for place in range(layers + 1):
            there = swap.given[k, place].isfinite()
            if not there.any():
                continue
            difference = (swap.given[k, place] - swap.own).double()[there]
            total = torch.zeros(count, dtype=torch.float64).index_add_(0, numbers[there], difference)
            shown = torch.bincount(numbers[there], minlength=count).double()
            held = shown > 0  # a group without such images would make resamples of nothing
            interval = bca(
                lambda w, t=total[held], s=shown[held]: (w @ t) / (w @ s), int(held.sum()), level=level, seed=seed
            )
            own = float(swap.own[there].double().mean())
            found.append(Gap(kind, None if place == layers else place, interval, own))
    return found


def modality_gap(swap: Swap, groups: Tensor, *, level: float = 0.95, seed: int = 0) -> Gap | None:
    """What the other modality costs beyond another image: ``mean_b(other[b] - same[b])`` in all layers at once, of the
    images that have both partners, with its interval over ``groups [B]``; kind ``"other less same modality"``.

    Above 0: experts are specialised by modality. The two gaps of `gaps` are of the same images, so that their intervals
    may overlap where this one, which is paired, holds no 0. None where no image has both partners.
    """
    same, other = swap.given[0, -1], swap.given[1, -1]
    there = same.isfinite() & other.isfinite()
    if not there.any():
        return None
    numbers = groups[there].unique(return_inverse=True)[1]
    count = int(numbers.max()) + 1
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, numbers, (other - same).double()[there])
    shown = torch.bincount(numbers, minlength=count).double()
    interval = bca(lambda w: (w @ total) / (w @ shown), count, level=level, seed=seed)
    return Gap("other less same modality", None, interval, float(swap.own[there].double().mean()))


def _others(kind: str, routes: Routes, modality: Tensor, generator: torch.Generator) -> tuple[list[Override], Tensor]:
    """A route per layer for each image, and for which images there is one ``[B]``."""
    if kind == "random":
        found = []
        for gates, p in zip(routes.gates, routes.probabilities, strict=True):
            drawn = torch.rand(p.shape, generator=generator).argsort(1)[:, : gates.shape[1]]
            found.append(Override(gates, drawn.to(gates.device)))
        return found, torch.ones(len(modality), dtype=torch.bool)
    partner = torch.arange(len(modality))
    there = torch.zeros(len(modality), dtype=torch.bool)
    for b in range(len(modality)):
        fits = (modality == modality[b]) if kind == "same modality" else (modality != modality[b])
        fits[b] = False
        choices = fits.nonzero().flatten()
        if len(choices):
            partner[b] = choices[int(torch.randint(len(choices), (1,), generator=generator))]
            there[b] = True
    other = routes.of(partner.to(routes.gates[0].device))
    return [Override(g, e) for g, e in zip(other.gates, other.experts, strict=True)], there
