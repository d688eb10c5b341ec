"""What tells during training whether experts specialise: the measures of `dex.analysis` on as many images as leave an
evaluation its share of a run's time.

Shape letters: B held-out images, S of them that are swapped, n probed, E experts, K chosen, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis import information, source_probe, spectra
from dex.analysis.intervals import Interval
from dex.analysis.routes import Masked, Override, Routes, sets_of
from dex.analysis.sample import Groups
from dex.analysis.swap import KINDS, Gap, gaps, modality_gap, swapped
from dex.config import Config, per_layer
from dex.sizing.estimate import training_flops

SHARE = 0.05
"""The most of a run's time that evaluations take."""
_COMPUTED = 0.035
"""Of the run's matrix products: pictures, probes and intervals, which have next to none, take the rest of the time."""
FEWEST = 16
"""Images that are swapped, and known to a probe, however little time there is."""
KNOWN = 4
"""Training images that a probe knows, at most, for every held-out one."""
TENTH = 100
"""A run of this number of steps or more is evaluated after the first tenth of them too."""
PERMUTATIONS, PROBE_STEPS = 199, 60


class Sizes(NamedTuple):
    """How many images an evaluation looks at, beside the held-out ones whose loss it gives."""

    swapped: int
    """Held-out images that are given others' experts."""
    known: int
    """Training images that the probes know."""


def is_due(config: Config, step: int, steps: int) -> bool:
    """Whether held-out images are looked at once ``step`` of ``steps`` steps are done: every ``run.evaluate_every``, at
    the last step, and in a run of `TENTH` steps or more after the first tenth."""
    every = config.run.evaluate_every
    if not every:
        return False
    return step % every == 0 or step == steps or (steps >= TENTH and step == -(-steps // 10))


def sizes(config: Config, steps: int, images: int) -> Sizes:
    """What all evaluations of a run of ``steps`` steps can afford within `SHARE` of its time, with ``images`` held-out
    ones whose loss is wanted in any case.

    From the matrix products of `dex.sizing.estimate.training_flops`, so that a resumed run, and one on other ranks,
    look at the same images. Never fewer than `FEWEST`.
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
    number = min(affordable, images)
    known = max(int((budget - number * swap) / whole), FEWEST)
    return Sizes(number, min(known, KNOWN * images))


def _encoder(parts: dict[str, int]) -> float:
    """Operations of an encoder's forward, from those of a step."""
    return (parts["experts"] + parts["attention"] + parts["router"]) / 3 + parts["patch embedding"] / 2


class Whole(NamedTuple):
    """What the encoder makes of n whole images, without a mask; on the host."""

    cls: Tensor
    """float ``[n, D]``"""
    patches: Tensor
    """float ``[n, D]``: mean of an image's patches."""
    probabilities: list[Tensor]
    """Per layer float ``[n, E_l]``."""

    @property
    def features(self) -> Tensor:
        """``[n, 2 D]``: what the linear probe reads."""
        return torch.cat([self.patches, self.cls], 1)

    def first(self, count: int) -> Whole:
        return Whole(self.cls[:count], self.patches[:count], [p[:count] for p in self.probabilities])


class LayerRoutes(NamedTuple):
    """How one layer routes the held-out images; see `dex.analysis.information`."""

    entropy: float
    sets_masked: int
    sets_whole: int
    first_agreement: float
    masked: information.Information
    whole: information.Information


class Instruments(NamedTuple):
    """Everything here is of held-out images but the probes, which learn from training images too."""

    gaps: list[Gap]
    """In all layers at once, by kind; empty when monolithic."""
    modality_gap: Gap | None
    layers: list[LayerRoutes]
    cls_rank: float | None
    """RankMe of the CLS tokens; None of fewer than two images."""
    patch_rank: float | None
    probe: Interval | None
    """`dex.analysis.source_probe.leave_sources_out` of mean of patches and CLS token."""
    pixels: Interval | None
    """The same probe of 16 x 16 grey pixels."""
    swapped: int = 0
    """Held-out images of the gaps."""
    probed: int = 0
    """Images of the probe and of the pixels'."""


class Seen(NamedTuple):
    """What an evaluation has gathered of its held-out images, from all ranks."""

    masked: Masked
    whole: Whole
    modality: Tensor
    """int64 ``[B]``"""
    groups: Groups
    """Of the held-out images."""


class Probed(NamedTuple):
    """The images of the linear probe: the held-out ones, then those of training."""

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
    """The instruments of what was ``seen``.

    swaps: S; loss_under: as of `dex.analysis.swap.swapped`, for the first S images. chosen: K of each layer.
    pixels: of the same images as ``probed``, see `pixel_probe`.
    """
    routed = bool(seen.masked.routes.gates)
    found, beyond = [], None
    if routed:
        own = Masked(seen.masked.loss[:swaps], seen.masked.routes.of(torch.arange(swaps)), seen.masked.cls[:swaps])
        modality, groups = seen.modality[:swaps], seen.groups.of[:swaps]
        # Random experts cost a forward more, and are missed only where no image is of another modality.
        kinds = KINDS[:2] if len(modality.unique()) > 1 else KINDS[2:]
        swap = swapped(loss_under, own, modality, kinds=kinds, layers_apart=False)
        if swap.own.isfinite().all():
            found, beyond = gaps(swap, groups), modality_gap(swap, groups)
    finite = bool(seen.whole.features.isfinite().all())
    ranked = finite and len(seen.whole.cls) >= 2
    return Instruments(
        gaps=found,
        modality_gap=beyond,
        layers=[_layer(seen, place, k) for place, k in enumerate(chosen)],
        cls_rank=spectra.spectrum(seen.whole.cls).rankme if ranked else None,
        patch_rank=spectra.spectrum(seen.whole.patches).rankme if ranked else None,
        probe=linear_probe(probed) if probed.features.isfinite().all() else None,
        pixels=pixels,
        swapped=swaps,
        probed=len(probed.features),
    )


def linear_probe(probed: Probed) -> Interval | None:
    """With fewer steps of its optimizer than `dex analyse` takes; pixels have the same."""
    return source_probe.leave_sources_out(probed.features, probed.modality, probed.sources, steps=PROBE_STEPS)


def _layer(seen: Seen, place: int, chosen: int) -> LayerRoutes:
    experts = seen.masked.routes.experts[place]
    whole = _chosen(seen.whole.probabilities[place], chosen)
    return LayerRoutes(
        entropy=information.probability_entropy(seen.masked.routes.probabilities[place]),
        sets_masked=information.distinct_sets([experts])[0],
        sets_whole=information.distinct_sets([whole])[0],
        first_agreement=information.first_agreement(experts, whole),
        masked=information.information(sets_of(experts), seen.modality, permutations=PERMUTATIONS),
        whole=information.information(sets_of(whole), seen.modality, permutations=PERMUTATIONS),
    )


def _chosen(probabilities: Tensor, count: int) -> Tensor:
    """The ``count`` most probable experts, as `dexkernels.route` chooses: ties to the lower index."""
    return probabilities.sort(dim=1, descending=True, stable=True).indices[:, :count]


def columns(found: Instruments) -> dict[str, object]:
    """The instruments as entries of a row of metrics: numbers, by layer a list, by kind a mapping."""
    row: dict[str, object] = {}
    every = [*found.gaps, *([found.modality_gap] if found.modality_gap else [])]
    if every:
        for end in ("value", "low", "high"):
            name = "swap_gap" if end == "value" else f"swap_gap_{end}"
            row[name] = {gap.kind: getattr(gap.gap, end) for gap in every}
        row |= {"swap_gap_of": every[0].own, "swap_gap_images": found.swapped}
    if found.layers:
        layers = found.layers
        row |= {
            "probability_entropy": [layer.entropy for layer in layers],
            "expert_sets": [layer.sets_masked for layer in layers],
            "expert_sets_whole": [layer.sets_whole for layer in layers],
            "first_agreement": [layer.first_agreement for layer in layers],
            "information": [layer.masked.value for layer in layers],
            "information_null": [layer.masked.null_high for layer in layers],
            "information_whole": [layer.whole.value for layer in layers],
        }
    if found.cls_rank is not None:
        row["rankme"] = {"CLS token": found.cls_rank, "mean of patches": found.patch_rank}
    for name, interval in (("probe_linear", found.probe), ("probe_pixels", found.pixels)):
        if interval is not None:
            row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    if found.probe is not None:
        row["probe_images"] = found.probed
    return row


def routes_of(gates: list[Tensor], experts: list[Tensor], probabilities: list[Tensor]) -> Routes:
    """`Routes` on the host."""
    return Routes([t.cpu() for t in gates], [t.cpu() for t in experts], [t.cpu() for t in probabilities])
