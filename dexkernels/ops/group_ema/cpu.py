"""`group_ema_` in plain torch: chunk by chunk on the host, and on a device without reading values on the host."""

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Elements of a director updated at a time, so that they stay in cache while every expert is added to them.

16 MB of float32: the fastest of 2**17 to 2**23 with a last-level cache of 32 MB; a smaller cache may need less."""


@torch.no_grad()
def group_ema_(
    directors: list[Tensor],
    experts: list[Tensor],
    group_weights: list[Tensor],
    momentum: float | Tensor,
    skip: Tensor | None = None,
) -> None:
    """``director <- m * director + (1 - m) * sum_e a_e * experts[e]``, in place, for each ``(director, experts, a)``.

    An expert of weight exactly 0 contributes nothing, whatever it holds. If all weights are 0, or ``skip`` is true,
    the director does not change.
    """
    for director, stacked, weights in zip(directors, experts, group_weights, strict=True):
        if director.device.type == "cpu":
            if skip is not None and bool(skip):
                return
            _on_host_(director, stacked, weights.tolist(), float(momentum))
        else:
            on_device_(director, stacked, weights, momentum, skip)


def _on_host_(director: Tensor, stacked: Tensor, weights: list[float], m: float) -> None:
    scale = [(1 - m) * a for a in weights]
    used = [e for e, s in enumerate(scale) if s != 0]
    if not any(weights):
        return
    if not (director.is_contiguous() and stacked.is_contiguous()):
        director.mul_(m)
        for e in used:
            director.add_(stacked[e], alpha=scale[e])
        return
    flat, sources = director.view(-1), stacked.view(len(weights), -1)
    for start in range(0, flat.numel(), CHUNK):
        chunk = flat[start : start + CHUNK].mul_(m)
        for e in used:
            chunk.add_(sources[e, start : start + CHUNK], alpha=scale[e])


def on_device_(
    director: Tensor, stacked: Tensor, weights: Tensor, momentum: float | Tensor, skip: Tensor | None
) -> None:
    """The same without reading a value on the host, so the host never waits for a GPU."""
    still = (weights == 0).all()
    if skip is not None:
        still = still | skip
    m = torch.as_tensor(momentum, dtype=torch.float64, device=director.device)
    scale = ((1 - m) * weights).to(director.dtype)
    new = m.to(director.dtype) * director
    for e in range(stacked.shape[0]):
        new += torch.where(scale[e] != 0, scale[e] * stacked[e], 0.0)
    director.copy_(torch.where(still, director, new))
