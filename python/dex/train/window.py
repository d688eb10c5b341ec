"""Counts over steps, kept on the device: metrics since the last row, and experts that get no images.

Shape letters: E experts of all layers, E_l experts of layer l, M modalities.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dex.analysis.usage import UnusedExperts, min_share, unused_experts, usage_entropy
from dex.train.verdict import Fields, Losses, Verdict

_MODALITY = ("modality_loss", "modality_images")
SLOTS_TO_JUDGE = 100
"""Experts of a layer are judged once the layer has assigned this many slots per expert."""


class LastingUnused(NamedTuple):
    """Experts of one layer that got no image in two consecutive judgements."""

    layer: int
    experts: tuple[int, ...]


class Means(NamedTuple):
    """Means over the steps of a row; losses are None without a good step."""

    losses: dict[str, float | None]
    skipped: int
    modality_loss: dict[str, float]


class Window:
    """Sums of the steps since the last row, and slots since the last judgement.

    ``count`` works in place on the device, so a CUDA graph can replay it.
    """

    def __init__(self, modalities: Sequence[str], experts: Sequence[int], device: torch.device):
        """experts: number of experts of each layer that has any."""
        by_modality = (len(modalities),)
        self.modalities: Sequence[str] = modalities
        self.experts: list[int] = list(experts)
        self.steps: Tensor = torch.zeros((), dtype=torch.float64, device=device)
        """0-dim: steps since the last row, except those without images."""
        self._fields = Fields({"good": (), **dict.fromkeys(Losses._fields, ())} | dict.fromkeys(_MODALITY, by_modality))
        self._sums = torch.zeros(sum(self._fields.sizes), dtype=torch.float64, device=device)
        """Sums over the good steps, see ``sums``; the same on all ranks."""
        self.slots: Tensor = torch.zeros(sum(experts), dtype=torch.int64, device=device)
        """``[E]``: slots of each expert since the last judgement."""
        self._unused = [UnusedExperts((), ()) for _ in self.experts]
        self._reported: list[set[int]] = [set() for _ in self.experts]
        """For each layer, experts that were reported as unused and still are."""

    @torch.no_grad()
    def count(self, verdict: Verdict) -> None:
        """Add a step."""
        self.steps.add_(verdict.unreadable == 0)  # A step without images is repeated
        numbers = self._fields.pack(
            torch.float64,
            good=verdict.good,
            **verdict.losses._asdict(),
            modality_loss=verdict.modality_loss,
            modality_images=verdict.modality_images,
        )
        self._sums.add_(torch.where(verdict.good, numbers, 0.0))
        self.slots.add_(torch.where(verdict.good, verdict.slots, 0.0).long())

    def read(self) -> Means:
        """Means over the steps since the last call; waits for the device."""
        steps, sums = self.steps.item(), self.sums()
        self.steps.zero_(), self._sums.zero_()
        good, of_modality = sums["good"], zip(self.modalities, *(sums[name] for name in _MODALITY), strict=True)
        return Means(
            {name: sums[name] / good if good else None for name in Losses._fields},
            int(steps - good),
            {name: loss / images for name, loss, images in of_modality if images},
        )

    def sums(self) -> dict[str, Any]:
        """Sums over the good steps since the last row; waits for the device.

        good: how many steps. Each field of ``Losses``. By modality, modality_loss: losses of its images;
        modality_images: how many.
        """
        return {name: values.tolist() for name, values in self._fields.unpack(self._sums.cpu()).items()}

    def load(self) -> dict[str, list[float]]:
        """Balance of the experts' load by layer since the last judgement; waits for the device."""
        counts = self._by_layer()
        return {
            "usage_entropy": [usage_entropy(c) for c in counts],
            "usage_min_share": [min_share(c) for c in counts],
        }

    def newly_unused(self, *, warming_up: bool = False) -> list[LastingUnused]:
        """Experts that got no image in two consecutive judgements; each is reported once until it gets an image again.

        Judges only if there are enough slots, and then resets the count. warming_up: report none, since routers still
        change fast.
        """
        counts = self._by_layer()
        if not counts or any(c.sum() < SLOTS_TO_JUDGE * c.numel() for c in counts):
            return []
        self.slots.zero_()
        previous, self._unused = self._unused, [unused_experts(c) for c in counts]
        newly_unused = []
        for layer, (old, new) in enumerate(zip(previous, self._unused, strict=True)):
            lasting = set(new.dead) & set(old.dead)
            if warming_up:
                continue
            if unreported := lasting - self._reported[layer]:
                newly_unused.append(LastingUnused(layer, tuple(sorted(unreported))))
            self._reported[layer] = lasting
        return newly_unused

    def state(self) -> dict[str, Any]:
        """The state as JSON values."""
        sums = self.sums()
        losses = [sums.pop(name) for name in Losses._fields]
        return {
            "window": {"steps": self.steps.item(), "good": sums.pop("good"), "sums": losses, **sums},
            "slots": self.slots.tolist(),
            "unused": [list(map(list, unused)) for unused in self._unused],
            "unused_told": [sorted(experts) for experts in self._reported],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore from a state that may have other entries."""
        window = dict(state["window"])
        self.steps.fill_(window.pop("steps"))
        window |= zip(Losses._fields, window.pop("sums"), strict=True)
        values = {name: torch.tensor(value, dtype=torch.float64) for name, value in window.items()}
        self._sums.copy_(self._fields.pack(torch.float64, **values))
        self.slots.copy_(torch.tensor(state["slots"], dtype=torch.int64))
        self._unused = [UnusedExperts(tuple(dead), tuple(nearly)) for dead, nearly in state["unused"]]
        # Earlier versions reported an expert after one judgement.
        reported = state.get("unused_told", [dead for dead, _ in state["unused"]])
        self._reported = [set(experts) for experts in reported]

    def _by_layer(self) -> list[Tensor]:
        return list(self.slots.to("cpu", copy=True).split(self.experts))
