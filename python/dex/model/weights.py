"""Load weights into a ``MaskedAutoencoder``: the published DEX, the original MAE, and vision transformers of timm, of
Hugging Face and in the style of DINO (``dex.model.foreign``).

A dense checkpoint is upcycled: the director and every expert of a layer start as copies of the layer's MLP. Position
and patch embeddings of another size are resized. For a model of one channel the weights of three colours are summed, so
that a grey image gives the same result as three equal channels did.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dex.common.shapes import GREY_MEAN, GREY_STD, IMAGENET_MEAN, IMAGENET_STD, Size, height_width
from dexkernels.published import copy_strictly

from .foreign import read_onnx, timm_names
from .mae import MaskedAutoencoder

HEAD_PREFIXES = ("head.", "fc_norm.", "head_drop.")
"""Classification heads of fine-tuned checkpoints, which are ignored."""

DECODER_PREFIXES = ("decoder_", "mask_token")


class LoadReport(NamedTuple):
    """Result of ``load_pretrained``."""

    naming: str
    """``"published DEX"``, or ``"dense ViT"`` (of any program)."""
    upcycled: bool
    """Whether dense MLPs became directors and experts."""
    resized: tuple[str, ...]
    """Tensors that were resized."""
    kept: tuple[str, ...]
    """Tensors of the model that the checkpoint lacks and that keep their values (routers; an absent decoder)."""
    ignored: tuple[str, ...]
    """Tensors of the checkpoint that the model does not use (classification heads)."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors``, ``.pt``/``.pth``/``.bin`` or ``.onnx`` file; pickled code is never executed.

    A checkpoint with its weights under ``model`` or ``state_dict`` is unwrapped. ONNX needs the package onnx.
    Raises: FileNotFoundError; ValueError if the file is unreadable, unsafe or has no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    if path.suffix == ".onnx":
        return read_onnx(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"path: expected safetensors, or a torch file of plain tensors; {path}: {error}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"path: expected a state dict of tensors in {path}")
    return {k.removeprefix("module."): v for k, v in state.items()}


@torch.no_grad()
def load_pretrained(
    model: MaskedAutoencoder, weights: Mapping[str, Tensor] | str | Path, grid: tuple[int, int] | None = None
) -> LoadReport:
    """Load published DEX weights, original MAE weights or a ViT of another program into ``model``, strictly.

    Args:
        model: any ``MaskedAutoencoder``; sizes other than the image grid and the patch side must match the weights.
        weights: a state dict, or a file for ``read_state_dict``.
        grid: rows and columns of patches that the weights were trained on; None: a square, or the model's grid.

    Raises: ValueError naming every missing, unknown or mis-shaped tensor; the model is then unchanged.
    """
    state = timm_names(weights if isinstance(weights, Mapping) else read_state_dict(weights))
    targets = model.reference_tensors()
    published = any(".DEX." in k for k in state)
    if not published and not any(k.startswith("blocks.") and ".mlp.fc1." in k for k in state):
        got = ", ".join(sorted(state)[:4])
        raise ValueError(
            "weights: expected keys blocks.<l>.mlp.fc1.weight (MAE, timm), embeddings.patch_embeddings.* "
            f"(Hugging Face) or blocks.<l>.DEX.router.linear.weight (published DEX), got {got}, ..."
        )
    grey, resized = _to_grey(model, state), _resize(model, state, grid)
    # With another patch side the decoder predicts another number of pixels, so it keeps its random initialisation.
    unusable = HEAD_PREFIXES + (DECODER_PREFIXES if "patch_embed.proj.weight" in resized else ())
    ignored = [k for k in state if k.startswith(unusable)]
    for k in ignored:
        del state[k]
    kept = []
    if not any(k.startswith(DECODER_PREFIXES) for k in state):
        kept += [k for k in targets if k.startswith(DECODER_PREFIXES)]
        resized = [k for k in resized if not k.startswith(DECODER_PREFIXES)]
    upcycled = model.encoder.dex_layers if not published else []
    copies = []
    for i in range(len(upcycled)):
        mlp, dex = f"blocks.{i}.mlp.", f"blocks.{i}.DEX."
        for k in [k for k in state if k.startswith(mlp)]:
            state[dex + "director." + k.removeprefix(mlp)] = state.pop(k)
        kept += [dex + "router.linear.weight", dex + "expert_activation_count"]
        copies += [k for k in targets if k.startswith(dex + "experts.")]
    resized += [k for k in grey if k in state and k not in resized]
    copy_strictly(state, {k: t for k, t in targets.items() if k not in {*kept, *copies}})
    for layer in upcycled:
        layer.copy_director_to_experts_()
    return LoadReport(
        "published DEX" if published else "dense ViT", bool(upcycled), tuple(resized), tuple(kept), tuple(ignored)
    )


def _to_grey(model: MaskedAutoencoder, state: dict[str, Tensor]) -> list[str]:
    """Convert weights of three colours to a model of one channel; returns the changed names. ValueError: other
    channels."""
    name, channels = "patch_embed.proj.weight", model.encoder.in_chans
    weight = state.get(name)
    if weight is None:
        return []
    width = model.encoder.patch_embed.out_features
    if weight.dim() == 4 and weight.shape[:2] == (width, channels):
        return []
    if weight.dim() != 4 or len(weight) != width or (channels, weight.shape[1]) != (1, 3):
        also = ", or 3 channels, which are then summed" if channels == 1 else ""
        raise ValueError(f"{name}: expected [{width}, {channels}, P, P]{also}, got {list(weight.shape)}")
    # W (x - m_c) / s_c, summed over colours c that all equal x, as one map of (x - m) / s.
    by_channel = weight.double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    state[name] = (by_channel * GREY_STD / std).sum(1, keepdim=True).to(weight.dtype)
    changed = [name]
    if (bias := state.get("patch_embed.proj.bias")) is not None:
        shift = (by_channel * (GREY_MEAN - mean) / std).sum((1, 2, 3))
        state["patch_embed.proj.bias"] = (bias.double() + shift).to(bias.dtype)
        changed.append("patch_embed.proj.bias")
    for name in ("decoder_pred.weight", "decoder_pred.bias"):  # [P*P*3, ...], colours last
        if name in state and len(state[name]) % 3 == 0:
            state[name] = state[name].unflatten(0, (-1, 3)).mean(1)
            changed.append(name)
    return changed


def _resize(model: MaskedAutoencoder, state: dict[str, Tensor], grid: tuple[int, int] | None) -> list[str]:
    """Resize position and patch embeddings in ``state`` for the model; returns the resized names."""
    model_grid = model.encoder.grid
    resized = []
    for name in ("pos_embed", "decoder_pos_embed", "patch_embed.proj.weight"):
        if name not in state:
            continue
        if name == "patch_embed.proj.weight":
            new = resize_patch_embed(state[name], model.encoder.patch_size)
        else:
            rows = state[name].shape[1] if state[name].dim() == 3 else 0
            same_grid = grid is None and rows == 1 + math.prod(model_grid) and math.isqrt(rows - 1) ** 2 != rows - 1
            new = resize_pos_embed(state[name], model.encoder.grid_size, model_grid if same_grid else grid)
        if new.shape != state[name].shape:
            resized.append(name)
            state[name] = new
    return resized


def resize_pos_embed(pos_embed: Tensor, grid_size: Size, from_grid: tuple[int, int] | None = None) -> Tensor:
    """Resize ``[1, 1 + L, D]``, or ``[1, L, D]`` with a zero CLS row added, to another grid of patches, bicubic.

    grid_size: patches per side, or (rows, columns). from_grid: rows and columns of ``pos_embed``; None: a square.
    """
    if pos_embed.dim() != 3 or pos_embed.shape[0] != 1:
        raise ValueError(f"pos_embed: expected [1, 1 + G*G, D], got {list(pos_embed.shape)}")
    rows, dim = pos_embed.shape[1:]
    if from_grid is None:
        with_cls = rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1
        before = (math.isqrt(rows - with_cls),) * 2
    else:
        with_cls, before = rows == 1 + math.prod(from_grid), from_grid
    if math.prod(before) != rows - with_cls:
        raise ValueError(f"pos_embed: expected a square grid, with or without a CLS row, got {rows} rows")
    cls, grid = (pos_embed[:, :1], pos_embed[:, 1:]) if with_cls else (pos_embed.new_zeros(1, 1, dim), pos_embed)
    after = height_width(grid_size)
    if before != after:
        image = grid.float().view(1, *before, dim).permute(0, 3, 1, 2)
        image = F.interpolate(image, after, mode="bicubic", antialias=True, align_corners=False)
        grid = image.permute(0, 2, 3, 1).reshape(1, math.prod(after), dim).to(pos_embed.dtype)
    return torch.cat([cls, grid], 1)


def resize_patch_embed(weight: Tensor, patch_size: int) -> Tensor:
    """``[D, C, P, P] -> [D, C, patch_size, patch_size]`` by the pseudo-inverse of bilinear resizing (FlexiViT, Eq. 4).

    If patch and weight are enlarged together, the embedding stays the same; if reduced, it is the least-squares fit.
    """
    old = weight.shape[-1]
    if weight.dim() != 4 or weight.shape[-2] != old:
        raise ValueError(f"patch_embed.proj.weight: expected [D, C, P, P], got {list(weight.shape)}")
    if old == patch_size:
        return weight
    basis = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    resized = F.interpolate(basis, (patch_size, patch_size), mode="bilinear", antialias=True, align_corners=False)
    resize = resized.view(old * old, patch_size * patch_size)  # Maps a flattened patch (row vector) to the resized one
    return (
        (weight.double().flatten(2) @ torch.linalg.pinv(resize).T)
        .view(*weight.shape[:2], patch_size, patch_size)
        .to(weight.dtype)
    )
