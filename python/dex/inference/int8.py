"""Experts with 8-bit weights, for inference on a CPU: a quarter of the memory, float32 activations.

Each output channel of a weight has its own scale, ``w ~ scale * q`` with ``q`` from -127 to 127, rounded to nearest, so
the error of an entry is at most half its channel's scale. Router, biases, attention and norms are not quantised.
Letters: B images, N tokens, D width, H hidden, E experts, K chosen.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dex.inference.plain import check_image_wise
from dex.model import VisionTransformer
from dexkernels import DEXLayer, route
from dexkernels.choices import RouteFrom
from dexkernels.ops.dense import ACTIVATIONS


class Int8Report(NamedTuple):
    """Result of ``quantize_``."""

    layers: int
    bytes_before: int
    """Size of the stacked weights of all experts."""
    bytes_after: int
    """The same after quantisation, scales included."""


class Int8Experts(nn.Module):
    """The experts' path of a ``DEXLayer`` in evaluation mode, with quantised weights and without gradient.

    Experts are widened to float32 one by one, for the images that chose them: an expert that no image chose costs
    nothing.
    """

    def __init__(self, layer: DEXLayer):
        super().__init__()
        experts = layer.experts
        check_image_wise(layer)
        self.top_k: int = layer.top_k
        self.temperature: float = layer.temperature
        self.route_from: RouteFrom = layer.route_from
        self.approximate: str = ACTIVATIONS[layer.activation]
        self.register_buffer("router_weight", layer.router_weight.detach())
        for name, weight, bias in (
            ("fc1", experts.fc1_weight, experts.fc1_bias),
            ("fc2", experts.fc2_weight, experts.fc2_bias),
        ):
            numbers, scales = quantize(weight.detach())
            self.register_buffer(f"{name}_weight", numbers)
            self.register_buffer(f"{name}_scale", scales)
            self.register_buffer(f"{name}_bias", bias.detach())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, D] -> [B, N, D]``."""
        decision = route(x, self.router_weight, self.top_k, route_from=self.route_from, temperature=self.temperature)
        out = torch.zeros_like(x)
        for expert in decision.expert_indices.unique().tolist():
            image, choice = (decision.expert_indices == expert).nonzero(as_tuple=True)
            h = F.gelu(self._linear("fc1", expert, x[image]), approximate=self.approximate)
            y = self._linear("fc2", expert, h)
            out.index_add_(0, image, decision.gates[image, choice].to(y.dtype)[:, None, None] * y)
        return out

    def _linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(self, f"{name}_weight")[expert].to(x.dtype)
        scale, bias = getattr(self, f"{name}_scale")[expert], getattr(self, f"{name}_bias")[expert]
        return F.linear(x, weight) * scale + bias


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise ``[E, out, in]`` to int8 ``[E, out, in]`` and scales ``[E, out]``."""
    scales = weight.abs().amax(-1) / 127
    numbers = (weight / torch.where(scales > 0, scales, 1.0)[..., None]).round().to(torch.int8)
    return numbers, scales


def quantize_(encoder: VisionTransformer) -> Int8Report:
    """Replace the DEX layers of ``encoder`` with ``Int8Experts``, for inference; their directors are removed.

    ValueError: the encoder has no experts, is on the director's path, or is not on the CPU.
    """
    layers = encoder.dex_layers
    if not layers or layers[0].path != "experts":
        raise ValueError("encoder: expected DEX layers that compute with their experts, got none")
    if encoder.pos_embed.device.type != "cpu":
        raise ValueError(f"encoder: expected it on the CPU, got {encoder.pos_embed.device}")
    before = after = 0
    for block in encoder.blocks:
        before += block.dex.experts.fc1_weight.nbytes + block.dex.experts.fc2_weight.nbytes
        block.mlp, block.dex = Int8Experts(block.dex), None
        quantised = ("fc1_weight", "fc1_scale", "fc2_weight", "fc2_scale")
        after += sum(getattr(block.mlp, name).nbytes for name in quantised)
    return Int8Report(len(layers), before, after)
