"""Loads a pretrained model from its run folder, a checkpoint or an exported file; the training data are not needed."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from dex.common.folders import RUN, require
from dex.common.shapes import Size, check_size, height_width, plain_size
from dex.config import Config, from_dict
from dex.inference import embed, model_file
from dex.inference.embed import Embedding
from dex.inference.preprocess import Preprocessed, preprocess
from dex.model import MaskedAutoencoder, VisionTransformer
from dex.model.build import build_model
from dex.model.weights import resize_pos_embed
from dex.train import checkpoint
from dex.train.runlog import CONFIG, STARTS

PATHS = ("experts", "director")
FINE_TUNED = "finetune.yaml"
"""The file that marks a folder of ``dex finetune``, whose models ``dex.tasks.load`` loads."""


class Loaded(NamedTuple):
    """A pretrained model and facts about its training."""

    model: MaskedAutoencoder
    """In evaluation mode, on the host, in float32."""
    config: Config
    """The run's configuration at this checkpoint; ``config.model.img_size`` is the size that ``model`` takes."""
    modalities: tuple[str, ...]
    """Names of the modalities in the training data; empty for a checkpoint outside its run folder."""
    step: int
    """Training steps done."""
    folder: Path
    """The folder of the weights."""

    @property
    def encoder(self) -> VisionTransformer:
        """``images [B, C, H, W] -> tokens [B, 1 + L, D]``, CLS first; images as ``dex.data.center`` gives them."""
        return self.model.encoder

    @property
    def path(self) -> str:
        """``"experts"`` or ``"director"``: what the encoder's forward computes."""
        return path_of(self.encoder)

    def preprocess(
        self,
        file: str | os.PathLike[str],
        modality: str | None = None,
        planes: Sequence[str] = ("auto",),
        **overrides: Any,
    ) -> Preprocessed:
        """The images of a picture, a volume or a DICOM folder; see ``dex.inference.preprocess.preprocess``."""
        return preprocess(file, modality, planes, **overrides)

    def embed(
        self,
        inputs: embed.Inputs,
        *,
        layers: Sequence[int] = (),
        modality: str | None = None,
        batch_size: int = 64,
        precision: str = "fp32",
    ) -> Embedding:
        """Features of files or arrays.

        Args:
            inputs: one or a list of: a path for ``preprocess``; a result of ``preprocess``; an image ``[H, W]`` or
                ``[C, H, W]``; images ``[B, C, H, W]``. Arrays are numpy or torch, uint8 or floats within [0, 1], with
                one or three channels. The centre square is resized to the model's image size.
            layers: blocks, counted from 0, whose CLS token to return as well.
            modality: of files, as in ``preprocess``.
            batch_size: images per forward pass.
            precision: ``"fp32"``, or ``"bf16"`` for autocast.

        Runs on the model's device, without exploration noise. Raises: ValueError naming the argument.
        """
        images = [image for item in embed.items(inputs) for image in embed.images_of(item, modality)]
        return embed.embed(self.encoder, images, layers=layers, batch_size=batch_size, precision=precision)


class _Source(NamedTuple):
    """The weights of a model, and what belongs to them."""

    config: Config
    modalities: tuple[str, ...]
    step: int
    folder: Path
    fill: Callable[[MaskedAutoencoder], None]
    """Copies the weights into a model with this configuration."""
    path: str = "experts"


def load(
    run: str | os.PathLike[str], *, img_size: Size | None = None, path: str | None = None, ema: bool = False
) -> Loaded:
    """The model of a run folder, with the weights of its newest good checkpoint; of one checkpoint folder; or of a
    folder or a ``.safetensors`` file that ``dex export`` wrote.

    Args:
        run: the folder or file.
        img_size: side of the model's input images, or (height, width), multiples of its patch size. Position embeddings
            are resized. None: as trained.
        path: ``"experts"``, or ``"director"`` for the dense model that follows them. None: experts, unless an exported
            model states otherwise.
        ema: load the averaged weights that a run with ``optim.ema`` keeps.

    Every hash is checked. Damaged checkpoints are skipped with a warning, for the newest good one. The model uses the
    default backend of each kernel on its device, not ``model.backend`` of the run.

    Raises: FileNotFoundError and ValueError naming the argument; ``dex.train.checkpoint.CheckpointError`` (a
    ValueError) naming the damaged file or the tensor that does not fit.
    """
    source = _find(run, ema)
    with torch.device("meta"):
        model = build_model(replace(source.config, model=replace(source.config.model, backend=None)))
    model.to_empty(device="cpu")
    source.fill(model)
    config = source.config
    if img_size is not None:
        resize_(model, img_size)
        config = replace(config, model=replace(config.model, img_size=model.encoder.img_size))
    choose_path_(model.encoder, source.path if path is None else path)
    return Loaded(model.eval(), config, source.modalities, source.step, source.folder)


def path_of(encoder: VisionTransformer) -> str:
    """``"experts"`` or ``"director"``; a monolithic encoder has one path, ``"experts"``."""
    return encoder.dex_layers[0].path if encoder.dex_layers else PATHS[0]


def choose_path_(encoder: VisionTransformer, path: str) -> None:
    """Make ``encoder`` compute with its experts or its directors. ValueError."""
    if path not in PATHS:
        raise ValueError(f"path: expected one of {', '.join(PATHS)}, got {path!r}")
    if path == "director" and not encoder.dex_layers:
        raise ValueError("path: expected experts for a monolithic model, which has no director, got 'director'")
    if path != path_of(encoder):
        for layer in encoder.dex_layers:
            layer.path = path


def resize_(model: MaskedAutoencoder, img_size: Size) -> None:
    """Change the image size of ``model``; its position embeddings are resized. ValueError."""
    encoder = model.encoder
    check_size("img_size", img_size)
    patch, before = encoder.patch_size, encoder.grid
    if any(side % patch for side in height_width(img_size)):
        raise ValueError(f"img_size: expected a multiple of the patch size, {patch}, got {img_size!r}")
    encoder.img_size = plain_size(img_size)
    encoder.pos_embed = resize_pos_embed(encoder.pos_embed, encoder.grid_size, before)
    model.decoder_pos_embed = resize_pos_embed(model.decoder_pos_embed, encoder.grid_size, before)


def _find(run: str | os.PathLike[str], ema: bool) -> _Source:
    """The source of the model that ``run`` names."""
    place = require(run, RUN)
    if ema and (not place.is_dir() or model_file.is_model_folder(place)):
        raise ValueError(f"ema: expected a run or a checkpoint, got the exported model {place}")
    if not place.is_dir():
        return _of_file(place)
    if model_file.is_model_folder(place):
        return _of_model(place, *model_file.read_folder(place))
    inside = checkpoint.is_checkpoint(place)
    top = place.resolve().parent.parent if inside else place
    if (top / FINE_TUNED).is_file():
        raise ValueError(
            f"{RUN}, got {place}, a model fine-tuned by dex finetune: dex evaluate and dex predict take it"
        )
    try:
        if inside:
            return _of_checkpoint(checkpoint.load(place), top, ema)
        if not (place / CONFIG).is_file():
            raise ValueError(f"{RUN}; {place} holds neither {CONFIG} nor {model_file.WEIGHTS}")
        saved, passed_over = checkpoint.newest_good(place / "checkpoints")
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"run: {str(error).removeprefix('resume: ')}") from error
    if saved is None:
        raise ValueError(
            f"run: expected a run with a checkpoint; {place} has none yet. The first is written after "
            "run.checkpoint_every steps, or when a signal stops the run"
        )
    for reason in passed_over:
        warnings.warn(f"dex.load: passed over {reason}; loaded {saved.folder.name}", stacklevel=3)
    return _of_checkpoint(saved, place, ema)


def _of_checkpoint(saved: checkpoint.Checkpoint, run: Path, ema: bool) -> _Source:
    config = from_dict(saved.state["config"], Config(), f"{saved.folder}/state.json")
    modalities = _modalities(run)

    def fill(model: MaskedAutoencoder) -> None:
        checkpoint.restore_model(saved, model, averages=ema)

    return _Source(config, modalities, saved.state["step"], saved.folder, fill)


def _of_file(file: Path) -> _Source:
    if file.suffix != ".safetensors":
        raise ValueError(f"{RUN}, got the file {file}")
    description = model_file.read_description(file)
    if description is None:
        raise ValueError(f"{RUN}; {file} does not describe its model")
    return _of_model(file.parent, description, load_file(file))


def _of_model(folder: Path, description: model_file.Description, tensors: dict[str, torch.Tensor]) -> _Source:
    def fill(model: MaskedAutoencoder) -> None:
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"run: {folder}: {' '.join(str(error).split())}") from error

    config, modalities, step, path = description
    return _Source(config, modalities, step, folder, fill, path)


def _modalities(run: Path) -> tuple[str, ...]:
    path = run / STARTS
    if not path.is_file():
        return ()
    try:
        return tuple(json.loads(path.read_text(encoding="utf-8"))["starts"][-1]["data"]["images"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"run: expected a run's starts in {path}, got {type(error).__name__}: {error}") from error
