"""Everything that is measured of one model: what its experts and its features are, beside what chance gives.

Shape letters: B images, E experts, K chosen, L layers, M modalities, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis import ablation, gradients, information, maps, similarity, source_probe, spectra
from dex.analysis.intervals import Interval, bca
from dex.analysis.probe import director_distance
from dex.analysis.routes import Masked, masked_forward, sets_of
from dex.analysis.sample import Groups, Sample, groups, spread_out
from dex.analysis.swap import Gap, gaps, modality_gap, swap
from dex.analysis.usage import expert_by_modality
from dex.config import Config
from dex.data import center
from dex.data.dataset import Dataset
from dex.model import MaskedAutoencoder

_MASKS = 0x5EED


class Layer(NamedTuple):
    """How one layer routes the held-out images."""

    masked: information.Information
    """Of the expert set and the modality, when the encoder sees what it sees in training."""
    whole: information.Information
    """The same of whole images, which is what a user of the encoder gives."""
    sets_masked: int
    sets_whole: int
    """How many different sets of experts are in use."""
    entropy: float
    """Of all probabilities, over log E; see `dex.analysis.information.probability_entropy`."""
    first_agreement: float
    """Share of images whose first expert is the same masked and whole."""
    mass: Tensor
    """float64 ``[M, E]``: gate mass that each modality gives to each expert, masked images."""
    overlap: Tensor
    """float64 ``[M, M]``; see `dex.analysis.information.overlap`."""
    random_overlap: float
    chance: Tensor
    """float64 ``[M, E]``: `mass` once the images' modalities are permuted: what a heatmap of chance looks like."""


class Findings(NamedTuple):
    """What `examine` found of a model; a part that was not asked for is None."""

    step: int
    loss: Interval
    """Mean masked loss of the held-out images."""
    modality_loss: dict[str, float]
    layers: list[Layer] | None
    """Empty for the monolithic control, which routes nothing."""
    gaps: list[Gap] | None
    modality_gap: Gap | None
    """See `dex.analysis.swap.modality_gap`; None also where images have no partner of their own modality."""
    ablations: list[ablation.Ablation] | None
    conflict: gradients.Conflict | None
    similarity: list[Tensor] | None
    """Per layer ``[E + 1, E + 1]``: CKA of experts and, last, the director."""
    distance: list[float]
    """See `dex.analysis.probe.director_distance`."""
    cls: spectra.Spectrum | None
    patches: spectra.Spectrum | None
    """Of the mean of an image's patches."""
    probe: Interval | None
    """`dex.analysis.source_probe.leave_sources_out`, mean of patches and CLS token of whole images."""
    image_loss: Tensor
    """float64 ``[B]``: the masked loss of each held-out image, for paired comparisons; see `paired`."""


PARTS = ("heldout", "routing", "swap", "ablation", "gradients", "similarity", "features")
"""What can be asked for; the held-out loss comes with each."""


class Material(NamedTuple):
    """What models are examined with: the same for all that are compared."""

    held_out: Sample
    groups: Groups
    """Of the held-out images."""
    probed: Sample
    """Images of all splits for the linear probe, which leaves their sources out in turns."""
    probed_groups: Groups
    modalities: tuple[str, ...]


def material_of(dataset: Dataset, *, held_out: int = 256, probed: int = 512) -> Material:
    """Up to ``held_out`` images of the split "val", and up to ``probed`` of all of ``dataset``, their modalities in
    turns. ValueError: the split is empty, or none of its images can be read."""
    sample = spread_out(dataset.split("val"), held_out)
    if not len(sample.images):
        raise ValueError(f"data: expected held-out images; the split 'val' of {dataset.name} gives none")
    others = spread_out(dataset, probed)
    return Material(sample, groups(dataset, sample.ids), others, groups(dataset, others.ids), dataset.modalities)


def examine(
    model: MaskedAutoencoder,
    step: int,
    config: Config,
    material: Material,
    parts: Sequence[str] = PARTS,
    *,
    batch_size: int = 64,
    report: Callable[[str], None] = lambda part: None,
) -> Findings:
    """Measure ``model``, on whatever device it is, in float32; nothing of it is changed.

    parts: of `PARTS`. report: called with the name of each part when it begins. ValueError: no held-out image, or an
    unknown part.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"parts: expected some of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    held_out, names = material.held_out, material.modalities
    if not len(held_out.images):
        raise ValueError("data: expected held-out images, got none")
    device = next(model.parameters()).device
    images = _sized(held_out.images, config, device)
    patches = model.encoder.patches
    noise = torch.rand(len(images), patches, generator=torch.Generator().manual_seed(_MASKS)).to(device)
    options = {"mask_ratio": config.model.mask_ratio, "batch_size": batch_size}
    routed = bool(model.encoder.dex_layers)
    report("heldout")
    seen = masked_forward(model, images, noise, **options)
    loss = seen.loss.cpu().double()
    of_kind = {name: loss[held_out.modality == m] for m, name in enumerate(names)}
    found: dict = {name: None for name in Findings._fields} | {
        "step": step,
        "loss": _mean(loss, material.groups.of),
        "modality_loss": {name: float(values.mean()) for name, values in of_kind.items() if len(values)},
        "distance": director_distance(model),
        "image_loss": loss,
    }
    if "routing" in parts:
        report("routing")
        found["layers"] = _layers(model, images, noise, seen, material, batch_size)
    if "swap" in parts and routed:
        report("swap")
        swapped = swap(model, images, held_out.modality, noise, **options)
        found["gaps"] = gaps(swapped, material.groups.of)
        found["modality_gap"] = modality_gap(swapped, material.groups.of)
    if "ablation" in parts and routed:
        report("ablation")
        found["ablations"] = ablation.ablate(model, images, held_out.modality, noise, len(names), **options)
    if "gradients" in parts:
        report("gradients")
        found["conflict"] = gradients.conflict(model, images, held_out.modality, noise, len(names), **options)
    if "similarity" in parts and routed:
        report("similarity")
        found["similarity"] = similarity.expert_similarity(model, images, batch_size=batch_size)
    if "features" in parts:
        report("features")
        found |= _features(model, config, material, batch_size)
    return Findings(**found)


def features(tokens: maps.Tokens) -> Tensor:
    """Mean of patches and CLS token of each image, ``[B, 2 D]``: what the linear probe reads."""
    return torch.cat([tokens.patches.mean(1), tokens.cls], 1)


def pixel_probe(material: Material) -> Interval | None:
    """The reference of `Findings.probe`: the same probe of 16 x 16 grey pixels."""
    probed = material.probed
    return source_probe.leave_sources_out(
        source_probe.pixels(probed.images), probed.modality, material.probed_groups.of
    )


def paired(one: Findings, other: Findings, groups: Groups) -> Interval:
    """Mean loss of ``one`` less that of ``other`` on the same held-out images, and its interval over groups."""
    return _mean(one.image_loss - other.image_loss, groups.of)


def _layers(
    model: MaskedAutoencoder, images: Tensor, noise: Tensor, masked: Masked, material: Material, batch_size: int
) -> list[Layer]:
    modality, count = material.held_out.modality, len(material.modalities)
    whole = masked_forward(model, images, noise, mask_ratio=0.0, batch_size=batch_size).routes
    layers = []
    permuted = modality[torch.randperm(len(modality), generator=torch.Generator().manual_seed(_MASKS))]
    for place, layer in enumerate(model.encoder.dex_layers):
        gates, experts = masked.routes.gates[place].cpu(), masked.routes.experts[place].cpu()
        other = whole.experts[place].cpu()
        layers.append(
            Layer(
                masked=information.information(sets_of(experts), modality),
                whole=information.information(sets_of(other), modality),
                sets_masked=information.distinct_sets([experts])[0],
                sets_whole=information.distinct_sets([other])[0],
                entropy=information.probability_entropy(masked.routes.probabilities[place]),
                first_agreement=information.first_agreement(experts, other),
                mass=expert_by_modality(gates, experts, modality, layer.num_experts, count),
                overlap=information.overlap(experts, modality, count),
                random_overlap=information.random_overlap(layer.num_experts, layer.top_k),
                chance=expert_by_modality(gates, experts, permuted, layer.num_experts, count),
            )
        )
    return layers


def _features(model: MaskedAutoencoder, config: Config, material: Material, batch_size: int) -> dict:
    device = next(model.parameters()).device
    found: dict = {}
    held_out = maps.tokens(model.encoder, _sized(material.held_out.images, config, device), batch_size=batch_size)
    if len(held_out.cls) >= 2:
        found |= {"cls": spectra.spectrum(held_out.cls), "patches": spectra.spectrum(held_out.patches.mean(1))}
    probed = maps.tokens(model.encoder, _sized(material.probed.images, config, device), batch_size=batch_size)
    of = material.probed_groups.of
    return found | {"probe": source_probe.leave_sources_out(features(probed), material.probed.modality, of)}


def _sized(images: Tensor, config: Config, device: torch.device) -> Tensor:
    return center(images.to(device), config.model.img_size, config.model.in_chans)


def _mean(values: Tensor, groups: Tensor) -> Interval:
    """The mean of ``values [B]`` and its interval over groups."""
    numbers = groups.unique(return_inverse=True)[1]
    count = int(numbers.max()) + 1
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, numbers, values.double())
    shown = torch.bincount(numbers, minlength=count).double()
    return bca(lambda weights: (weights @ total) / (weights @ shown), count)
