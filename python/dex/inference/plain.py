"""An encoder of plain torch operators with static shapes, for programs without dexkernels.

Letters: B images, N tokens, D width, H hidden, E experts, K chosen.
"""

import copy

from torch import Tensor, nn

from dex.model import VisionTransformer
from dexkernels import DEXLayer
from dexkernels.choices import RouteFrom
from dexkernels.ops.dense import ACTIVATIONS


def check_image_wise(layer: DEXLayer) -> None:
    """ValueError unless the layer routes whole images ``[B, N, D]``: its replacements support nothing else."""
    if layer.routing != "image" or layer.layout != "tokens" or layer.windows > 1:
        got = f"routing={layer.routing!r}, layout={layer.layout!r}, windows={layer.windows}"
        raise ValueError(f"layer: expected routing='image' of [B, N, D] in one window, got {got}")


class GatheredExperts(nn.Module):
    """The experts' path of a ``DEXLayer`` in evaluation mode: ``[B, N, D] -> [B, N, D]``.

    The weights of the K experts are gathered for every image, ``[B, K, H, D]``, so that no shape depends on the
    routing. This takes memory for 2 K H D numbers per image.
    """

    def __init__(self, layer: DEXLayer):
        super().__init__()
        check_image_wise(layer)
        experts = layer.experts
        self.router_weight: nn.Parameter = layer.router_weight
        self.fc1_weight: nn.Parameter = experts.fc1_weight
        self.fc1_bias: nn.Parameter = experts.fc1_bias
        self.fc2_weight: nn.Parameter = experts.fc2_weight
        self.fc2_bias: nn.Parameter = experts.fc2_bias
        self.top_k: int = layer.top_k
        self.temperature: float = layer.temperature
        self.route_from: RouteFrom = layer.route_from
        self.approximate: str = ACTIVATIONS[layer.activation]

    def forward(self, x: Tensor) -> Tensor:
        row = x.mean(1) if self.route_from == "mean" else x[:, 0]
        p = ((row @ self.router_weight.T) / self.temperature).softmax(-1)
        p, e = p.topk(self.top_k)
        gates = p / p.sum(-1, keepdim=True)
        h = x[:, None] @ self.fc1_weight[e].transpose(2, 3) + self.fc1_bias[e][:, :, None]
        y = (
            nn.functional.gelu(h, approximate=self.approximate) @ self.fc2_weight[e].transpose(2, 3)
            + self.fc2_bias[e][:, :, None]
        )
        return (gates[:, :, None, None] * y).sum(1)


def plain(encoder: VisionTransformer) -> VisionTransformer:
    """A copy of the encoder in evaluation mode, its DEX layers replaced by ``GatheredExperts``, or by their directors
    if that is their path. The copy shares its weights with ``encoder``, which does not change."""
    shared = {id(t): t for t in (*encoder.parameters(), *encoder.buffers())}
    result = copy.deepcopy(encoder, shared).eval()
    for block in result.blocks:
        if block.dex is not None:
            block.mlp = block.dex.director if block.dex.path == "director" else GatheredExperts(block.dex)
            block.dex = None
    return result
