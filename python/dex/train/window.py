"""What is counted over steps on the device: metrics since the last row, and experts that get no images.

Shape letters: E experts of all layers, E_l experts of layer l, M modalities.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dex.analysis.usage import UnusedExperts, min_share, unused_experts, usage_entropy
from dex.train.verdict import Losses, Verdict

SLOTS_TO_JUDGE = 100
"""An expert is judged once its layer has given out this many slots per expert."""


class Sums(NamedTuple):
    """Sums over the good steps since the last row, float64; all ranks have the same."""

    steps: Tensor
    """0-dim: all steps but those without images."""
    good: Tensor
    """0-dim: good ones among them."""
    sums: Tensor
    """``[5]``, in the order of `dex.train.verdict.Losses`."""
    modality_loss: Tensor
    """``[M]``: losses of its images."""
    modality_images: Tensor
    """``[M]``: how many."""


class Means(NamedTuple):
    """What `Window.read` gives; None without a good step."""

    losses: dict[str, float | None]
    skipped: int
    modality_loss: dict[str, float]


class Window:
    """`count` works in place on the device, so a CUDA graph may replay it."""

    def __init__(self, modalities: Sequence[str], experts: Sequence[int], device: torch.device):
        """experts: of each layer that has any."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        kinds = len(modalities)
        self.modalities, self.experts = modalities, list(experts)
        self.sums = Sums(zeros(), zeros(), zeros(len(Losses._fields)), zeros(kinds), zeros(kinds))
        self.slots = torch.zeros(sum(experts), dtype=torch.int64, device=device)
        """``[E]``: given to each expert since the last judgement."""
        self._unused = [UnusedExperts((), ()) for _ in self.experts]

    @torch.no_grad()
    def count(self, verdict: Verdict) -> None:
        sums = self.sums
        sums.steps.add_(verdict.unreadable == 0)  # a step without its images will be taken again
        sums.good.add_(verdict.good)
        for total, value in (
            (sums.sums, verdict.losses),
            (sums.modality_loss, verdict.modality_loss),
            (sums.modality_images, verdict.modality_images),
        ):
            total.add_(torch.where(verdict.good, value, 0.0))
        self.slots.add_(torch.where(verdict.good, verdict.slots, 0.0).long())

    def read(self) -> Means:
        """Means over the steps since they were last read; waits for the device."""
        sums = Sums(*(tensor.tolist() for tensor in self.sums))
        for tensor in self.sums:
            tensor.zero_()
        of_modality = zip(self.modalities, sums.modality_loss, sums.modality_images, strict=True)
        return Means(
            {
                name: value / sums.good if sums.good else None
                for name, value in zip(Losses._fields, sums.sums, strict=True)
            },
            int(sums.steps - sums.good),
            {name: loss / images for name, loss, images in of_modality if images},
        )

    def load(self) -> dict[str, list[float]]:
        """How even the experts' load is, by layer, since the last judgement; waits for the device."""
        counts = self._by_layer()
        return {
            "usage_entropy": [usage_entropy(c) for c in counts],
            "usage_min_share": [min_share(c) for c in counts],
        }

    def newly_unused(self) -> list[tuple[int, UnusedExperts]]:
        """(layer, its unused experts) where that changed for the worse since the last judgement.

        Judges only once enough slots were given out to tell, and then begins to count anew.
        """
        counts = self._by_layer()
        if not counts or any(c.sum() < SLOTS_TO_JUDGE * c.numel() for c in counts):
            return []
        self.slots.zero_()
        before, self._unused = self._unused, [unused_experts(c) for c in counts]
        return [
            (layer, new)
            for layer, (old, new) in enumerate(zip(before, self._unused, strict=True))
            if set(new.dead) - set(old.dead) or set(new.nearly_dead) - set(old.dead) - set(old.nearly_dead)
        ]

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "window": {name: tensor.tolist() for name, tensor in self.sums._asdict().items()},
            "slots": self.slots.tolist(),
            "unused": [list(map(list, unused)) for unused in self._unused],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`; other entries of it are left alone."""
        for name, tensor in self.sums._asdict().items():
            tensor.copy_(torch.tensor(state["window"][name], dtype=tensor.dtype))
        self.slots.copy_(torch.tensor(state["slots"], dtype=torch.int64))
        self._unused = [UnusedExperts(tuple(dead), tuple(nearly)) for dead, nearly in state["unused"]]

    def _by_layer(self) -> list[Tensor]:
        return list(self.slots.to("cpu", copy=True).split(self.experts))
