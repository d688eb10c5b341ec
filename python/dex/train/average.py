"""The exponential moving average of the weights, sharded over the ranks like the weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

PREFIX = "ema."
"""Prefix of the averages' names in a checkpoint."""


class WeightAverage:
    """Average of all weights, including directors, updated in every good step:
    ``average <- momentum * average + (1 - momentum) * weight``.

    It starts as the weights and does not include buffers. All updates are in place and never wait for the device, so a
    CUDA graph can replay ``update``.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, momentum: float):
        """model: on its device, after DDP or FSDP."""
        self._model, self._momentum = model, momentum
        self._weights = {name: p.detach() for name, p in model.named_parameters()}
        self._averages = {name: p.clone() for name, p in self._weights.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The averages by their names in a checkpoint, not copied."""
        return {f"{PREFIX}{name}": average for name, average in self._averages.items()}

    @torch.no_grad()
    def update(self, good: Tensor) -> None:
        """Update the averages after the optimizer's step. good: 0-dim bool; False changes nothing."""
        share = good.float() * (1.0 - self._momentum)
        for name, average in self._averages.items():
            _local(average).lerp_(_local(self._weights[name]), share)

    @torch.no_grad()
    def start(self) -> None:
        """Set the averages to the current weights."""
        for name, average in self._averages.items():
            average.copy_(self._weights[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the averages into the model for the block, then restore its weights bit-for-bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self._averages.items():
            weight = _local(self._weights[name])
            kept = weight.clone()
            weight.copy_(_local(average))
            _local(average).copy_(kept)
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # Its gathered weights are out of date


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
