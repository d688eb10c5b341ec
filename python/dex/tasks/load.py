"""Loads a fine-tuned model from its folder, which holds everything needed; the pretrained run is not needed.

finetune.yaml    the task, the settings, and facts about the pretrained run
checkpoints/     as in pretraining: hashed, whole or absent
"""

from __future__ import annotations

import csv
import hashlib
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml

from dex.common.folders import TUNED, require
from dex.config import Config, from_dict
from dex.inference.load import FINE_TUNED, resize_
from dex.model.build import build_model
from dex.tasks import recipe, task
from dex.tasks.model import TaskModel
from dex.tasks.recipe import Settings
from dex.tasks.task import Task
from dex.train import checkpoint
from dex.train.runlog import CONFIG as PRETRAINED

CONFIG, CASES = FINE_TUNED, "cases.csv"
Which = Literal["best", "last"]


class Description(NamedTuple):
    """The contents of ``finetune.yaml``."""

    task: Task
    settings: Settings
    config: Config
    """The pretrained run's, with the image size of the fine-tuned model."""
    pretrained: dict[str, Any]
    """``run``: name of its folder; ``step``; ``sha256`` of its checkpoint's manifest; ``modalities``."""
    data: dict[str, Any]
    """How the data were split, by option of ``dex finetune``; empty if unknown."""


class LoadedTask(NamedTuple):
    """A fine-tuned model and facts about its training."""

    model: TaskModel
    """In evaluation mode, on the host, in float32; LoRA is merged."""
    task: Task
    settings: Settings
    config: Config
    """The pretrained run's, with the image size of this model."""
    pretrained: dict[str, Any]
    data: dict[str, Any]
    """As ``pretrained``, from ``Description``."""
    step: int
    folder: Path
    """The checkpoint's folder."""
    sha256: str
    """Hash of the checkpoint's manifest, which holds the hashes of its files."""

    @property
    def img_size(self) -> int:
        return self.config.model.img_size


def load_task_model(folder: str | os.PathLike[str], which: Which = "best") -> LoadedTask:
    """The model in a folder of ``dex finetune``, or in one of its checkpoint folders.

    which: "best", by the validation metric, or "last". Every hash is checked; if the best checkpoint is damaged, the
    newest good one is loaded with a warning.
    Raises: FileNotFoundError, ValueError, ``dex.train.checkpoint.CheckpointError``.
    """
    if which not in ("best", "last"):
        raise ValueError(f"checkpoint: expected best or last, got {which!r}")
    place = require(folder, TUNED)
    if not place.is_dir():
        raise ValueError(f"{TUNED}, or one of its checkpoint folders, got the file {place}")
    if checkpoint.is_checkpoint(place):
        described = read_description(place.resolve().parent.parent)
        saved = checkpoint.load(place)
    else:
        described = read_description(place)
        saved = _newest(place / "checkpoints", which)
    model = build(described)
    checkpoint.restore_model(saved, model)
    model.merge_()
    return LoadedTask(
        model.eval(),
        described.task,
        described.settings,
        described.config,
        described.pretrained,
        described.data,
        saved.state["step"],
        saved.folder,
        manifest_hash(saved.folder),
    )


def build(described: Description) -> TaskModel:
    """The model of a description, with uninitialised weights."""
    config = described.config
    with torch.device("meta"):
        model = build_model(replace(config, model=replace(config.model, backend=None)))
    model.to_empty(device="cpu")
    resize_(model, config.model.img_size)
    return TaskModel(model.encoder, described.task, described.settings)


def read_description(folder: Path) -> Description:
    """Read ``finetune.yaml``. ValueError naming what is wrong with it."""
    path = folder / CONFIG
    if not path.is_file():
        if (folder / PRETRAINED).is_file():
            raise ValueError(f"{TUNED}, got the pretrained run {folder}: dex finetune {folder} TASK fine-tunes it")
        raise ValueError(f"{TUNED}; {folder} holds no {CONFIG}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        parts = [values[name] for name in ("task", "settings", "pretrained")]
        config = dict(parts[2]).pop("config")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{TUNED}; {path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    settings = recipe.from_dict(parts[1], Settings(), str(path))
    recipe.check(settings)
    pretrained = {name: value for name, value in parts[2].items() if name != "config"}
    return Description(
        task.from_dict(parts[0], str(path)),
        settings,
        from_dict(config, Config(), str(path)),
        pretrained,
        dict(values.get("data") or {}),
    )


def trained_patients(folder: Path) -> frozenset[str]:
    """The hashed patients of the training split; empty if the folder does not record them."""
    path = folder / CASES
    if not path.is_file():
        return frozenset()
    with path.open(encoding="utf-8", newline="") as file:
        return frozenset(row["patient"] for row in csv.DictReader(file) if row["split"] == "train")


def manifest_hash(folder: Path) -> str:
    """SHA-256 of a checkpoint's manifest; "" for a model without one."""
    manifest = folder / "MANIFEST.json"
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ""


def _newest(root: Path, which: Which) -> checkpoint.Checkpoint:
    try:
        saved, passed_over = checkpoint.newest_good(root)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"folder: {str(error).removeprefix('resume: ')}") from error
    if saved is None:
        raise ValueError(f"{TUNED}, with a checkpoint; {root.parent} has none yet")
    best = saved.state.get("best")
    if which == "best" and best and best["step"] != saved.state["step"]:
        try:
            return checkpoint.load(root / f"step-{best['step']:08d}")
        except (checkpoint.CheckpointError, FileNotFoundError) as error:
            passed_over.append(str(error))
    for reason in passed_over:
        warnings.warn(f"passed over {reason}; loaded {saved.folder.name}", stacklevel=3)
    return saved
