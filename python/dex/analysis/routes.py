"""Routes of images through a model's experts, and forwards with other routes.

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
    """Routes of B images in each of L layers, without exploration noise."""

    gates: list[Tensor]
    """Per layer float ``[B, K_l]``, each row sums to 1."""
    experts: list[Tensor]
    """Per layer int32 ``[B, K_l]``, by descending probability."""
    probabilities: list[Tensor]
    """Per layer float32 ``[B, E_l]``: the router's softmax over all experts."""

    def of(self, images: Tensor) -> Routes:
        """Routes of some images: int64 indices ``[b]`` or a bool mask ``[B]``."""
        return Routes(*([t[images] for t in field] for field in self))


class Masked(NamedTuple):
    """Results of a masked autoencoder for B images."""

    loss: Tensor
    """float ``[B]``: mean squared error over the removed patches of each image."""
    routes: Routes
    cls: Tensor
    """``[B, D]``: the CLS token of the last layer, after the norm."""


class Override(NamedTuple):
    """A route in one layer that replaces the router's choice."""

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
    """Losses, routes and CLS tokens of ``images`` in evaluation mode; masks do not depend on the batch.

    Args:
        images: ``[B, C, S, S]`` from ``dex.data.center``, on the model's device.
        mask_noise: ``[B, P]``; see ``MaskedAutoencoder.forward``.
        mask_ratio: share of patches that is removed; 0 keeps whole images, whose loss is 0.
        overrides: per layer a route that replaces the router's, or None. The returned routes are always those of the
            routers, for the inputs that they then get.

    The model's mode is restored. ValueError: there is not one override per layer.
    """
    layers = model.encoder.dex_layers
    if overrides is not None and len(overrides) != len(layers):
        raise ValueError(f"overrides: expected one per layer ({len(layers)}), got {len(overrides)}")
    losses, parts, tokens = [], [], []
    with evaluating(model):
        for begin in range(0, len(images), batch_size):
            part = slice(begin, begin + batch_size)
            routes = [o and Override(o.gates[part], o.experts[part]) for o in overrides or [None] * len(layers)]
            with watched(layers, routes) as seen:
                out = model(images[part], mask_ratio=mask_ratio, mask_noise=mask_noise[part])
            losses.append(out.image_loss.float())
            tokens.append(out.cls.float())
            parts.append(Routes(out.gates, out.expert_indices, seen))
    joined = [[torch.cat(layer) for layer in zip(*field, strict=True)] for field in zip(*parts, strict=True)]
    return Masked(torch.cat(losses), Routes(*joined), torch.cat(tokens))


def sets_of(experts: Tensor) -> Tensor:
    """int64 ``[B]``: a number for the expert set in each row of ``experts [B, K]``, the same for equal sets in any
    order."""
    ordered = experts.long().sort(1).values
    return ordered.unique(dim=0, return_inverse=True)[1]


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode for the block, and restore its mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def watched(layers: Sequence[DEXLayer], overrides: Sequence[Override | None]) -> Iterator[list[Tensor]]:
    """In the block, forwards append each layer's probabilities ``[B, E]`` to the list and use the overrides."""
    seen: list[Tensor] = []

    def watch(override: Override | None):
        def hook(layer: DEXLayer, arguments: tuple, output):
            x = arguments[0]
            seen.append(probabilities(layer, x))
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
    """Output of the layer for ``x [B, N, D]`` with ``route``: ``sum_k gates[b, k] * expert_k(x[b])``."""
    gates = route.gates.to(device=x.device, dtype=torch.float32 if x.dtype != torch.float64 else x.dtype)
    experts = route.experts.to(device=x.device, dtype=torch.int32).contiguous()
    mass = gates.new_zeros(layer.num_experts).index_add_(0, experts.flatten().long(), gates.flatten())
    routing = Routing(gates.contiguous(), experts, gates.new_zeros(()), mass, *sort_slots(experts, layer.num_experts))
    return grouped_mlp(x, routing, *layer.experts.weights, backend=layer.backend)
