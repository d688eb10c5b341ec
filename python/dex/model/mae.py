"""The DEX vision transformer and the masked autoencoder around it. ``dex.model.weights`` loads weights.

Letters: B images, C channels, H x W their pixels, P patch side, L patches, N tokens (CLS first), D width,
E experts, K chosen.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dex.common.shapes import Size, check_size, height_width, plain_size
from dex.model.balance import probabilities
from dexkernels import Aux, DEXLayer
from dexkernels.checks import check_number
from dexkernels.layer import MLP, update_directors
from dexkernels.ops.common import accumulation_dtype
from dexkernels.ops.dense import Linear
from dexkernels.published import PublishedNames

LAYER_NORM_EPS = 1e-6
NORM_PIX_EPS = 1e-6

DEX_OPTIONS = ("align", "backend", "route_from", "temperature", "usage_momentum")
"""Options that all ``DEXLayer`` of a model share, apart from sizes."""


class MAEOutput(NamedTuple):
    """Output of ``MaskedAutoencoder``. Losses are 0-dim and unweighted."""

    loss: Tensor
    """Mean squared error over the pixels of removed patches (of normalised patches with ``norm_pix_loss``)."""
    align_loss: Tensor
    """Mean over layers of each layer's align loss divided by ``depth - layer``; 0 for the monolithic control."""
    balance_loss: Tensor
    """Mean over layers; local to this rank."""
    pred: Tensor
    """``[B, C, H, W]``: the decoder's output as an image; see ``MaskedAutoencoder.reconstruct``."""
    mask: Tensor
    """``[B, L]``; 1 = removed."""
    gate_mass: list[Tensor]
    """Per layer ``[E_l]``, detached; for ``MaskedAutoencoder.update_directors``. Empty for the monolithic control."""
    gates: list[Tensor]
    """Per layer ``[B, K_l]``."""
    expert_indices: list[Tensor]
    """Per layer int32 ``[B, K_l]``."""
    image_loss: Tensor
    """``[B]``, detached: ``loss`` of each image."""
    cls: Tensor
    """``[B, D]``, detached: the encoder's CLS token, the input of a probe."""
    probabilities: Sequence[Tensor] = ()
    """Per layer ``[B, E_l]`` with a gradient, of blocks that keep them; otherwise none."""


class Encoded(NamedTuple):
    """Output of ``VisionTransformer.forward_hidden``."""

    tokens: Tensor
    """``[B, 1 + L, D]``, CLS first, after the final norm."""
    aux: list[Aux]
    """Of the DEX layers; empty unless requested."""
    hidden: dict[int, Tensor]
    """Number of blocks -> tokens ``[B, 1 + L, D]`` after that many blocks, before the final norm."""


class FullAux(NamedTuple):
    """``dexkernels.Aux`` and the probabilities of all experts."""

    align_loss: Tensor
    balance_loss: Tensor
    gate_mass: Tensor
    gates: Tensor
    expert_indices: Tensor
    probabilities: Tensor
    """``[B, E]``; see ``dex.model.balance.probabilities``."""


class Attention(nn.Module):
    """Multi-head self-attention, ``[B, N, D] -> [B, N, D]``."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv: nn.Linear = Linear(dim, 3 * dim)
        self.proj: nn.Linear = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals; the MLP is a ``DEXLayer``, or dense if ``num_experts`` is 0."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        num_experts: int = 0,
        top_k: int = 1,
        **dex_options: Any,
    ):
        super().__init__()
        self.norm1: nn.LayerNorm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn: Attention = Attention(dim, num_heads)
        self.norm2: nn.LayerNorm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.keeps_probabilities = False
        """Whether aux is a ``FullAux``, with the probabilities of all experts."""
        self.dex: DEXLayer | None = None
        self.mlp: MLP | None = None
        if num_experts:
            self.dex = DEXLayer(dim, hidden_dim, num_experts, top_k, **dex_options)
        else:
            self.mlp = MLP(dim, hidden_dim)

    def forward(
        self, x: Tensor, noise_std: float | Tensor = 0.0, router_noise: Tensor | None = None, return_aux: bool = False
    ) -> tuple[Tensor, Aux | FullAux | None]:
        x = x + self.attn(self.norm1(x))
        h = self.norm2(x)
        if self.dex is None:
            return x + self.mlp(h), None
        if not return_aux:
            return x + self.dex(h, noise_std=noise_std, router_noise=router_noise), None
        y, aux = self.dex(h, noise_std=noise_std, router_noise=router_noise, return_aux=True)
        if self.keeps_probabilities:
            aux = FullAux(*aux, probabilities(self.dex, h, noise_std, router_noise))
        return x + y, aux


class VisionTransformer(nn.Module):
    """The encoder: ``images [B, C, H, W] -> tokens [B, 1 + L, D]``, CLS first, after the final norm.

    Args:
        img_size: side of a square, or (height, width), multiples of ``patch_size``.
        num_experts, top_k: an int, or one int per layer; ``num_experts=0`` is the monolithic control, with dense MLPs
            of hidden size ``top_k * mlp_ratio * embed_dim``.
        dex_options: of every ``dexkernels.DEXLayer``: align, backend, route_from, temperature, usage_momentum.

    Raises: ValueError naming the argument.
    """

    def __init__(
        self,
        img_size: Size = 256,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_experts: int | Sequence[int] = 8,
        top_k: int | Sequence[int] = 2,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        **dex_options: Any,
    ):
        super().__init__()
        if unknown := dex_options.keys() - DEX_OPTIONS:
            raise TypeError(f"dex_options: expected {', '.join(DEX_OPTIONS)}, got {', '.join(sorted(unknown))}")
        _check_sizes(patch_size=patch_size, in_chans=in_chans)
        check_size("img_size", img_size)
        if any(side % patch_size for side in height_width(img_size)):
            raise ValueError(f"img_size: expected a multiple of patch_size ({patch_size}), got {img_size}")
        _check_transformer("", embed_dim, depth, num_heads)
        experts = _per_layer("num_experts", num_experts, depth)
        chosen = _per_layer("top_k", top_k, depth)
        if any(experts) and not all(experts):
            raise ValueError(f"num_experts: expected 0 in all layers (monolithic) or in none, got {experts}")
        check_number("mlp_ratio", mlp_ratio, "a positive finite number", lambda v: 0 < v < float("inf"))
        hidden_dim = max(int(embed_dim * mlp_ratio), 1)
        self.img_size: Size = plain_size(img_size)
        self.patch_size: int = patch_size
        self.in_chans: int = in_chans
        # A linear map of flattened patches instead of a convolution, so that removed patches are never embedded.
        self.patch_embed: nn.Linear = Linear(in_chans * patch_size**2, embed_dim)
        self.cls_token: nn.Parameter = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", sincos_pos_embed(embed_dim, self.grid_size))
        self.blocks: nn.ModuleList = nn.ModuleList(
            Block(embed_dim, num_heads, hidden_dim if e else k * hidden_dim, e, k, **dex_options)
            for e, k in zip(experts, chosen, strict=True)
        )
        self.norm: nn.LayerNorm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.checkpointing = False
        """Keep only the input of each block, and recompute the block in backward."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = height_width(self.img_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def grid_size(self) -> Size:
        """Patches per side, or (rows, columns) if images are not square."""
        return plain_size(self.grid)

    @property
    def patches(self) -> int:
        """L, the number of patches."""
        rows, columns = self.grid
        return rows * columns

    @property
    def dex_layers(self) -> list[DEXLayer]:
        """The DEX layers in order; empty for the monolithic control."""
        return [block.dex for block in self.blocks if block.dex is not None]

    def forward(self, images: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, 1 + L, D]``; losses and director are not computed."""
        return self.forward_aux(images)[0]

    def forward_aux(
        self,
        images: Tensor,
        ids_keep: Tensor | None = None,
        noise_std: float | Tensor = 0.0,
        router_noise: Sequence[Tensor] | None = None,
        return_aux: bool = False,
    ) -> tuple[Tensor, list[Aux]]:
        """Tokens ``[B, 1 + kept, D]`` of the patches ``ids_keep [B, kept]`` (None: all), and aux if requested.

        ``router_noise``: one ``[B, 1, E_l]`` per layer.
        """
        tokens, auxes, _ = self.forward_hidden(
            images, (), ids_keep=ids_keep, noise_std=noise_std, router_noise=router_noise, return_aux=return_aux
        )
        return tokens, auxes

    def forward_hidden(
        self,
        images: Tensor,
        after: Collection[int],
        *,
        ids_keep: Tensor | None = None,
        noise_std: float | Tensor = 0.0,
        router_noise: Sequence[Tensor] | None = None,
        return_aux: bool = False,
    ) -> Encoded:
        """``forward_aux``, and hidden states ``[B, 1 + kept, D]`` before the final norm.

        after: numbers of blocks, 1 to the depth, after which hidden states are taken.
        """
        self.check_images(images)
        if router_noise is not None and len(router_noise) != len(self.blocks):
            raise ValueError(
                f"router_noise: expected one tensor per layer ({len(self.blocks)}), got {len(router_noise)}"
            )
        B, pos = images.shape[0], self.pos_embed.expand(images.shape[0], -1, -1)
        x, patch_pos = patchify(images, self.patch_size), pos[:, 1:]
        if ids_keep is not None:
            x, patch_pos = take_patches(x, ids_keep), take_patches(patch_pos, ids_keep)
        x = self.patch_embed(x) + patch_pos
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1).to(x.dtype), x], 1)
        auxes, hidden = [], {}
        checkpointing = self.checkpointing and torch.is_grad_enabled()
        # With given noise a block draws no random numbers; not touching the generator is safe in a graph capture.
        options = {"use_reentrant": False, "preserve_rng_state": router_noise is None and bool(self.dex_layers)}
        for i, block in enumerate(self.blocks):
            arguments = (x, noise_std, None if router_noise is None else router_noise[i], return_aux)
            x, aux = checkpoint(block, *arguments, **options) if checkpointing else block(*arguments)
            if aux is not None:
                auxes.append(aux)
            if i + 1 in after:
                hidden[i + 1] = x
        return Encoded(self.norm(x), auxes, hidden)

    def check_images(self, images: Tensor) -> None:
        """ValueError unless ``images`` have the shape and dtype that the encoder expects."""
        expected = (self.in_chans, *height_width(self.img_size))
        if not isinstance(images, Tensor) or images.dim() != 4 or tuple(images.shape[1:]) != expected:
            got = list(images.shape) if isinstance(images, Tensor) else repr(images)
            raise ValueError(f"images: expected [B, {', '.join(map(str, expected))}], got {got}")
        if not images.is_floating_point():
            raise ValueError(f"images: expected floating-point pixels (see dex.data.center), got {images.dtype}")


class MaskedAutoencoder(PublishedNames, nn.Module):
    """MAE pretraining with a DEX encoder and a dense decoder.

    Args:
        img_size: H = W, or (H, W), in pixels.
        patch_size: P, which divides both.
        embed_dim, depth, num_heads, num_experts, top_k, mlp_ratio, in_chans, dex_options: see ``VisionTransformer``.
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder, which processes all L patches.
        norm_pix_loss: targets are patches normalised by their own mean and standard deviation.

    Linear maps are initialised Xavier-uniform with zero bias, experts and director independently.
    Raises: ValueError naming the argument.
    """

    def __init__(
        self,
        img_size: Size = 256,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_experts: int | Sequence[int] = 8,
        top_k: int | Sequence[int] = 2,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = True,
        in_chans: int = 3,
        **dex_options: Any,
    ):
        super().__init__()
        self.encoder: VisionTransformer = VisionTransformer(
            img_size, patch_size, embed_dim, depth, num_heads, num_experts, top_k, mlp_ratio, in_chans, **dex_options
        )
        _check_transformer("decoder_", decoder_embed_dim, decoder_depth, decoder_num_heads)
        if norm_pix_loss and patch_size**2 * in_chans < 2:
            raise ValueError("norm_pix_loss: expected False for patches of a single value, which have no variance")
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed: nn.Linear = Linear(embed_dim, decoder_embed_dim)
        self.mask_token: nn.Parameter = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.register_buffer("decoder_pos_embed", sincos_pos_embed(decoder_embed_dim, self.encoder.grid_size))
        self.decoder_blocks: nn.ModuleList = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, int(decoder_embed_dim * mlp_ratio))
            for _ in range(decoder_depth)
        )
        self.decoder_norm: nn.LayerNorm = nn.LayerNorm(decoder_embed_dim, eps=LAYER_NORM_EPS)
        self.decoder_pred: nn.Linear = Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all weights as in MAE: Xavier-uniform linear maps, zero biases, tokens from N(0, 0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, DEXLayer):
                nn.init.xavier_uniform_(module.router_weight)
                for stacked in (module.experts.fc1_weight, module.experts.fc2_weight):
                    for expert in stacked:
                        nn.init.xavier_uniform_(expert)
                nn.init.zeros_(module.experts.fc1_bias)
                nn.init.zeros_(module.experts.fc2_bias)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        noise_std: float | Tensor = 0.0,
        mask_noise: Tensor | None = None,
        router_noise: Sequence[Tensor] | None = None,
    ) -> MAEOutput:
        """Encode the kept patches, decode all patches, and compute the loss of the removed ones.

        Args:
            images: float ``[B, C, H, W]``, ImageNet-normalised.
            mask_ratio: share of patches that is removed, in [0, 1); at least one patch is kept.
            noise_std: standard deviation of the routers' exploration noise in training, a float or 0-dim tensor.
            mask_noise: ``[B, L]``; the patches with the smallest values are kept; None draws uniform noise.
            router_noise: one ``[B, 1, E_l]`` per layer; None draws standard normal noise.

        Raises: ValueError naming the argument.
        """
        self.encoder.check_images(images)
        B, L = images.shape[0], self.encoder.patches
        expected = f"a number in [0, 1) that keeps at least one of {L} patches"
        check_number("mask_ratio", mask_ratio, expected, lambda v: 0 <= v < 1 and int(L * (1 - v)) >= 1)
        kept = int(L * (1 - mask_ratio))
        if mask_noise is None:
            mask_noise = torch.rand(B, L, device=images.device)
        elif not isinstance(mask_noise, Tensor) or tuple(mask_noise.shape) != (B, L):
            got = list(mask_noise.shape) if isinstance(mask_noise, Tensor) else repr(mask_noise)
            raise ValueError(f"mask_noise: expected [{B}, {L}], got {got}")
        elif mask_noise.device != images.device:
            raise ValueError(f"mask_noise: expected device {images.device}, got {mask_noise.device}")
        ids_keep = mask_noise.argsort(stable=True, dim=1)[:, :kept]
        mask = images.new_ones(B, L).scatter_(1, ids_keep, 0)

        latent, auxes = self.encoder.forward_aux(images, ids_keep, noise_std, router_noise, return_aux=True)
        pred = self.decode(latent, ids_keep)
        patch_loss = self.patch_loss(pred, images)
        # Not in half precision, which cannot represent the number of patches.
        removed = mask.to(patch_loss.dtype)
        image_loss = (patch_loss.detach() * removed).sum(1) / removed.sum(1).clamp(min=1)
        loss = (patch_loss * removed).sum() / removed.sum().clamp(min=1)
        depth, zero = len(self.encoder.blocks), loss.new_zeros(())
        align = sum((aux.align_loss / (depth - i) for i, aux in enumerate(auxes)), start=zero) / depth
        balance = sum((aux.balance_loss for aux in auxes), start=zero) / depth
        return MAEOutput(
            loss,
            align,
            balance,
            unpatchify(pred, self.encoder.patch_size, self.encoder.in_chans, self.encoder.grid),
            mask,
            [aux.gate_mass for aux in auxes],
            [aux.gates.detach() for aux in auxes],
            [aux.expert_indices for aux in auxes],
            image_loss,
            latent[:, 0].detach(),
            [aux.probabilities for aux in auxes if isinstance(aux, FullAux)],
        )

    def decode(self, latent: Tensor, ids_keep: Tensor) -> Tensor:
        """Pixels ``[B, L, P*P*C]`` of all patches.

        ``latent [B, 1 + kept, D]`` of the CLS token and the patches ``ids_keep [B, kept]``.
        """
        x = self.decoder_embed(latent)
        # A scatter instead of a gather, whose gradient would be a scatter-add, which is slow on a CPU.
        patches = self.mask_token.to(x.dtype).repeat(x.shape[0], self.encoder.patches, 1)
        patches = patches.scatter(1, ids_keep[..., None].expand(-1, -1, x.shape[2]), x[:, 1:])
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x, _ = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def patch_loss(self, pred: Tensor, images: Tensor) -> Tensor:
        """Mean squared error of every patch, ``[B, L]``; ``pred [B, L, P*P*C]``."""
        dtype = accumulation_dtype(images.dtype)
        target = patchify(images.to(dtype), self.encoder.patch_size, channels_last=True)
        if self.norm_pix_loss:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        return (pred.to(dtype) - target).square().mean(-1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, out: MAEOutput) -> Tensor:
        """``[B, C, H, W]`` in the pixel space of ``images``: kept patches unchanged, removed patches as predicted.

        With ``norm_pix_loss`` the mean and standard deviation of the true patches are restored.
        """
        P = self.encoder.patch_size
        true, pred = (patchify(t, P, channels_last=True) for t in (images, out.pred.to(images.dtype)))
        if self.norm_pix_loss:
            mean, std = patch_statistics(true)
            pred = pred * std + mean
        patches = torch.where(out.mask[..., None] == 1, pred, true)
        return unpatchify(patches, P, self.encoder.in_chans, self.encoder.grid)

    def update_directors(
        self,
        gate_mass: Sequence[Tensor],
        momentum: float | Tensor,
        *,
        skip: Tensor | None = None,
        process_group: "dist.ProcessGroup | Literal[False] | None" = None,
    ) -> None:
        """GEMA of every layer, after backward and before the optimizer; see ``dexkernels.DEXLayer.update_director``.

        ``gate_mass``: ``out.gate_mass``, one ``[E_l]`` per layer. Uses one all-reduce for all layers.
        """
        update_directors(self.encoder.dex_layers, gate_mass, momentum, skip=skip, process_group=process_group)

    def reference_tensors(self) -> dict[str, Tensor]:
        """The tensors of this model by their published names, not copied."""
        tensors = {}
        for name, t in [*self.named_parameters(), *self.named_buffers()]:
            name = name.removeprefix("encoder.")
            if name.startswith("patch_embed."):
                name = name.replace("patch_embed.", "patch_embed.proj.")
                if name.endswith("weight"):
                    t = t.detach().view(-1, self.encoder.in_chans, self.encoder.patch_size, self.encoder.patch_size)
            if ".dex." not in name:
                tensors[name] = t
        for i, layer in enumerate(self.encoder.dex_layers):
            tensors |= {f"blocks.{i}.DEX.{name}": t for name, t in layer.reference_tensors().items()}
        return tensors


def vit_base(**overrides: Any) -> MaskedAutoencoder:
    """DEX ViT-B: 768/12/12, decoder 512/8/16, patch 16, 256 pixels, top 2 of 8 experts; any argument can be overridden.

    Sizes are width/depth/heads.
    """
    return MaskedAutoencoder(**{"embed_dim": 768, "depth": 12, "num_heads": 12} | overrides)


def vit_large(**overrides: Any) -> MaskedAutoencoder:
    """DEX ViT-L: 1024/24/16, otherwise as ``vit_base``."""
    return MaskedAutoencoder(**{"embed_dim": 1024, "depth": 24, "num_heads": 16} | overrides)


def vit_huge(**overrides: Any) -> MaskedAutoencoder:
    """DEX ViT-H: 1280/32/16, otherwise as ``vit_base`` (patch 16; the original MAE's 14 does not divide 256)."""
    return MaskedAutoencoder(**{"embed_dim": 1280, "depth": 32, "num_heads": 16} | overrides)


def patchify(images: Tensor, patch_size: int, channels_last: bool = False) -> Tensor:
    """``[B, C, H, W] -> [B, L, C*P*P]``, patches row-major.

    Within a patch, channels come first as in a convolution's weight, or last as in the original MAE's targets.
    """
    (B, C, H, W), P = images.shape, patch_size
    x = images.reshape(B, C, H // P, P, W // P, P)
    x = x.permute(0, 2, 4, 3, 5, 1) if channels_last else x.permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, (H // P) * (W // P), C * P * P)


def unpatchify(patches: Tensor, patch_size: int, in_chans: int, grid: tuple[int, int] | None = None) -> Tensor:
    """``[B, L, P*P*C]``, channels last within a patch, ``-> [B, C, H, W]``. grid: rows, columns; None: a square."""
    B, L, P = patches.shape[0], patches.shape[1], patch_size
    rows, columns = grid or (math.isqrt(L), math.isqrt(L))
    x = patches.reshape(B, rows, columns, P, P, in_chans).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, in_chans, rows * P, columns * P)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every patch, ``[B, L, 1]``, as used by ``norm_pix_loss``."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + NORM_PIX_EPS).sqrt()


def take_patches(x: Tensor, ids: Tensor) -> Tensor:
    """``[B, L, D]``, ``ids [B, M] -> [B, M, D]``."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))


def sincos_pos_embed(dim: int, grid_size: Size) -> Tensor:
    """The fixed 2-D sine-cosine position embedding of MAE, ``[1, 1 + L, dim]``; zero for the CLS token.

    The first half of the width encodes the column, the second the row; each half has sines, then cosines. grid_size:
    patches per side, or (rows, columns).
    """
    rows, columns = height_width(grid_size)
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)
    column, row = line[:columns].expand(rows, -1, -1), line[:rows, None].expand(-1, columns, -1)
    grid = torch.cat([column, row], -1).reshape(rows * columns, dim)
    return torch.cat([grid.new_zeros(1, dim), grid])[None].float()


def _per_layer(name: str, value: int | Sequence[int], depth: int) -> list[int]:
    values = [value] * depth if isinstance(value, int) else list(value) if isinstance(value, Sequence) else []
    if len(values) != depth or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in values):
        raise ValueError(f"{name}: expected an integer >= 0, or {depth} of them (one per layer), got {value!r}")
    if name == "top_k" and min(values) < 1:
        raise ValueError(f"top_k: expected positive integers, got {value!r}")
    return values


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def _check_transformer(prefix: str, embed_dim: int, depth: int, num_heads: int) -> None:
    _check_sizes(**{f"{prefix}embed_dim": embed_dim, f"{prefix}depth": depth, f"{prefix}num_heads": num_heads})
    if embed_dim % num_heads:
        raise ValueError(f"{prefix}embed_dim: expected a multiple of {prefix}num_heads ({num_heads}), got {embed_dim}")
    if embed_dim % 4:
        raise ValueError(f"{prefix}embed_dim: expected a multiple of 4 (2-D sine-cosine positions), got {embed_dim}")
