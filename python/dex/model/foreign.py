"""Vision transformers of other programs under timm's names: Hugging Face's ViT and DINOv2, DINO-style ViTs, ONNX files.

LayerScale is folded into the preceding linear map, ``gamma * (W x + b) = (gamma W) x + gamma b``, which leaves the
network's output unchanged. The norms of Hugging Face's ViT divide by ``sqrt(var + 1e-12)``, those of DINO-style ViTs by
``sqrt(var + 1e-6)`` like ``dex.model``.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_MARK = "embeddings.patch_embeddings.projection.weight"
"""Tensor of every Hugging Face vision transformer; the name of the module that contains it comes before."""

_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_INSIDE = {
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "norm1": "norm1",
    "norm2": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}
_ROWS = {
    "attention.attention.query": 0,
    "attention.attention.key": 1,
    "attention.attention.value": 2,
    "attention.q_proj": 0,
    "attention.k_proj": 1,
    "attention.v_proj": 2,
}
_BLOCK = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias|lambda1)")
_SCALED = {"ls1": "attn.proj", "ls2": "mlp.fc2"}


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under timm's names, with LayerScale folded in.

    Unknown names are kept, so that loading them fails. ValueError: an architecture that this model cannot represent.
    """
    if any("register_tokens" in name for name in state):
        raise ValueError("weights: expected a vision transformer without register tokens, got one with them")
    if any(".mlp.weights_in." in name or ".mlp.w12." in name for name in state):
        raise ValueError("weights: expected MLPs of two linear maps with GELU, got gated ones (SwiGLU)")
    return _without_layer_scale(_renamed(state))


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename from the ViT and DINOv2 of transformers 4 or 5; tensors outside the encoder are left out."""
    prefixes = [name.removesuffix(_MARK) for name in state if name.endswith(_MARK)]
    if len(prefixes) != 1:
        return dict(state)
    (prefix,) = prefixes
    renamed: dict[str, Tensor] = {}
    heads: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            continue  # A decoder or a classifier beside the encoder
        name = name.removeprefix(prefix)
        match = _BLOCK.fullmatch(name)
        if name in _OUTSIDE:
            renamed[_OUTSIDE[name]] = tensor
        elif match and match[2] in _ROWS:
            heads.setdefault(f"blocks.{match[1]}.attn.qkv.{match[3]}", {})[_ROWS[match[2]]] = tensor
        elif match and match[2] in _INSIDE:
            kind = "gamma" if match[3] == "lambda1" else match[3]
            renamed[f"blocks.{match[1]}.{_INSIDE[match[2]]}.{kind}"] = tensor
        elif name.startswith(("pooler.", "classifier.")):
            renamed[f"head.{name}"] = tensor
        elif name != "embeddings.mask_token":
            renamed[name] = tensor
    for name, parts in heads.items():
        if len(parts) == 3:
            renamed[name] = torch.cat([parts[row] for row in range(3)])
    return renamed


def _without_layer_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    scales = [name for name in state if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]
    if not scales:
        return state
    for name in scales:
        block, scale, _ = name.rsplit(".", 2)
        weight, bias = (f"{block}.{_SCALED[scale]}.{kind}" for kind in ("weight", "bias"))
        if weight not in state or bias not in state:
            continue  # Refused later as unknown
        gamma, width = state.pop(name), len(state[weight])
        if list(gamma.shape) != [width]:
            raise ValueError(f"{name}: expected [{width}], got {list(gamma.shape)}")
        state[weight], state[bias] = gamma[:, None] * state[weight], gamma * state[bias]
    state.pop("mask_token", None)  # DINO's mask token has the encoder's width, ours the decoder's
    return state


def read_onnx(path: str | Path) -> dict[str, Tensor]:
    """The weights in an ONNX file of a vision transformer, under the names of the exported module.

    Exporters fold a transposed weight into an anonymous initialiser such as ``onnx::MatMul_12``; the node that
    multiplies with it has the name of the module. A position embedding that the graph resizes comes in two tensors, CLS
    and patches. Needs onnx. Raises: FileNotFoundError; ValueError for a file that is not an ONNX model.
    """
    import onnx
    from onnx import numpy_helper

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # Errors of protobuf
        raise ValueError(f"path: expected an ONNX model; {path}: {type(error).__name__}") from error
    arrays = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    state = {name: tensor for name, tensor in tensors.items() if "::" not in name and tensor.is_floating_point()}
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        *module, kind = node.name.strip("/").split("/")
        for name in node.input:
            tensor = tensors.get(name)
            if "::" not in name or tensor is None or not tensor.is_floating_point():
                continue
            if kind.partition("_")[0] == "MatMul":
                state[".".join([*module, "weight"])] = tensor.T.contiguous()
            elif module[-1:] == ["embeddings"] and tensor.dim() == 3:
                positions["cls" if tensor.shape[1] == 1 else "patches"] = tensor
                state[".".join([*module, "position_embeddings"])] = tensor
    if len(positions) == 2:
        name = next(name for name in state if name.endswith("embeddings.position_embeddings"))
        state[name] = torch.cat([positions["cls"], positions["patches"]], 1)
    return state
