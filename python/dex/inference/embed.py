"""Features that an encoder computes for images, batch by batch.

Shape letters: n images, B images of a batch, C channels, S image side, D width, K chosen experts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dex.common.shapes import height_width
from dex.data import center
from dex.inference.preprocess import Preprocessed, preprocess
from dex.model import VisionTransformer
from dexkernels import DEXLayer, route

PRECISIONS = ("fp32", "bf16")
Item = str | os.PathLike[str] | Preprocessed | np.ndarray | Tensor
Inputs = Item | Sequence[Item]


class Embedding(NamedTuple):
    """Features of n images, in float32 on the host."""

    cls: Tensor
    """``[n, D]``: the CLS token after the final norm."""
    patches: Tensor
    """``[n, D]``: the mean of the patch tokens after the final norm."""
    layers: dict[int, Tensor]
    """Block -> ``[n, D]``: the CLS token after that block, for the requested blocks."""
    gates: list[Tensor]
    """Per DEX layer ``[n, K]``; empty on the director's path and for a monolithic model."""
    expert_indices: list[Tensor]
    """Per DEX layer int32 ``[n, K]``, by descending gate."""


def items(inputs: Inputs) -> list[Item]:
    """The inputs as a list."""
    single = isinstance(inputs, str | os.PathLike | Preprocessed | np.ndarray | Tensor)
    return [inputs] if single else list(inputs)


def images_of(item: Any, modality: str | None = None) -> list[Tensor]:
    """Batches ``[B, C, H, W]`` of one input. ValueError, FileNotFoundError."""
    if isinstance(item, str | os.PathLike):
        item = preprocess(item, modality)
    images = item.images if isinstance(item, Preprocessed) else item
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
    expected = "inputs: expected paths, or images [H, W], [C, H, W] or [B, C, H, W] of one or three channels"
    if not isinstance(images, Tensor):
        raise ValueError(f"{expected}, got {type(item).__name__}")
    shape = list(images.shape)
    if images.ndim in (2, 3):
        images = images[None, None] if images.ndim == 2 else images[None]
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"{expected}, got {shape}")
    if images.dtype == torch.uint8:
        return [images]
    if not images.is_floating_point():
        raise ValueError(f"inputs: expected uint8, or floats within [0, 1], got {images.dtype}")
    if images.numel():
        low, high = (float(value) for value in torch.aminmax(images))
        if not (low >= 0 and high <= 1):  # NaN fails both comparisons
            raise ValueError(f"inputs: expected floats within [0, 1], got minimum {low}, maximum {high}")
    return [images]


@torch.no_grad()
def embed(
    encoder: VisionTransformer,
    images: Sequence[Tensor],
    *,
    layers: Sequence[int] = (),
    batch_size: int = 64,
    precision: str = "fp32",
) -> Embedding:
    """Features of all ``images``: tensors ``[B, C, H, W]`` of any sizes, in order, ``batch_size`` at a time."""
    layers = check_layers(encoder, layers)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a positive whole number, got {batch_size!r}")
    device = encoder.pos_embed.device
    parts = [features(encoder, batch, layers, precision) for batch in _batches(images, batch_size, encoder, device)]
    if not parts:
        empty = encoder.pos_embed.new_zeros(0, encoder.in_chans, *height_width(encoder.img_size))
        parts = [features(encoder, empty, layers, precision)]
    return joined(parts)


@torch.no_grad()
def features(
    encoder: VisionTransformer, images: Tensor, layers: Sequence[int] = (), precision: str = "fp32"
) -> Embedding:
    """Features of one batch ``images [B, C, H, W]``, as ``dex.data.center`` gives it, on the encoder's device."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    with _recorded(encoder, layers) as record:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            tokens = encoder(images)
    tokens = tokens.float()
    return Embedding(tokens[:, 0], tokens[:, 1:].mean(1), dict(record.layers), record.gates, record.expert_indices)


def joined(parts: Sequence[Embedding]) -> Embedding:
    """The batches concatenated, on the host."""

    def cat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors)).cpu()

    first = parts[0]
    return Embedding(
        cat([p.cls for p in parts]),
        cat([p.patches for p in parts]),
        {layer: cat([p.layers[layer] for p in parts]) for layer in first.layers},
        [cat([p.gates[i] for p in parts]) for i in range(len(first.gates))],
        [cat([p.expert_indices[i] for p in parts]) for i in range(len(first.expert_indices))],
    )


def check_layers(encoder: VisionTransformer, layers: Sequence[int]) -> tuple[int, ...]:
    """The layers, sorted and without duplicates. ValueError."""
    depth = len(encoder.blocks)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < depth:
            raise ValueError(f"layers: expected numbers of blocks, 0 to {depth - 1}, got {layer!r}")
    return tuple(sorted(set(layers)))


class _Record(NamedTuple):
    layers: dict[int, Tensor]
    gates: list[Tensor]
    expert_indices: list[Tensor]


@contextlib.contextmanager
def _recorded(encoder: VisionTransformer, layers: Sequence[int]) -> Iterator[_Record]:
    """Record chosen layers and the routing of one forward pass within the ``with`` block."""
    record = _Record({}, [], [])

    def keep(layer: int):
        def hook(block: nn.Module, inputs: tuple, output: tuple) -> None:
            record.layers[layer] = output[0][:, 0].float()

        return hook

    def routing(layer: DEXLayer, inputs: tuple) -> None:
        if layer.path == "experts":
            # Repeats the layer's decision, since `return_aux` would run the director too.
            how = {"routing": layer.routing, "route_from": layer.route_from, "temperature": layer.temperature}
            decision = route(inputs[0], layer.router_weight, layer.top_k, **how)
            record.gates.append(decision.gates.float())
            record.expert_indices.append(decision.expert_indices)

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(encoder.blocks[layer].register_forward_hook(keep(layer)).remove)
        for layer in encoder.dex_layers:
            hooks.callback(layer.register_forward_pre_hook(routing).remove)
        yield record


def _batches(
    images: Sequence[Tensor], batch_size: int, encoder: VisionTransformer, device: torch.device
) -> Iterator[Tensor]:
    """Normalised batches of ``batch_size`` images (the last may be smaller), across tensors of different sizes."""
    waiting: list[Tensor] = []
    count = 0
    for tensor in images:
        start = 0
        while start < len(tensor):
            part = tensor[start : start + batch_size - count]
            start, count = start + len(part), count + len(part)
            waiting.append(center(part.to(device), encoder.img_size, encoder.in_chans))
            if count == batch_size:
                yield torch.cat(waiting)
                waiting, count = [], 0
    if waiting:
        yield torch.cat(waiting)
