"""Loss spikes: good steps with a loss far above those before, and the images that caused it."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dex.train.verdict import HostVerdict

STEPS, DEVIATIONS, SHARE = 100, 12.0, 0.05
"""A loss is a spike if it exceeds the median of the last 100 steps by 12 median absolute deviations and by 5 %."""
SAMPLES = 5
"""Number of images that are named."""


class Spike(NamedTuple):
    """A good step with a loss far above those before it."""

    step: int
    """Steps done when it began."""
    loss: float
    usual: float
    """Median loss of the steps before."""
    samples: list[tuple[str, float]]
    """Ids and losses of this rank's images with the highest losses, highest first."""


class LossSpikes:
    """Keeps the losses of the last steps and the spikes among them, on the host."""

    def __init__(self):
        self._losses: deque[float] = deque(maxlen=STEPS)
        self._spikes: list[Spike] = []

    def watch(self, step: int, ids: Sequence[str], verdict: HostVerdict) -> None:
        """Add the loss and the images of a good step, and record it if it is a spike."""
        before = torch.tensor(self._losses, dtype=torch.float64)
        self._losses.append(verdict.loss)
        if len(before) < STEPS // 2:
            return
        usual = before.median()
        deviation = float((before - usual).abs().median())
        limit = usual + max(DEVIATIONS * deviation, SHARE * abs(float(usual)))
        if verdict.loss > limit:
            worst = verdict.image_loss.argsort(descending=True)[:SAMPLES].tolist()
            samples = [(ids[i], float(verdict.image_loss[i])) for i in worst]
            self._spikes.append(Spike(step, verdict.loss, float(usual), samples))

    def take(self) -> list[Spike]:
        """The spikes since the last call."""
        spikes, self._spikes = self._spikes, []
        return spikes

    def state(self) -> dict[str, Any]:
        """The losses as JSON values, without the spikes."""
        return {"losses": list(self._losses)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the losses from a state that may have other entries."""
        self._losses = deque(state["losses"], STEPS)
