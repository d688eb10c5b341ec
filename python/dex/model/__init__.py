"""The DEX vision transformer, the masked autoencoder around it, and the loading of weights."""

from .mae import (
    Block,
    MAEOutput,
    MaskedAutoencoder,
    VisionTransformer,
    patchify,
    sincos_pos_embed,
    unpatchify,
    vit_base,
    vit_huge,
    vit_large,
)

__all__ = [
    "Block",
    "MAEOutput",
    "MaskedAutoencoder",
    "VisionTransformer",
    "patchify",
    "sincos_pos_embed",
    "unpatchify",
    "vit_base",
    "vit_huge",
    "vit_large",
]
