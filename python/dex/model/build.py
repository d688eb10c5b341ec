"""The model that a configuration describes."""

from dex.config import Config
from dex.model.mae import MaskedAutoencoder


def build_model(config: Config) -> MaskedAutoencoder:
    m = config.model
    return MaskedAutoencoder(
        m.img_size,
        m.patch_size,
        m.embed_dim,
        m.depth,
        m.num_heads,
        m.num_experts,
        m.top_k,
        m.decoder_embed_dim,
        m.decoder_depth,
        m.decoder_num_heads,
        mlp_ratio=m.mlp_ratio,
        norm_pix_loss=m.norm_pix_loss,
        backend=m.backend,
        align=m.align,
    )
