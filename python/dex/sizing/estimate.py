"""What a configured run will need, before it starts: parameters, operations, memory, checkpoint size, days.

Operations count a multiplication and an addition as two. Letters: D width, H hidden, N tokens, K chosen, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dex.common.shapes import height_width
from dex.common.units import duration, format_bytes
from dex.config import Config, per_layer
from dex.model import MaskedAutoencoder
from dex.model.build import build_model


class Gpu(NamedTuple):
    """Makers' figures: dense bf16 operations per second, bytes of memory."""

    name: str
    bf16_flops: float
    memory: float


GPUS = (Gpu("A100 80 GB", 312e12, 80e9), Gpu("H100 SXM", 989e12, 80e9), Gpu("H200 SXM", 989e12, 141e9))
PEAKS = (("H100 PCIe", 756e12), ("H100", 989e12), ("H200", 989e12), ("A100", 312e12))
"""Words in a device's name, and its makers' figure for dense bf16; the first that fits."""
ASSUMED_MFU = 0.4
"""Share of the peak that days are computed with: an assumption, not a measurement."""


@dataclass(frozen=True)
class Estimate:
    """parameters: numbers by kind (experts, directors, router, rest); trained: those that take a gradient.

    flops: per image and training step by part, backward included. memory: bytes on one device that holds everything, by
    kind; activations: bytes that backward keeps for one image, the autograd graph's own count with plain-torch
    operators; with ``parallel.checkpointing`` those that are kept, and one block's as it is recomputed. checkpoint:
    bytes of one. images: of the whole run.
    """

    parameters: dict[str, int]
    trained: int
    flops: dict[str, int]
    memory: dict[str, int]
    activations: int
    checkpoint: int
    images: int

    @property
    def flops_per_image(self) -> int:
        return sum(self.flops.values())

    def days(self, gpu: Gpu, count: int, mfu: float = ASSUMED_MFU) -> float:
        """Days of computation on ``count`` devices at share ``mfu`` of their peak, communication not counted."""
        return self.images * self.flops_per_image / (gpu.bf16_flops * mfu * count) / 86400


def estimate(config: Config, steps: int) -> Estimate:
    """Estimate ``config``'s run of ``steps`` steps; nothing of the size of the model is allocated."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(config).train()
        activations = saved_bytes(model, config)
        if config.parallel.checkpointing:
            model.encoder.checkpointing = True
            kept = saved_bytes(model, config)
            activations = kept + (activations - kept) // config.model.depth
    parameters = {"experts": 0, "directors": 0, "router": 0, "rest": 0}
    trained = 0
    for name, p in model.named_parameters():
        parameters[_kind(name)] += p.numel()
        trained += p.numel() if p.requires_grad else 0
    everything = sum(parameters.values())
    buffers = sum(b.numel() for b in model.buffers())
    half = config.run.precision != "fp32"
    averages = 0 if config.optim.ema is None else 4 * everything
    return Estimate(
        parameters=parameters,
        trained=trained,
        flops=training_flops(config),
        memory={
            "weights": 4 * (everything + buffers),
            "gradients": 4 * trained,
            "moments": 8 * trained,
            **({"averages": averages} if averages else {}),
            "bf16 copies": 2 * everything if half else 0,
        },
        activations=activations,
        checkpoint=4 * (everything + buffers) + 8 * trained + averages,
        images=steps * config.data.batch_size,
    )


def saved_bytes(model: MaskedAutoencoder, config: Config) -> int:
    """Bytes per image that the forward pass leaves for backward, weights and their casts not counted."""
    m, half = config.model, config.run.precision != "fp32"

    def total(batch: int) -> int:
        kept: dict[int, tuple[torch.UntypedStorage, int]] = {}  # the storage is held, or its address could be reused

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            kept[storage._cdata] = (storage, storage.nbytes())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                images = torch.randn(batch, m.in_chans, *height_width(m.img_size))
                model(images, mask_ratio=m.mask_ratio, noise_std=0.1)
        return sum(size for _, size in kept.values())

    # Weights are kept too, but once whatever the batch, so the difference of two batches is free of them.
    return (total(6) - total(2)) // 4


def training_flops(config: Config) -> dict[str, int]:
    """Operations of one image in one training step by part: matrix products only; backward costs twice the forward.

    The director has no backward. Monolithic layers count as experts. recomputation: the encoder's blocks once more,
    with ``parallel.checkpointing``; torch leaves out the products after the last one that backward needs.
    """
    m = config.model
    patches = math.prod(side // m.patch_size for side in height_width(m.img_size))
    kept = int(patches * (1 - m.mask_ratio))
    pixels = m.in_chans * m.patch_size**2
    tokens, hidden = 1 + kept, int(m.embed_dim * m.mlp_ratio)
    decoder_hidden = int(m.decoder_embed_dim * m.mlp_ratio)
    mlp = 4 * tokens * m.embed_dim * hidden
    sparse = [e for e in per_layer(m.num_experts, m.depth) if e]
    router = sum(2 * m.embed_dim * e for e in sparse)
    decoder = m.decoder_depth * (
        _attention(1 + patches, m.decoder_embed_dim) + 4 * (1 + patches) * m.decoder_embed_dim * decoder_hidden
    )
    decoder += 2 * tokens * m.embed_dim * m.decoder_embed_dim + 2 * (1 + patches) * m.decoder_embed_dim * pixels
    forward = {
        "experts": sum(k * mlp for k in per_layer(m.top_k, m.depth)),
        "attention": m.depth * _attention(tokens, m.embed_dim),
        "router": router,
    }
    directors = len(sparse) * mlp
    return {
        "experts": 3 * forward["experts"],
        "directors": directors,
        "attention": 3 * forward["attention"],
        "router": 3 * forward["router"],
        # The images themselves take no gradient.
        "patch embedding": 2 * 2 * kept * pixels * m.embed_dim,
        "decoder": 3 * decoder,
        "recomputation": sum(forward.values()) + directors if config.parallel.checkpointing else 0,
    }


def mfu(config: Config, images_per_s: float, device: str, devices: int) -> float | None:
    """Share of the devices' peak that the step's matrix products reach; None for a device whose peak is not known.

    Recomputation does not count: it gets a step no further.
    """
    peak = next((flops for word, flops in PEAKS if word in device), None)
    parts = training_flops(config)
    return None if peak is None else images_per_s * (sum(parts.values()) - parts["recomputation"]) / (peak * devices)


def describe(result: Estimate) -> list[str]:
    """A few lines for people; `dex.sizing.scaling.describe` has those about memory on several ranks."""
    total = sum(result.parameters.values())
    lines = [
        f"parameters: {total:,}; " + ", ".join(f"{k} {n:,}" for k, n in result.parameters.items() if n),
        f"operations per image and step: {result.flops_per_image / 1e9:,.1f} GFLOP; "
        + ", ".join(f"{k} {n / result.flops_per_image:.0%}" for k, n in result.flops.items() if n),
        "memory of one device: "
        + ", ".join(f"{k} {format_bytes(n)}" for k, n in result.memory.items() if n)
        + f"; activations {format_bytes(result.activations)} an image",
        f"a checkpoint: {format_bytes(result.checkpoint)}",
    ]
    for gpu in GPUS:
        times = ", ".join(f"{duration(86400 * result.days(gpu, n))} on {n}" for n in (1, 8, 64))
        lines.append(f"time at {ASSUMED_MFU:.0%} of the peak (assumed, not measured), {gpu.name}: {times}")
    return lines


def _attention(tokens: int, width: int) -> int:
    return 2 * tokens * width * 4 * width + 4 * tokens * tokens * width


def _kind(name: str) -> str:
    if ".director." in name:
        return "directors"
    if ".experts." in name:
        return "experts"
    return "router" if name.endswith("router_weight") else "rest"
