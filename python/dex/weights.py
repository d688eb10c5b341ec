"""Load weights from elsewhere into a model: those of ``dex.model.weights``, and everything that ``dex.load`` takes."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dex.model import MaskedAutoencoder
from dex.model import weights as _weights
from dex.model.weights import LoadReport, read_state_dict, resize_patch_embed, resize_pos_embed

__all__ = ["LoadReport", "load_pretrained", "read_state_dict", "resize_patch_embed", "resize_pos_embed"]


def load_pretrained(model: MaskedAutoencoder, weights: Mapping[str, Tensor] | str | os.PathLike[str]) -> LoadReport:
    """``dex.model.weights.load_pretrained``, also for a run folder, a checkpoint folder, and a folder or file written
    by ``dex export``. Position embeddings are resized to the model's.

    Raises: the errors of ``dex.model.weights.load_pretrained`` and ``dex.load``; the model is then unchanged.
    """
    if isinstance(weights, str | os.PathLike) and _is_own(Path(weights)):
        from dex.inference.load import load

        weights = load(weights).model.reference_state_dict()
    return _weights.load_pretrained(model, weights)


def _is_own(path: Path) -> bool:
    if path.is_dir():
        return True
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    from dex.inference.model_file import read_description

    return read_description(path) is not None
