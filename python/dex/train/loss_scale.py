"""The factor that keeps the gradients of float16 within its range, decided on the device (Micikevicius et al. 2018)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

START, LEAST, MOST = 2.0**16, 1.0, 2.0**24
GROWS_AFTER = 2000
"""Good steps in a row after which the scale doubles."""
MOST_HALVINGS = 24
"""From `MOST` to `LEAST`. So many overflows in a row are looked for a scale; further ones are not of the scale."""


class LossScale:
    """The loss is multiplied by `value` before backward, its gradients are divided by it before anything reads them.

    A step that overflows changes nothing, by the verdict that all ranks share, and halves the scale; `GROWS_AFTER` good
    ones in a row double it. Everything is changed in place, without a wait for the device.
    """

    def __init__(self, device: torch.device):
        self.value: Tensor = torch.full((), START, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.overflows: int = 0
        """In a row; the host counts them."""

    @torch.no_grad()
    def unscale_(self, gradients: Iterable[Tensor]) -> None:
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        torch._foreach_mul_(local, self.value.reciprocal())

    @torch.no_grad()
    def update(self, good: Tensor, overflow: Tensor) -> None:
        """good, overflow: 0-dim bool; a step that is neither had no images and changes nothing."""
        steps = torch.where(overflow, 0, self._good_steps + good)
        grows = steps >= GROWS_AFTER
        factor = torch.where(overflow, 0.5, torch.where(grows, 2.0, 1.0))
        self.value.copy_((self.value * factor).clamp(LEAST, MOST))
        self._good_steps.copy_(torch.where(grows, 0, steps))

    def state(self) -> dict[str, Any]:
        """All of it, as JSON; waits for the device."""
        return {"value": self.value.item(), "good_steps": self._good_steps.item(), "overflows": self.overflows}

    def restore(self, state: dict[str, Any]) -> None:
        self.value.fill_(state["value"])
        self._good_steps.fill_(state["good_steps"])
        self.overflows = state["overflows"]
