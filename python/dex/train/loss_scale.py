"""Dynamic loss scaling for float16, decided on the device (Micikevicius et al. 2018)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

START, LEAST, MOST = 2.0**16, 1.0, 2.0**24
GROWS_AFTER = 2000
"""Consecutive good steps after which the scale doubles."""
MOST_HALVINGS = 24
"""Halvings from ``MOST`` to ``LEAST``. More consecutive overflows are not caused by the scale."""


class LossScale:
    """The loss is multiplied by ``value`` before backward, and the gradients are divided by it before any use.

    A step that overflows changes nothing, by the verdict that all ranks share, and halves the scale; ``GROWS_AFTER``
    consecutive good steps double it. All updates are in place and never wait for the device.
    """

    def __init__(self, device: torch.device):
        self.value: Tensor = torch.full((), START, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.overflows: int = 0
        """Consecutive overflows, counted on the host."""

    @torch.no_grad()
    def unscale_(self, gradients: Iterable[Tensor]) -> None:
        """Divide ``gradients`` by ``value`` in place."""
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        torch._foreach_mul_(local, self.value.reciprocal())

    @torch.no_grad()
    def update(self, good: Tensor, overflow: Tensor) -> None:
        """Update the scale after a step. good, overflow: 0-dim bool; both are False for a step without images."""
        steps = torch.where(overflow, 0, self._good_steps + good)
        grows = steps >= GROWS_AFTER
        factor = torch.where(overflow, 0.5, torch.where(grows, 2.0, 1.0))
        self.value.copy_((self.value * factor).clamp(LEAST, MOST))
        self._good_steps.copy_(torch.where(grows, 0, steps))

    def state(self) -> dict[str, Any]:
        """The state as JSON values; waits for the device."""
        return {"value": self.value.item(), "good_steps": self._good_steps.item(), "overflows": self.overflows}

    def restore(self, state: dict[str, Any]) -> None:
        self.value.fill_(state["value"])
        self._good_steps.fill_(state["good_steps"])
        self.overflows = state["overflows"]
