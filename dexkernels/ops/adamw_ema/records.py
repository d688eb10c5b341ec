"""Records shared by `adamw_ema_` and its backends. Letters: E experts."""

from typing import NamedTuple

import torch
from torch import Tensor


class Update(NamedTuple):
    """One parameter, and its director if it is a stack of experts ``[E, *shape]``."""

    parameter: Tensor
    """float32 or float64, any shape."""
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    """float32, 0-dim: number of updates so far."""
    director: Tensor | None = None
    """``[*shape]``; updated from the experts before this update."""
    group_weights: Tensor | None = None
    """``[E]``, normalised gate mass."""
    copy: Tensor | None = None
    """bfloat16 or float16 ``[E + 1, *shape]``: receives the new experts, and the new director last."""

    @property
    def num_experts(self) -> int:
        """E; 1 for a parameter without a director."""
        return 1 if self.director is None else self.parameter.shape[0]

    @property
    def moved(self) -> list[Tensor]:
        """The tensors that the update writes."""
        written = (self.parameter, self.exp_avg, self.exp_avg_sq, self.director, self.copy)
        return [t for t in written if t is not None]


class Rule(NamedTuple):
    """Hyperparameters of AdamW (Loshchilov and Hutter 2019), with decoupled decay."""

    lr: float | Tensor
    """A float, or a 0-dim tensor that kernels read on its device."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2


class Scalars(NamedTuple):
    """The scalars of a step, each 0-dim on the device, or None."""

    momentum: Tensor
    clip_scale: Tensor | None
    """Factor of the gradients."""
    skip: Tensor | None
    """If true, nothing changes, not even step counters."""


def rates(updates: list[Update], rule: Rule) -> Tensor:
    """float32 ``[updates, 3]``: ``1 - lr * weight_decay``, ``lr / (1 - beta1^t)``, ``1 / sqrt(1 - beta2^t)``.

    The step counters already include this step. Computed in float64, since float32 would leave four correct digits in
    ``1 - 0.999``, and without waiting for the device.
    """
    steps = torch.stack([u.step for u in updates]).double()
    lr = torch.as_tensor(rule.lr, dtype=torch.float64, device=steps.device) if isinstance(rule.lr, Tensor) else rule.lr
    keep = torch.ones_like(steps) * (1 - lr * rule.weight_decay)
    first, second = (1 - torch.pow(beta, steps) for beta in rule.betas)
    return torch.stack((keep, lr / first, second.rsqrt()), 1).float()
