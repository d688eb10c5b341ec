"""The balance loss over a whole batch: of all ranks and micro-batches, not of the images that are computed at once.

Letters: B images of the batch, b those that are computed at once, N tokens, D width, E experts, L layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dexkernels import DEXLayer
from dexkernels.ops.route import Noise, router_rows, scaled_noise


def probabilities(
    layer: DEXLayer, x: Tensor, noise_std: float | Tensor = 0.0, router_noise: Tensor | None = None
) -> Tensor:
    """``p = softmax((W r + noise) / T)`` of all experts, float32 ``[b, E]``, as the layer's router has them.

    `DEXLayer` itself hands out the chosen gates alone; this computes ``b x E`` logits once more, in plain torch, and is
    differentiable in x and the router's weights. Outside of autocast, as the router is.

    Args:
        x: the layer's input ``[b, N, D]``.
        noise_std, router_noise: what the layer is given; without effect in evaluation, as there.
    """
    with torch.autocast(x.device.type, enabled=False):
        noise = Noise(noise_std if layer.training else 0.0, router_noise, layer.usage_ema)
        added = scaled_noise(x, layer.num_experts, "image", noise)
        logits = router_rows(x, "image", layer.route_from).float() @ layer.router_weight.float().T
        return torch.softmax((logits if added is None else logits + added.float()) / layer.temperature, -1)


def mean_probabilities(of_parts: Sequence[Sequence[Tensor]], images: int) -> list[Tensor]:
    """``P_e = sum_b p_be / B`` of each layer, float64 ``[E_l]``, without a gradient.

    of_parts: for every part of the batch that this rank computes ``[b, E_l]`` of each layer. images: B / ranks, so that
    the mean of all ranks' results is the batch's.
    """
    layers = zip(*of_parts, strict=True)
    return [sum(p.detach().double().sum(0) for p in layer) / images for layer in layers]


def batch_balance(of_part: Sequence[Tensor], means: Sequence[Tensor], depth: int) -> Tensor:
    """``1/L sum_l E_l sum_e mean_b(p_be) * P_e``, 0-dim: what a part of the batch adds to the loss.

    The loss of the batch is ``1/L sum_l E_l sum_e P_e * stop_grad(P_e)``, ``P_e = sum_b p_be / B`` over all B images of
    all ranks and micro-batches: one `DEXLayer` computes the same over the images that it sees at once. Its gradient,
    with one factor held as published, is

        ``d loss / d p_be = E_l P_e / (L B)``,

    half of the whole derivative. Averaged over equal parts and ranks, as gradients are, the parts' losses have exactly
    this gradient, since P is a constant in each.

    Args:
        of_part: per layer ``[b, E_l]``, with a gradient. means: P of each layer. depth: L.
    """
    total = of_part[0].new_zeros(())
    for p, mean in zip(of_part, means, strict=True):
        total = total + p.shape[1] * (p.mean(0) * mean.to(p.dtype)).sum()
    return total / depth
