"""Measures of specialisation during training, on as many images as the share of a run's time for evaluations allows.

Shape letters: B held-out images, S of them swapped, n probed, E experts, K chosen, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis import information, source_probe, spectra
from dex.analysis.intervals import Interval
from dex.analysis.routes import Masked, Override, sets_of
from dex.analysis.sample import Groups
from dex.analysis.swap import KINDS, Gap, gaps, modality_gap, swapped
from dex.config import Config, per_layer
from dex.sizing.estimate import training_flops

SHARE = 0.05
"""Largest share of a run's time for evaluations."""
_COMPUTED = 0.035
"""Share of the run's matrix products. Pictures, probes and intervals have almost none and take the rest of the time."""
FEWEST = 16
"""Fewest images that are swapped, and that a probe is trained on, however little time there is."""
KNOWN = 4
"""Largest number of training images of a probe per held-out image."""
TENTH = 100
"""A run of at least this many steps is also evaluated after its first tenth."""
PERMUTATIONS, PROBE_STEPS = 199, 60


class Sizes(NamedTuple):
    """Number of images that an evaluation uses in addition to the masked loss of the held-out images."""

    swapped: int
    """Held-out images that are given other experts."""
    known: int
    """Training images of the probes."""


def is_due(config: Config, step: int, steps: int) -> bool:
    """Whether to evaluate after ``step`` of ``steps`` steps: every ``run.evaluate_every``, at the last step, and in a
    run of at least ``TENTH`` steps after the first tenth."""
    every = config.run.evaluate_every
    if not every:
        return False
    return step % every == 0 or step == steps or (steps >= TENTH and step == -(-steps // 10))


def sizes(config: Config, steps: int, images: int) -> Sizes:
    """Sizes with which all evaluations of a run of ``steps`` steps take at most ``SHARE`` of its time, given that the
    loss of ``images`` held-out images is always computed.

    Computed from the matrix products of ``dex.sizing.estimate.training_flops``, so that a resumed run, also on other
    ranks, uses the same images. At least ``FEWEST``.
    """
    every = max(config.run.evaluate_every, 1)
    count = 1 + steps // every + (steps % every > 0) + (steps >= TENTH and -(-steps // 10) % every > 0)
    parts = training_flops(config)
    masked = _encoder(parts) + parts["directors"] + parts["decoder"] / 3
    whole = _encoder(training_flops(replace(config, model=replace(config.model, mask_ratio=0.0))))
    budget = _COMPUTED * steps * config.data.batch_size * sum(parts.values()) / count
    budget -= images * (masked * (1 if config.optim.ema is None else 2) + whole)
    routed = any(per_layer(config.model.num_experts, config.model.depth))
    swap = 2 * (masked + parts["experts"] / 3) if routed else 0.0
    affordable = max(int(budget / (swap + whole)), FEWEST)
    swapped = min(affordable, images)
    known = max(int((budget - swapped * swap) / whole), FEWEST)
    return Sizes(swapped, min(known, KNOWN * images))


def _encoder(parts: dict[str, int]) -> float:
    """Operations of a forward of the encoder, from those of a step."""
    return (parts["experts"] + parts["attention"] + parts["router"]) / 3 + parts["patch embedding"] / 2


class Whole(NamedTuple):
    """Results of the encoder for n whole images, without a mask; on the host."""

    cls: Tensor
    """float ``[n, D]``"""
    patches: Tensor
    """float ``[n, D]``: mean of an image's patches."""
    probabilities: list[Tensor]
    """Per layer float ``[n, E_l]``."""

    @property
    def features(self) -> Tensor:
        """``[n, 2 D]``: input of the linear probe."""
        return torch.cat([self.patches, self.cls], 1)

    def first(self, count: int) -> Whole:
        """The first ``count`` images."""
        return Whole(self.cls[:count], self.patches[:count], [p[:count] for p in self.probabilities])


class LayerRoutes(NamedTuple):
    """How one layer routes the held-out images; see ``dex.analysis.information``."""

    entropy: float
    sets_masked: int
    sets_whole: int
    first_agreement: float
    masked: information.Information
    whole: information.Information


class Instruments(NamedTuple):
    """Measures on held-out images; the probes also use training images."""

    gaps: list[Gap]
    """In all layers at once, by kind; empty when monolithic."""
    modality_gap: Gap | None
    layers: list[LayerRoutes]
    cls_rank: float | None
    """RankMe of the CLS tokens; None with fewer than two images."""
    patch_rank: float | None
    """RankMe of the means of patches."""
    probe: Interval | None
    """``dex.analysis.source_probe.leave_sources_out`` of mean of patches and CLS token."""
    pixels: Interval | None
    """The same probe on 16 x 16 grey pixels."""
    swapped: int = 0
    """Number of held-out images of the gaps."""
    probed: int = 0
    """Number of images of both probes."""


class Seen(NamedTuple):
    """Results for the held-out images, gathered from all ranks."""

    masked: Masked
    whole: Whole
    modality: Tensor
    """int64 ``[B]``"""
    groups: Groups
    """Of the held-out images."""


class Probed(NamedTuple):
    """The images of the linear probe: first held-out, then training images."""

    features: Tensor
    """``[n, 2 D]``"""
    modality: Tensor
    sources: Tensor


def measure(
    seen: Seen,
    probed: Probed,
    pixels: Interval | None,
    swaps: int,
    loss_under: Callable[[Sequence[Override | None]], Tensor],
    *,
    chosen: Sequence[int],
) -> Instruments:
    """Compute the instruments.

    swaps: S. loss_under: as in ``dex.analysis.swap.swapped``, for the first S images. chosen: K of each layer.
    pixels: probe of the pixels of the same images as ``probed``.
    """
    routed = bool(seen.masked.routes.gates)
    swap_gaps, beyond = [], None
    if routed:
        own = Masked(seen.masked.loss[:swaps], seen.masked.routes.of(torch.arange(swaps)), seen.masked.cls[:swaps])
        modality, groups = seen.modality[:swaps], seen.groups.of[:swaps]
        # Random experts cost another forward, and are needed only if no image has another modality.
        kinds = KINDS[:2] if len(modality.unique()) > 1 else KINDS[2:]
        swap = swapped(loss_under, own, modality, kinds=kinds, layers_apart=False)
        if swap.own.isfinite().all():
            swap_gaps, beyond = gaps(swap, groups), modality_gap(swap, groups)
    finite = bool(seen.whole.features.isfinite().all())
    ranked = finite and len(seen.whole.cls) >= 2
    return Instruments(
        gaps=swap_gaps,
        modality_gap=beyond,
        layers=[_layer(seen, layer, k) for layer, k in enumerate(chosen)],
        cls_rank=spectra.spectrum(seen.whole.cls).rankme if ranked else None,
        patch_rank=spectra.spectrum(seen.whole.patches).rankme if ranked else None,
        probe=linear_probe(probed) if probed.features.isfinite().all() else None,
        pixels=pixels,
        swapped=swaps,
        probed=len(probed.features),
    )


def linear_probe(probed: Probed) -> Interval | None:
    """Linear probe with fewer steps of the optimizer than in ``dex analyse``; the same for features and pixels."""
    return source_probe.leave_sources_out(probed.features, probed.modality, probed.sources, steps=PROBE_STEPS)


def _layer(seen: Seen, layer: int, chosen: int) -> LayerRoutes:
    experts = seen.masked.routes.experts[layer]
    whole = _chosen(seen.whole.probabilities[layer], chosen)
    return LayerRoutes(
        entropy=information.probability_entropy(seen.masked.routes.probabilities[layer]),
        sets_masked=information.distinct_sets([experts])[0],
        sets_whole=information.distinct_sets([whole])[0],
        first_agreement=information.first_agreement(experts, whole),
        masked=information.information(sets_of(experts), seen.modality, permutations=PERMUTATIONS),
        whole=information.information(sets_of(whole), seen.modality, permutations=PERMUTATIONS),
    )


def _chosen(probabilities: Tensor, count: int) -> Tensor:
    """The ``count`` most probable experts, as in ``dexkernels.route``: ties go to the lower index."""
    return probabilities.sort(dim=1, descending=True, stable=True).indices[:, :count]


def columns(instruments: Instruments) -> dict[str, object]:
    """The instruments as entries of a row of metrics: numbers, lists by layer, mappings by kind."""
    row: dict[str, object] = {}
    swap_gaps = [*instruments.gaps, *([instruments.modality_gap] if instruments.modality_gap else [])]
    if swap_gaps:
        for end in ("value", "low", "high"):
            name = "swap_gap" if end == "value" else f"swap_gap_{end}"
            row[name] = {gap.kind: getattr(gap.gap, end) for gap in swap_gaps}
        row |= {"swap_gap_of": swap_gaps[0].own, "swap_gap_images": instruments.swapped}
    if layers := instruments.layers:
        row |= {
            "probability_entropy": [layer.entropy for layer in layers],
            "expert_sets": [layer.sets_masked for layer in layers],
            "expert_sets_whole": [layer.sets_whole for layer in layers],
            "first_agreement": [layer.first_agreement for layer in layers],
            "information": [layer.masked.value for layer in layers],
            "information_null": [layer.masked.null_high for layer in layers],
            "information_whole": [layer.whole.value for layer in layers],
        }
    if instruments.cls_rank is not None:
        row["rankme"] = {"CLS token": instruments.cls_rank, "mean of patches": instruments.patch_rank}
    for name, interval in (("probe_linear", instruments.probe), ("probe_pixels", instruments.pixels)):
        if interval is not None:
            row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    if instruments.probe is not None:
        row["probe_images"] = instruments.probed
    return row
