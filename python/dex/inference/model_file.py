"""A model in one ``.safetensors`` file with a description of how to build it, and a folder around such a file.

The file's metadata contain the description under ``dex``; the folder's ``config.json`` contains the same description
and the SHA-256 of the file. Nothing in either is executed. Tensors are named as in ``MaskedAutoencoder.state_dict()``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from dex.common import atomic
from dex.config import Config, from_dict, to_dict

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT, VERSION = "dex-model", 1
_KEY = "dex"


class Description(NamedTuple):
    """Everything about a model except its weights."""

    config: Config
    modalities: tuple[str, ...]
    step: int
    path: str
    """``"experts"`` or ``"director"``: what its forward pass computes."""


def is_model_folder(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def write_folder(folder: Path, description: Description, tensors: Mapping[str, Tensor]) -> None:
    """Write ``model.safetensors``, then ``config.json``, to the existing ``folder``; the latter marks both complete."""
    fields = _fields(description)
    data = save(dict(tensors), {_KEY: json.dumps(fields), "format": "pt"})
    atomic.write(folder / WEIGHTS, data, sync=True)
    described = {"model_type": "dex", **fields, "sha256": {WEIGHTS: hashlib.sha256(data).hexdigest()}}
    atomic.write(folder / CONFIG, json.dumps(described, indent=1) + "\n", sync=True)


def read_folder(folder: Path) -> tuple[Description, dict[str, Tensor]]:
    """The model in ``folder``. ValueError naming ``run`` and the file if it is damaged or of another format."""
    weights, config = folder / WEIGHTS, folder / CONFIG
    try:
        expected_hash = json.loads(config.read_text(encoding="utf-8"))["sha256"][WEIGHTS]
    except (OSError, ValueError, LookupError, TypeError) as error:
        expected = f"run: expected a folder that dex export wrote, with the hash of {WEIGHTS} in {CONFIG}"
        raise ValueError(f"{expected}; {config}: {type(error).__name__}") from error
    with weights.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected_hash:
            raise ValueError(f"run: {weights}: damaged; its SHA-256 differs from the one in {CONFIG}")
    description = read_description(weights)
    if description is None:
        raise ValueError(f"run: expected a folder that dex export wrote; {weights} does not describe its model")
    return description, load_file(weights)


def read_description(file: Path) -> Description | None:
    """The description in the file; None for a safetensors file of another program."""
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(_KEY)
    except SafetensorError as error:
        raise ValueError(f"run: expected a safetensors file; {file}: {error}") from error
    if text is None:
        return None
    try:
        fields = json.loads(text)
        if (fields["format"], fields["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{fields['format']} version {fields['version']}, not {FORMAT} version {VERSION}")
        config = from_dict(fields["config"], Config(), str(file))
        return Description(config, tuple(fields["modalities"]), int(fields["step"]), fields["path"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"run: expected a model that dex export wrote; {file}: {error}") from error


def _fields(description: Description) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "path": description.path,
        "step": description.step,
        "modalities": list(description.modalities),
        "config": to_dict(description.config),
    }
