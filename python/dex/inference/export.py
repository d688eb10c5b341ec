"""``dex export``: a trained model for other programs. Each format is a folder, written whole or not at all.

==============  ===============================================================================================
safetensors     ``model.safetensors`` and ``config.json``; ``dex.load`` reads the folder or the file
hf              the same with a model card, ``README.md``: a folder for the Hugging Face Hub
timm            a dense ViT from the directors, in timm's names
onnx            ``model.onnx``: the encoder in plain ONNX operators, any batch size
torch-export    ``model.pt2``: the encoder for ``torch.export.load``, any batch size; needs torch alone
==============  ===============================================================================================
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dex.common import atomic
from dex.common.shapes import height_width, statistics
from dex.inference import model_file
from dex.inference.load import Loaded
from dex.inference.model_card import model_card
from dex.inference.plain import plain
from dex.model import VisionTransformer

ONNX, PROGRAM, CARD = "model.onnx", "model.pt2", "README.md"
OPSET = 18
_TRACED_BATCH = 2
"""Images of the example input; torch would treat a batch of one as a constant."""


def export(loaded: Loaded, format: str, out: Path) -> None:
    """Write ``loaded`` into the new or empty folder ``out``. ValueError if the format cannot hold it."""
    check(loaded, format, out)
    with atomic.writing_folder(out) as folder:
        _WRITERS[format](loaded, folder)


def check(loaded: Loaded, format: str, out: Path) -> None:
    """ValueError for everything that can be checked before writing."""
    if format not in _WRITERS:
        raise ValueError(f"format: expected one of {', '.join(_WRITERS)}, got {format!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new or empty folder, got {out}")
    if format == "timm" and loaded.encoder.dex_layers and loaded.path != "director":
        raise ValueError("path: expected director for format timm, a dense ViT, got 'experts'")


def timm_state_dict(encoder: VisionTransformer) -> dict[str, Tensor]:
    """The weights of a dense encoder under timm's names: with the directors, or of a monolithic model."""
    state: dict[str, Tensor] = {}
    for name, tensor in encoder.state_dict().items():
        if name == "patch_embed.weight":
            side = encoder.patch_size
            state["patch_embed.proj.weight"] = tensor.reshape(-1, encoder.in_chans, side, side)
        elif ".dex." not in name:
            state[name.replace("patch_embed.", "patch_embed.proj.")] = tensor
        elif ".dex.director." in name:
            state[name.replace(".dex.director.", ".mlp.")] = tensor
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _write_safetensors(loaded: Loaded, folder: Path) -> None:
    config = replace(loaded.config, data=replace(loaded.config.data, path=None))  # Folder names may name patients
    description = model_file.Description(config, loaded.modalities, loaded.step, loaded.path)
    model_file.write_folder(folder, description, loaded.model.state_dict())


def _write_hf(loaded: Loaded, folder: Path) -> None:
    _write_safetensors(loaded, folder)
    atomic.write(folder / CARD, model_card(loaded))


def _write_timm(loaded: Loaded, folder: Path) -> None:
    encoder = loaded.encoder
    state = timm_state_dict(encoder)
    atomic.write(folder / model_file.WEIGHTS, save(state, {"format": "pt"}))
    width, hidden = encoder.norm.normalized_shape[0], state["blocks.0.mlp.fc1.weight"].shape[0]
    mean, std = map(list, statistics(encoder.in_chans))
    config = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "global_pool": "token",
        "model_args": {
            "img_size": encoder.img_size,
            "patch_size": encoder.patch_size,
            "in_chans": encoder.in_chans,
            "embed_dim": width,
            "depth": len(encoder.blocks),
            "num_heads": encoder.blocks[0].attn.num_heads,
            "mlp_ratio": hidden / width,
        },
        "pretrained_cfg": {
            "input_size": [encoder.in_chans, *height_width(encoder.img_size)],
            "mean": mean,
            "std": std,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    _write_json(folder / model_file.CONFIG, config)


def _write_onnx(loaded: Loaded, folder: Path) -> None:
    import onnx  # noqa: F401  torch's exporter needs it, but has a less clear error
    import onnxscript  # noqa: F401

    model, example = _traceable(loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # About internals of torch
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["tokens"],
            dynamic_shapes=_dynamic(),
            opset_version=OPSET,
            verbose=False,
        )
    for node in program.model.graph:
        node.metadata_props.clear()  # Paths of source files, which identify the exporting machine
    program.save(str(folder / ONNX), external_data=_bytes_of(model) > 2**30)  # A protobuf holds less than 2 GB
    _write_json(folder / model_file.CONFIG, _described(loaded))


def _write_torch_export(loaded: Loaded, folder: Path) -> None:
    model, example = _traceable(loaded)
    program = torch.export.export(model, (example,), dynamic_shapes=_dynamic())
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # Paths of source files, which identify the exporting machine
    torch.export.save(program, folder / PROGRAM)
    _write_json(folder / model_file.CONFIG, _described(loaded))


def _traceable(loaded: Loaded) -> tuple[nn.Module, Tensor]:
    model = plain(loaded.encoder).requires_grad_(False)
    return model, torch.zeros(_TRACED_BATCH, model.in_chans, *height_width(model.img_size))


def _dynamic() -> dict[str, Any]:
    return {"images": {0: torch.export.Dim("batch")}}


def _described(loaded: Loaded) -> dict[str, Any]:
    """The input and output of a graph, for the program that runs it."""
    encoder = loaded.encoder
    width = encoder.norm.normalized_shape[0]
    mean, std = map(list, statistics(encoder.in_chans))
    return {
        "input": {
            "images": ["batch", encoder.in_chans, *height_width(encoder.img_size)],
            "values": f"{'RGB' if encoder.in_chans == 3 else 'luminance'} within [0, 1], less mean, over std",
            "mean": mean,
            "std": std,
        },
        "output": {"tokens": ["batch", 1 + encoder.patches, width], "order": "CLS token, then patches by row"},
        "path": loaded.path,
        "step": loaded.step,
        "modalities": list(loaded.modalities),
    }


def _bytes_of(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    atomic.write(path, json.dumps(values, indent=1) + "\n")


_WRITERS: dict[str, Callable[[Loaded, Path], None]] = {
    "safetensors": _write_safetensors,
    "hf": _write_hf,
    "timm": _write_timm,
    "onnx": _write_onnx,
    "torch-export": _write_torch_export,
}
FORMATS = tuple(_WRITERS)
