"""`mask_tokens`: marks padding for the DEX layers in a model whose blocks only see ``y = mlp(x)``."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import checks
from .layer import DEXLayer


@contextlib.contextmanager
def mask_tokens(model: nn.Module, token_mask: Tensor) -> Iterator[None]:
    """In the ``with`` block every DEX layer of ``model`` uses ``token_mask``, see `DEXLayer.forward`.

        with dexkernels.mask_tokens(model, mask), dexkernels.collect_aux(model) as aux:
            y = model(x)

    With activation checkpointing, run backward inside the block too, as recomputation needs the mask.

    Args:
        model: any module that contains DEX layers. If stages see different tokens, pass one stage.
        token_mask: bool ``[B, N]``, true for real tokens, including the CLS token; ``[B, H, W]`` for maps.

    Raises: ValueError naming the argument; the shape is checked by the layers.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(token_mask, Tensor) or token_mask.dtype != torch.bool:
        raise ValueError(f"token_mask: expected torch.bool, true for real tokens, got {checks.describe(token_mask)}")
    layers = [module for module in model.modules() if isinstance(module, DEXLayer)]
    if not layers:
        raise ValueError("model: expected at least one DEXLayer in it, got none (see upcycle_)")
    before = [layer.token_mask for layer in layers]
    for layer in layers:
        layer.token_mask = token_mask
    try:
        yield
    finally:
        for layer, mask in zip(layers, before, strict=True):
            layer.token_mask = mask
