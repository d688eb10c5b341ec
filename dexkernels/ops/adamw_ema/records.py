"""What `adamw_ema_` and its backends pass to each other. Letters: E experts."""

from typing import NamedTuple

import torch
from torch import Tensor


class Update(NamedTuple):
    """One parameter, and the director that follows it where it is a stack of experts ``[E, *shape]``."""

    parameter: Tensor
    """float32 or float64, any shape."""
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    """float32, 0-dim: how often it has been updated."""
    director: Tensor | None = None
    """``[*shape]``; updated from the experts as they were before this update."""
    group_weights: Tensor | None = None
    """``[E]``, normalised gate mass."""
    copy: Tensor | None = None
    """bfloat16 or float16 ``[E + 1, *shape]``: gets the new experts, the new director last."""

    @property
    def num_experts(self) -> int:
        """1 for a parameter that no director follows."""
        return 1 if self.director is None else self.parameter.shape[0]

    @property
    def moved(self) -> list[Tensor]:
        """What is written."""
        written = (self.parameter, self.exp_avg, self.exp_avg_sq, self.director, self.copy)
        return [t for t in written if t is not None]


class Rule(NamedTuple):
    """AdamW's (Loshchilov and Hutter 2019), with decoupled decay."""

    lr: float | Tensor
    """A float, or a 0-dim tensor, which a kernel reads where it lies."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2


class Scalars(NamedTuple):
    """What a step needs beside tensors, each 0-dim, on the device, or None."""

    momentum: Tensor
    clip_scale: Tensor | None
    """Gradients are multiplied by it."""
    skip: Tensor | None
    """Where true nothing changes, step counters neither."""


def rates(updates: list[Update], rule: Rule) -> Tensor:
    """float32 ``[updates, 3]``: ``1 - lr * weight_decay``, ``lr / (1 - beta1^t)``, ``1 / sqrt(1 - beta2^t)``.

    Of the steps as they are, counted already. In float64, or of ``1 - 0.999`` four digits would be right, and without
    a wait for the device.
    """
    steps = torch.stack([u.step for u in updates]).double()
    lr = torch.as_tensor(rule.lr, dtype=torch.float64, device=steps.device) if isinstance(rule.lr, Tensor) else rule.lr
    keep = torch.ones_like(steps) * (1 - lr * rule.weight_decay)
    first, second = (1 - torch.pow(beta, steps) for beta in rule.betas)
    return torch.stack((keep, lr / first, second.rsqrt()), 1).float()
