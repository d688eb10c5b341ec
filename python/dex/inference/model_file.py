"""A model in one ``.safetensors`` file that says itself how the model is built, and a folder around such a file.

The file's metadata hold a description under ``dex``; the folder's ``config.json`` holds the same description and the
SHA-256 of the file. Nothing in either is executed. Tensors have the names of ``MaskedAutoencoder.state_dict()``.
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
    """Everything about a model but its weights."""

    config: Config
    modalities: tuple[str, ...]
    step: int
    path: str
    """``"experts"`` or ``"director"``: what its forward computes."""


def is_model_folder(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def write_folder(folder: Path, description: Description, tensors: Mapping[str, Tensor]) -> None:
    """``model.safetensors`` and ``config.json`` in ``folder``, which exists; the latter comes last and says that both
    are whole."""
    words = _words(description)
    data = save(dict(tensors), {_KEY: json.dumps(words), "format": "pt"})
    atomic.write(folder / WEIGHTS, data, sync=True)
    described = {"model_type": "dex", **words, "sha256": {WEIGHTS: hashlib.sha256(data).hexdigest()}}
    atomic.write(folder / CONFIG, json.dumps(described, indent=1) + "\n", sync=True)


def read_folder(folder: Path) -> tuple[Description, dict[str, Tensor]]:
    """ValueError, naming ``run`` and the file, for one that is damaged or not of this format."""
    weights, config = folder / WEIGHTS, folder / CONFIG
    try:
        want = json.loads(config.read_text(encoding="utf-8"))["sha256"][WEIGHTS]
    except (OSError, ValueError, LookupError, TypeError) as error:
        expected = f"run: expected a folder that dex export wrote, with the hash of {WEIGHTS} in {CONFIG}"
        raise ValueError(f"{expected}; {config}: {type(error).__name__}") from error
    with weights.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != want:
            raise ValueError(f"run: {weights}: damaged, its SHA-256 is not the one in {CONFIG}")
    description = read_description(weights)
    if description is None:
        raise ValueError(f"run: expected a folder that dex export wrote; {weights} does not describe its model")
    return description, load_file(weights)


def read_description(file: Path) -> Description | None:
    """What the file says of its model; None for a safetensors file of another program."""
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(_KEY)
    except SafetensorError as error:
        raise ValueError(f"run: expected a safetensors file; {file}: {error}") from error
    if text is None:
        return None
    try:
        words = json.loads(text)
        if (words["format"], words["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{words['format']} version {words['version']}, this is {FORMAT} version {VERSION}")
        config = from_dict(words["config"], Config(), str(file))
        return Description(config, tuple(words["modalities"]), int(words["step"]), words["path"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"run: expected a model that dex export wrote; {file}: {error}") from error


def _words(description: Description) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "path": description.path,
        "step": description.step,
        "modalities": list(description.modalities),
        "config": to_dict(description.config),
    }
