"""A pretrained model from its run folder; the training data is not needed."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from dex.config import Config, from_dict
from dex.model import MaskedAutoencoder, VisionTransformer
from dex.model.build import build_model
from dex.train import checkpoint
from dex.train.runlog import CONFIG, STARTS


class Loaded(NamedTuple):
    """A pretrained model and what it was trained as."""

    model: MaskedAutoencoder
    """In evaluation mode, on the host, in float32."""
    config: Config
    """The run's configuration at this checkpoint."""
    modalities: tuple[str, ...]
    """Names of the modalities in the training data; empty for a checkpoint apart from its run folder."""
    step: int
    """Training steps done."""
    folder: Path
    """The checkpoint's folder."""

    @property
    def encoder(self) -> VisionTransformer:
        """``images [B, 3, S, S] -> tokens [B, 1 + L, D]``, CLS first; images as `dex.data.center` gives them."""
        return self.model.encoder


def load(path: str | os.PathLike[str]) -> Loaded:
    """The model in a run folder, with the weights of its newest good checkpoint, or in one checkpoint folder.

    Every hash of the checkpoint is checked. A newer checkpoint that is damaged is passed over with a warning. The
    model takes each kernel's default backend on whatever device it is moved to, not ``model.backend`` of the run.

    Raises: FileNotFoundError and ValueError naming ``path``; `dex.train.checkpoint.CheckpointError` (a ValueError)
    naming the file that is damaged or the tensor that does not fit.
    """
    saved, run = _find(path)
    config = from_dict(saved.state["config"], Config(), f"{saved.folder}/state.json")
    with torch.device("meta"):
        model = build_model(replace(config, model=replace(config.model, backend=None)))
    model.to_empty(device="cpu")
    checkpoint.restore_model(saved, model)
    return Loaded(model.eval(), config, _modalities(run), saved.state["step"], saved.folder)


def _find(path: str | os.PathLike[str]) -> tuple[checkpoint.Checkpoint, Path]:
    """The checkpoint that ``path`` names, and its run folder."""
    expected = "path: expected a run folder or one of its checkpoint folders"
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"{expected}; got {path!r}")
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{expected}; nothing at {folder}")
    if not folder.is_dir():
        raise ValueError(f"{expected}; got the file {folder}")
    try:
        if checkpoint.is_checkpoint(folder):
            return checkpoint.load(folder), folder.resolve().parent.parent
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{expected}; {folder} is neither, it holds no {CONFIG}")
        saved, passed_over = checkpoint.newest_good(folder / "checkpoints")
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"path: {str(error).removeprefix('resume: ')}") from error
    if saved is None:
        raise ValueError(
            f"path: expected a run with a checkpoint; {folder} has none yet: the first is written after "
            "run.checkpoint_every steps, or when the run is stopped by a signal"
        )
    for reason in passed_over:
        warnings.warn(f"dex.load: passed over {reason}; loaded {saved.folder.name}", stacklevel=3)
    return saved, folder


def _modalities(run: Path) -> tuple[str, ...]:
    path = run / STARTS
    if not path.is_file():
        return ()
    try:
        return tuple(json.loads(path.read_text(encoding="utf-8"))["starts"][-1]["data"]["images"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"path: expected a run's starts in {path}; got {type(error).__name__}: {error}") from error
