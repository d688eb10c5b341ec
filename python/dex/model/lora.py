"""Low-rank adaptation (Hu et al. 2021) of linear maps and stacked experts, merged into plain weights after training.

Each adapted weight W becomes ``W + alpha / rank * up @ down``; W is frozen, ``down`` and ``up`` are trained. A stack of
experts ``[E, out, in]`` has one pair per expert. Built on ``torch.nn.utils.parametrize``, so modules, checkpoints and
DDP see the adapted weight under its original name.

Letters: E experts, R rank.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dex.model.mae import VisionTransformer


class LowRank(nn.Module):
    """``weight [..., out, in] -> weight + scale * up [..., out, R] @ down [..., R, in]``; ``up`` starts at 0."""

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        *stack, rows, columns = weight.shape
        self.scale: float = alpha / rank
        self.down: nn.Parameter = nn.Parameter(weight.new_empty(*stack, rank, columns))
        self.up: nn.Parameter = nn.Parameter(weight.new_zeros(*stack, rows, rank))
        bound = 1 / math.sqrt(columns)  # As in torch.nn.Linear
        nn.init.uniform_(self.down, -bound, bound)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down)


def add_lora_(encoder: VisionTransformer, rank: int, alpha: float) -> None:
    """Adapt attention (``qkv``, ``proj``) and the MLPs of the encoder's path; freeze everything else.

    The MLPs are the stacked experts, the directors with ``path="director"``, or the dense MLPs of a monolithic model.
    Routers are not adapted. ValueError naming the argument; the encoder is then unchanged.
    """
    weights = list(_adapted(encoder))
    smallest = min(min(getattr(module, name).shape[-2:]) for module, name in weights)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= smallest:
        raise ValueError(f"lora_rank: expected 1 to {smallest}, the width of the narrowest map, got {rank!r}")
    if not alpha > 0:
        raise ValueError(f"lora_alpha: expected a number above 0, got {alpha!r}")
    if any(parametrize.is_parametrized(module) for module, _ in weights):
        raise ValueError("encoder: expected plain weights, got a model with LoRA: merge it first with merge_lora_")
    encoder.requires_grad_(False)
    for module, name in weights:
        low_rank = LowRank(getattr(module, name), rank, alpha)
        parametrize.register_parametrization(module, name, low_rank)


@torch.no_grad()
def merge_lora_(encoder: VisionTransformer) -> None:
    """Replace adapted weights by plain ones; the encoder's output stays the same up to rounding."""
    for module, name in _adapted(encoder):
        if parametrize.is_parametrized(module, name):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _adapted(encoder: VisionTransformer) -> Iterator[tuple[nn.Module, str]]:
    """The module and the name of each weight that LoRA adapts."""
    for block in encoder.blocks:
        yield block.attn.qkv, "weight"
        yield block.attn.proj, "weight"
        if block.dex is not None and block.dex.path == "experts":
            yield block.dex.experts, "fc1_weight"
            yield block.dex.experts, "fc2_weight"
        else:
            mlp = block.mlp if block.dex is None else block.dex.director
            yield mlp.fc1, "weight"
            yield mlp.fc2, "weight"
