"""Estimates for a configuration before the run starts: parameters, operations, memory, checkpoint size, days.

A multiplication and an addition count as two operations. Letters: D width, H hidden, N tokens, K chosen, L layers.
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
    """A GPU with its manufacturer's figures."""

    name: str
    bf16_flops: float
    """Dense bf16 operations per second."""
    memory: float
    """Bytes."""


GPUS = (Gpu("A100 80 GB", 312e12, 80e9), Gpu("H100 SXM", 989e12, 80e9), Gpu("H200 SXM", 989e12, 141e9))
PEAKS = (("H100 PCIe", 756e12), ("H100", 989e12), ("H200", 989e12), ("A100", 312e12))
"""Parts of device names and the manufacturer's figure for dense bf16; the first match counts."""
ASSUMED_MFU = 0.4
"""Share of the peak for computing days; an assumption, not a measurement."""


@dataclass(frozen=True)
class Estimate:
    """Estimates for a run."""

    parameters: dict[str, int]
    """Number of parameters by kind: experts, directors, router, rest."""
    trained: int
    """Number of parameters with a gradient."""
    flops: dict[str, int]
    """Operations per image and training step by part, including backward."""
    memory: dict[str, int]
    """Bytes by kind on a device with the whole model."""
    activations: int
    """Bytes per image kept for backward, as counted by autograd with plain-torch operators; with
    ``parallel.checkpointing`` those that are kept, plus those of one recomputed block."""
    checkpoint: int
    """Bytes of a checkpoint."""
    images: int
    """Images of the whole run."""

    @property
    def flops_per_image(self) -> int:
        """Operations per image and training step."""
        return sum(self.flops.values())

    def days(self, gpu: Gpu, count: int, mfu: float = ASSUMED_MFU) -> float:
        """Days of computation on ``count`` devices at share ``mfu`` of their peak, without communication."""
        return self.images * self.flops_per_image / (gpu.bf16_flops * mfu * count) / 86400


def estimate(config: Config, steps: int) -> Estimate:
    """Estimate a run of ``steps`` steps with ``config``, without allocating memory for the model."""
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
    total = sum(parameters.values())
    buffers = sum(b.numel() for b in model.buffers())
    half = config.run.precision != "fp32"
    averages = 0 if config.optim.ema is None else 4 * total
    return Estimate(
        parameters=parameters,
        trained=trained,
        flops=training_flops(config),
        memory={
            "weights": 4 * (total + buffers),
            "gradients": 4 * trained,
            "moments": 8 * trained,
            **({"averages": averages} if averages else {}),
            "bf16 copies": 2 * total if half else 0,
        },
        activations=activations,
        checkpoint=4 * (total + buffers) + 8 * trained + averages,
        images=steps * config.data.batch_size,
    )


def saved_bytes(model: MaskedAutoencoder, config: Config) -> int:
    """Bytes per image that the forward pass saves for backward, without weights and their casts."""
    m, half = config.model, config.run.precision != "fp32"

    def total(batch: int) -> int:
        # Storages are kept alive, or their addresses could be reused.
        saved: dict[int, tuple[torch.UntypedStorage, int]] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            saved[storage._cdata] = (storage, storage.nbytes())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                images = torch.randn(batch, m.in_chans, *height_width(m.img_size))
                model(images, mask_ratio=m.mask_ratio, noise_std=0.1)
        return sum(size for _, size in saved.values())

    # Weights are saved too, but only once per batch, so they cancel in the difference of two batches.
    return (total(6) - total(2)) // 4


def training_flops(config: Config) -> dict[str, int]:
    """Matrix-product operations of one image in one training step by part; backward costs twice the forward.

    The director has no backward. Monolithic layers count as experts. recomputation: another forward of the encoder's
    blocks with ``parallel.checkpointing``; torch skips the products after the last one that backward needs.
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
        # The images have no gradient.
        "patch embedding": 2 * 2 * kept * pixels * m.embed_dim,
        "decoder": 3 * decoder,
        "recomputation": sum(forward.values()) + directors if config.parallel.checkpointing else 0,
    }


def mfu(config: Config, images_per_s: float, device: str, devices: int) -> float | None:
    """Share of the devices' peak that the step's matrix products reach, without recomputation; None if the peak is not
    known.
    """
    peak = next((flops for word, flops in PEAKS if word in device), None)
    parts = training_flops(config)
    return None if peak is None else images_per_s * (sum(parts.values()) - parts["recomputation"]) / (peak * devices)


def describe(result: Estimate) -> list[str]:
    """The estimate in a few lines; ``dex.sizing.scaling.describe`` adds memory on several ranks."""
    total = sum(result.parameters.values())
    lines = [
        f"parameters: {total:,}; " + ", ".join(f"{k} {n:,}" for k, n in result.parameters.items() if n),
        f"operations per image and step: {result.flops_per_image / 1e9:,.1f} GFLOP; "
        + ", ".join(f"{k} {n / result.flops_per_image:.0%}" for k, n in result.flops.items() if n),
        "memory of one device: "
        + ", ".join(f"{k} {format_bytes(n)}" for k, n in result.memory.items() if n)
        + f"; activations {format_bytes(result.activations)} per image",
        f"checkpoint: {format_bytes(result.checkpoint)}",
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
