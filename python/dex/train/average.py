"""The exponential moving average of a run's weights, beside them and cut over the ranks like them."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

PREFIX = "ema."
"""Of the averages' names in a checkpoint."""


class WeightAverage:
    """Of all weights, directors too: ``average <- momentum * average + (1 - momentum) * weight`` in every good step.

    It starts as the weights. Buffers are no part of it. Everything is changed in place, without a wait for the device,
    so a CUDA graph may replay `update`.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, momentum: float):
        """model: on its device and spread over the ranks."""
        self._model, self._momentum = model, momentum
        self._weights = {name: p.detach() for name, p in model.named_parameters()}
        self._averages = {name: p.clone() for name, p in self._weights.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The averages under their names in a checkpoint, not copied."""
        return {f"{PREFIX}{name}": average for name, average in self._averages.items()}

    @torch.no_grad()
    def update(self, good: Tensor) -> None:
        """After the optimizer's step. good: 0-dim bool; False changes nothing."""
        share = good.float() * (1.0 - self._momentum)
        for name, average in self._averages.items():
            _local(average).lerp_(_local(self._weights[name]), share)

    @torch.no_grad()
    def start(self) -> None:
        """Begin anew from the weights as they are."""
        for name, average in self._averages.items():
            average.copy_(self._weights[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block the model computes with the averages; after it with its weights, to the bit."""
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
                module.reshard()  # what it has gathered is of the weights before


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
