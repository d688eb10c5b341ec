"""All measures of one model: its experts and its features, with references such as chance.

Shape letters: B images, E experts, K chosen, L layers, M modalities, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis import ablation, gradients, information, maps, similarity, source_probe, spectra
from dex.analysis.intervals import Interval, mean_over_groups
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
    """About the expert set and the modality, for masked images as in training."""
    whole: information.Information
    """The same for whole images, on which an encoder is used."""
    sets_masked: int
    """Number of different sets of experts in use."""
    sets_whole: int
    entropy: float
    """Of all probabilities, over log E; see ``dex.analysis.information.probability_entropy``."""
    first_agreement: float
    """Share of images whose first expert is the same masked and whole."""
    mass: Tensor
    """float64 ``[M, E]``: gate mass that each modality gives to each expert, masked images."""
    overlap: Tensor
    """float64 ``[M, M]``; see ``dex.analysis.information.overlap``."""
    random_overlap: float
    chance: Tensor
    """float64 ``[M, E]``: ``mass`` with permuted modalities, which shows a heatmap by chance."""


class Findings(NamedTuple):
    """Results of ``examine``; a part that was not requested is None."""

    step: int
    loss: Interval
    """Mean masked loss of the held-out images."""
    modality_loss: dict[str, float]
    layers: list[Layer] | None
    """Empty for the monolithic control."""
    gaps: list[Gap] | None
    modality_gap: Gap | None
    """See ``dex.analysis.swap.modality_gap``; also None if no image has a partner of its own modality."""
    ablations: list[ablation.Ablation] | None
    conflict: gradients.Conflict | None
    similarity: list[Tensor] | None
    """Per layer ``[E + 1, E + 1]``: CKA of experts and, last, the director."""
    distance: list[float]
    """See ``dex.analysis.probe.director_distance``."""
    cls: spectra.Spectrum | None
    patches: spectra.Spectrum | None
    """Of the mean of an image's patches."""
    probe: Interval | None
    """``dex.analysis.source_probe.leave_sources_out``, from mean of patches and CLS token of whole images."""
    image_loss: Tensor
    """float64 ``[B]``: masked loss of each held-out image, for ``paired``."""


PARTS = ("heldout", "routing", "swap", "ablation", "gradients", "similarity", "features")
"""Parts that can be requested; the held-out loss is always computed."""


class Material(NamedTuple):
    """The images on which models are examined, the same for all compared models."""

    held_out: Sample
    groups: Groups
    """Of the held-out images."""
    probed: Sample
    """Images of all splits for the linear probe, which is cross-validated by source."""
    probed_groups: Groups
    modalities: tuple[str, ...]


def material_of(dataset: Dataset, *, held_out: int = 256, probed: int = 512) -> Material:
    """Up to ``held_out`` images of the split "val", and up to ``probed`` of all splits, spread over the modalities.

    ValueError: the split is empty, or none of its images can be read.
    """
    sample = spread_out(dataset.split("val"), held_out)
    if not len(sample.images):
        raise ValueError(
            f"data: expected held-out images; the split 'val' of {dataset.name} has none that are readable"
        )
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
    """Measure ``model`` in float32 on its device, without changing it.

    parts: some of ``PARTS``. report: called with the name of each part when it begins. ValueError: no held-out image,
    or an unknown part.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"parts: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
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
    masked = masked_forward(model, images, noise, **options)
    loss = masked.loss.cpu().double()
    by_modality = {name: loss[held_out.modality == m] for m, name in enumerate(names)}
    findings: dict = {name: None for name in Findings._fields} | {
        "step": step,
        "loss": mean_over_groups(loss, material.groups.of),
        "modality_loss": {name: float(values.mean()) for name, values in by_modality.items() if len(values)},
        "distance": director_distance(model),
        "image_loss": loss,
    }
    if "routing" in parts:
        report("routing")
        findings["layers"] = _layers(model, images, noise, masked, material, batch_size)
    if "swap" in parts and routed:
        report("swap")
        swapped = swap(model, images, held_out.modality, noise, **options)
        findings["gaps"] = gaps(swapped, material.groups.of)
        findings["modality_gap"] = modality_gap(swapped, material.groups.of)
    if "ablation" in parts and routed:
        report("ablation")
        findings["ablations"] = ablation.ablate(model, images, held_out.modality, noise, len(names), **options)
    if "gradients" in parts:
        report("gradients")
        findings["conflict"] = gradients.conflict(model, images, held_out.modality, noise, len(names), **options)
    if "similarity" in parts and routed:
        report("similarity")
        findings["similarity"] = similarity.expert_similarity(model, images, batch_size=batch_size)
    if "features" in parts:
        report("features")
        findings |= _features(model, config, material, batch_size)
    return Findings(**findings)


def features(tokens: maps.Tokens) -> Tensor:
    """Mean of patches and CLS token of each image, ``[B, 2 D]``: the input of the linear probe."""
    return torch.cat([tokens.patches.mean(1), tokens.cls], 1)


def pixel_probe(material: Material) -> Interval | None:
    """The reference of ``Findings.probe``: the same probe on 16 x 16 grey pixels."""
    probed = material.probed
    return source_probe.leave_sources_out(
        source_probe.pixels(probed.images), probed.modality, material.probed_groups.of
    )


def paired(one: Findings, other: Findings, groups: Groups) -> Interval:
    """Mean loss of ``one`` minus that of ``other`` on the same held-out images, with its interval over groups."""
    return mean_over_groups(one.image_loss - other.image_loss, groups.of)


def _layers(
    model: MaskedAutoencoder, images: Tensor, noise: Tensor, masked: Masked, material: Material, batch_size: int
) -> list[Layer]:
    modality, count = material.held_out.modality, len(material.modalities)
    whole = masked_forward(model, images, noise, mask_ratio=0.0, batch_size=batch_size).routes
    layers = []
    permuted = modality[torch.randperm(len(modality), generator=torch.Generator().manual_seed(_MASKS))]
    for number, layer in enumerate(model.encoder.dex_layers):
        gates, experts = masked.routes.gates[number].cpu(), masked.routes.experts[number].cpu()
        experts_whole = whole.experts[number].cpu()
        layers.append(
            Layer(
                masked=information.information(sets_of(experts), modality),
                whole=information.information(sets_of(experts_whole), modality),
                sets_masked=information.distinct_sets([experts])[0],
                sets_whole=information.distinct_sets([experts_whole])[0],
                entropy=information.probability_entropy(masked.routes.probabilities[number]),
                first_agreement=information.first_agreement(experts, experts_whole),
                mass=expert_by_modality(gates, experts, modality, layer.num_experts, count),
                overlap=information.overlap(experts, modality, count),
                random_overlap=information.random_overlap(layer.num_experts, layer.top_k),
                chance=expert_by_modality(gates, experts, permuted, layer.num_experts, count),
            )
        )
    return layers


def _features(model: MaskedAutoencoder, config: Config, material: Material, batch_size: int) -> dict:
    device = next(model.parameters()).device
    probed = maps.tokens(model.encoder, _sized(material.probed.images, config, device), batch_size=batch_size)
    sources = material.probed_groups.of
    findings: dict = {"probe": source_probe.leave_sources_out(features(probed), material.probed.modality, sources)}
    held_out = maps.tokens(model.encoder, _sized(material.held_out.images, config, device), batch_size=batch_size)
    if len(held_out.cls) >= 2:
        findings |= {"cls": spectra.spectrum(held_out.cls), "patches": spectra.spectrum(held_out.patches.mean(1))}
    return findings


def _sized(images: Tensor, config: Config, device: torch.device) -> Tensor:
    return center(images.to(device), config.model.img_size, config.model.in_chans)
