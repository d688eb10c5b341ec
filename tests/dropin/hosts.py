"""Hosts of DEX layers: small models of torch.nn, transformers and timm, with weights that look trained."""

import functools
import importlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

D, H, DEPTH = 16, 24, 3


def need(module: str):
    """The module, or a skip that says why it does not import."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # timm needs torchvision, whose failures have many types
        pytest.skip(f"{module} does not import: {type(error).__name__}: {error}")


class TimmMlp(nn.Module):
    """The structure of timm's Mlp, by its public names; stands in where timm does not import."""

    def __init__(self, dim=D, hidden_dim=H, act=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual and outer dropout."""

    def __init__(self, mlp):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.MultiheadAttention(D, 2, batch_first=True)
        self.mlp = mlp
        self.drop_path = nn.Dropout(0.1)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.drop_path(self.attn(h, h, h, need_weights=False)[0])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Intermediate(nn.Module):
    """As in transformers 4: the first map and the activation."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(D, H)
        self.intermediate_act_fn = nn.GELU()

    def forward(self, hidden_states):
        return self.intermediate_act_fn(self.dense(hidden_states))


class Output(nn.Module):
    """As in transformers 4: the second map, dropout, and the residual."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(H, D)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.dense(hidden_states)) + input_tensor


class Transformers4Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.intermediate, self.output = Intermediate(), Output()
        self.layernorm_after = nn.LayerNorm(D)

    def forward(self, hidden_states):
        return self.output(self.intermediate(self.layernorm_after(hidden_states)), hidden_states)


def encoder(norm_first=True, **options):
    options = {"dropout": 0.1, "activation": "gelu", "batch_first": True} | options
    layer = nn.TransformerEncoderLayer(D, 2, H, norm_first=norm_first, **options)
    model = nn.TransformerEncoder(layer, DEPTH, norm=nn.LayerNorm(D), enable_nested_tensor=False)
    for layer in model.layers:
        layer.dropout.p = 0.0  # the one between the maps; dropout1 and dropout2 stay
    return model


class Tokens(NamedTuple):
    """One kind of host."""

    build: object
    """() -> model"""
    inputs: object
    """seed -> the model's only input"""
    output: object
    """what the model returns -> Tensor"""
    route_from: str | None
    names: list[str]
    """Paths of the MLPs' modules."""


def tokens(seed):
    return torch.randn(4, 5, D, generator=torch.Generator().manual_seed(seed))


def images(seed):
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def vit_config(name, **options):
    transformers = need("transformers")
    return getattr(transformers, name)(
        hidden_size=D, intermediate_size=H, num_hidden_layers=DEPTH, num_attention_heads=2, image_size=16,
        patch_size=8, hidden_act="gelu", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip


def vit_mae():
    model = need("transformers").ViTMAEModel(vit_config("ViTMAEConfig", mask_ratio=0.0))
    # Its masking shuffles patches even where none is removed.
    model.embeddings.random_masking = lambda x, noise=None: (x, x.new_zeros(x.shape[:2]), None)
    return model


def timm_vit():
    need("timm")
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=D, depth=DEPTH, num_heads=2, mlp_ratio=H / D, num_classes=5,
        drop_path_rate=0.1, pos_drop_rate=0.1,
    )  # fmt: skip


def same(x: Tensor) -> Tensor:
    return x


def layers(pattern):
    return [pattern.format(i) for i in range(DEPTH)]


HOSTS = {
    "torch-pre-norm": Tokens(encoder, tokens, same, "cls", layers("layers.{}")),
    "torch-post-norm": Tokens(lambda: encoder(False), tokens, same, "mean", layers("layers.{}")),
    "transformers-vit": Tokens(
        lambda: need("transformers").ViTForImageClassification(vit_config("ViTConfig")),
        images, lambda out: out.logits, None, layers("vit.layers.{}.mlp"),
    ),
    "transformers-vit-mae": Tokens(vit_mae, images, lambda out: out.last_hidden_state, None, layers("layers.{}.mlp")),
    "timm-vit": Tokens(timm_vit, images, same, None, layers("blocks.{}.mlp")),
    "timm-structure": Tokens(
        lambda: nn.Sequential(*[Block(TimmMlp()) for _ in range(DEPTH)]), tokens, same, "cls", layers("{}.mlp")
    ),
    "tanh-gelu": Tokens(
        lambda: nn.Sequential(*[Block(TimmMlp(act=functools.partial(nn.GELU, "tanh"))) for _ in range(DEPTH)]),
        tokens, same, "mean", layers("{}.mlp"),
    ),
    "sequential": Tokens(
        lambda: nn.Sequential(
            *[
                Block(
                    nn.Sequential(
                        nn.LayerNorm(D), nn.Linear(D, H), nn.GELU(), nn.Dropout(0.0), nn.Linear(H, D), nn.Dropout(0.1)
                    )
                )
                for _ in range(DEPTH)
            ]
        ),
        tokens, same, "cls", layers("{}.mlp"),
    ),
    "transformers-4-structure": Tokens(
        lambda: nn.Sequential(*[Transformers4Layer() for _ in range(DEPTH)]), tokens, same, "mean", layers("{}")
    ),
}  # fmt: skip


@torch.no_grad()
def look_trained_(model, seed=0):
    """Every parameter away from its initialisation: no zero bias, no unit norm, no tiny MLP."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return model
