"""The balance loss over a whole batch, across ranks and micro-batches, instead of the images computed at once.

Letters: B images of the batch, b images computed at once, N tokens, D width, E experts, L layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dexkernels import DEXLayer
from dexkernels.ops.route import Noise, router_rows, scaled_noise


def probabilities(
    layer: DEXLayer, x: Tensor, noise_std: float | Tensor = 0.0, router_noise: Tensor | None = None
) -> Tensor:
    """Router probabilities of all experts, ``p = softmax((W r + noise) / T)``, float32 ``[b, E]``.

    ``DEXLayer`` returns only the chosen gates. This computes the ``b x E`` logits again in plain torch, differentiable
    in x and the router's weights, and like the router outside of autocast.

    Args:
        x: the layer's input ``[b, N, D]``.
        noise_std, router_noise: as given to the layer; like there without effect in evaluation.
    """
    with torch.autocast(x.device.type, enabled=False):
        noise = Noise(noise_std if layer.training else 0.0, router_noise, layer.usage_ema)
        exploration = scaled_noise(x, layer.num_experts, "image", noise)
        logits = router_rows(x, "image", layer.route_from).float() @ layer.router_weight.float().T
        return torch.softmax((logits if exploration is None else logits + exploration.float()) / layer.temperature, -1)


def mean_probabilities(of_parts: Sequence[Sequence[Tensor]], images: int) -> list[Tensor]:
    """``P_e = sum_b p_be / B`` of each layer, float64 ``[E_l]``, without a gradient.

    of_parts: ``[b, E_l]`` of each layer, for every part of the batch that this rank computes. images: B / ranks, so
    that the mean over ranks is the mean of the batch.
    """
    layers = zip(*of_parts, strict=True)
    return [sum(p.detach().double().sum(0) for p in layer) / images for layer in layers]


def batch_balance(of_part: Sequence[Tensor], means: Sequence[Tensor], depth: int) -> Tensor:
    """Balance loss of a part of the batch, ``1/L sum_l E_l sum_e mean_b(p_be) * P_e``, 0-dim.

    The loss of the batch is ``1/L sum_l E_l sum_e P_e * stop_grad(P_e)`` with ``P_e = sum_b p_be / B`` over all B
    images of all ranks and micro-batches; ``DEXLayer`` computes the same over the images it gets at once. Its gradient,
    with one factor constant as published, is

        ``d loss / d p_be = E_l P_e / (L B)``,

    half of the full derivative. Averaged over equal parts and ranks, as gradients are, the losses of the parts have
    exactly this gradient, since P is a constant in each.

    Args:
        of_part: per layer ``[b, E_l]``, with a gradient. means: P of each layer. depth: L.
    """
    total = of_part[0].new_zeros(())
    for p, mean in zip(of_part, means, strict=True):
        total = total + p.shape[1] * (p.mean(0) * mean.to(p.dtype)).sum()
    return total / depth
