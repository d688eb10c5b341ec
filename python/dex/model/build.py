"""Build the model of a configuration."""

import math

import torch
from torch import nn

from dex.config import Config
from dex.model.mae import MaskedAutoencoder


def build_model(config: Config) -> MaskedAutoencoder:
    """A randomly initialised model of ``config``."""
    m = config.model
    model = MaskedAutoencoder(
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
        in_chans=m.in_chans,
        backend=m.backend,
        align=m.align,
        route_from=m.route_from,
        temperature=m.temperature,
        usage_momentum=m.usage_momentum,
    )
    init_routers_(model, config)
    return model


@torch.no_grad()
def init_routers_(model: MaskedAutoencoder, config: Config) -> None:
    """Initialise the routers again for ``model.router_init`` linear; ``reset_parameters`` already does xavier."""
    if config.model.router_init == "linear":
        for layer in model.encoder.dex_layers:
            nn.init.kaiming_uniform_(layer.router_weight, a=math.sqrt(5))  # As in torch.nn.Linear: at most 1 / sqrt(D)
