"""Which experts images take, seen from outside of a model, and forwards in which they take others.

Shape letters: B images, N tokens, K chosen, E experts, L layers, S image side, P patches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dex.model import MaskedAutoencoder
from dex.model.balance import probabilities
from dexkernels import DEXLayer, Routing, grouped_mlp
from dexkernels.routing import sort_slots


class Routes(NamedTuple):
    """Of B images in each of L layers, without exploration noise."""

    gates: list[Tensor]
    """Per layer float ``[B, K_l]``, each row sums to 1."""
    experts: list[Tensor]
    """Per layer int32 ``[B, K_l]``, by descending probability."""
    probabilities: list[Tensor]
    """Per layer float32 ``[B, E_l]``: the router's softmax over all experts."""

    def of(self, images: Tensor) -> Routes:
        """Those of some images: ``images [b]``, int64 or a bool mask ``[B]``."""
        return Routes(*([t[images] for t in column] for column in self))


class Masked(NamedTuple):
    """What a masked autoencoder makes of images."""

    loss: Tensor
    """float ``[B]``: mean squared error over the removed patches of each image."""
    routes: Routes
    cls: Tensor
    """``[B, D]``: the CLS token of the last layer, after the norm."""


class Override(NamedTuple):
    """A route in one layer that images are given instead of their own."""

    gates: Tensor
    """``[B, K]``; any K up to E."""
    experts: Tensor
    """Integers ``[B, K]``, distinct within a row."""


@torch.no_grad()
def masked_forward(
    model: MaskedAutoencoder,
    images: Tensor,
    mask_noise: Tensor,
    *,
    mask_ratio: float = 0.75,
    overrides: Sequence[Override | None] | None = None,
    batch_size: int = 64,
) -> Masked:
    """Losses, routes and CLS tokens of ``images`` in evaluation, with the same masks whatever the batch.

    Args:
        images: ``[B, C, S, S]`` as `dex.data.center` gives them, where the model is.
        mask_noise: ``[B, P]``; see `MaskedAutoencoder.forward`.
        mask_ratio: share of patches that is removed; 0: whole images, whose loss is 0.
        overrides: per layer a route in the place of the router's; None leaves a layer its own. The routes that are
            returned are still the routers', of what they are given then.

    The model's mode is kept. ValueError: as many overrides as layers are expected.
    """
    layers = model.encoder.dex_layers
    if overrides is not None and len(overrides) != len(layers):
        raise ValueError(f"overrides: expected one per layer ({len(layers)}), got {len(overrides)}")
    losses, parts, tokens = [], [], []
    with _evaluating(model):
        for begin in range(0, len(images), batch_size):
            part = slice(begin, begin + batch_size)
            given = [o and Override(o.gates[part], o.experts[part]) for o in overrides or [None] * len(layers)]
            with watched(layers, given) as seen:
                out = model(images[part], mask_ratio=mask_ratio, mask_noise=mask_noise[part])
            losses.append(out.image_loss.float())
            tokens.append(out.cls.float())
            parts.append(Routes(out.gates, out.expert_indices, seen))
    joined = [[torch.cat(of_layer) for of_layer in zip(*column, strict=True)] for column in zip(*parts, strict=True)]
    return Masked(torch.cat(losses), Routes(*joined), torch.cat(tokens))


def all_probabilities(layer: DEXLayer, x: Tensor) -> Tensor:
    """``softmax(W r / T)``, float32 ``[B, E]``, of all experts and without noise; ``r`` is token 0 or the mean token of
    ``x [B, N, D]``, as the layer routes."""
    return probabilities(layer, x)


def sets_of(experts: Tensor) -> Tensor:
    """int64 ``[B]``: a number for each row's set of experts, ``experts [B, K]``; equal sets, in whatever order, equal
    numbers."""
    ordered = experts.long().sort(1).values
    return ordered.unique(dim=0, return_inverse=True)[1]


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def watched(layers: Sequence[DEXLayer], overrides: Sequence[Override | None]) -> Iterator[list[Tensor]]:
    """Inside, forwards append each layer's probabilities ``[B, E]`` and follow the overrides."""
    seen: list[Tensor] = []

    def watch(override: Override | None):
        def hook(layer: DEXLayer, arguments: tuple, output):
            x = arguments[0]
            seen.append(all_probabilities(layer, x))
            if override is None:
                return output
            y = with_route(layer, x, override)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    handles = [layer.register_forward_hook(watch(o)) for layer, o in zip(layers, overrides, strict=True)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def with_route(layer: DEXLayer, x: Tensor, route: Override) -> Tensor:
    """What the layer's experts make of ``x [B, N, D]`` by ``route``: ``sum_k gates[b, k] * expert_k(x[b])``."""
    gates = route.gates.to(device=x.device, dtype=torch.float32 if x.dtype != torch.float64 else x.dtype)
    experts = route.experts.to(device=x.device, dtype=torch.int32).contiguous()
    mass = gates.new_zeros(layer.num_experts).index_add_(0, experts.flatten().long(), gates.flatten())
    routing = Routing(gates.contiguous(), experts, gates.new_zeros(()), mass, *sort_slots(experts, layer.num_experts))
    return grouped_mlp(x, routing, *layer.experts.weights, backend=layer.backend)
