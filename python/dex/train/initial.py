"""The weights that a new run starts from, ``model.init``: a dense ViT, a DEX from elsewhere, or an earlier run."""

from dataclasses import replace
from pathlib import Path

import torch

from dex.common.folders import INIT, require
from dex.common.random import step_seed
from dex.config import Config, from_dict
from dex.model import MaskedAutoencoder
from dex.model.build import build_model, init_routers_
from dex.model.weights import LoadReport, load_pretrained
from dex.train import checkpoint

CHECKPOINTS = "checkpoints"
_INIT = -1
"""Step number whose seed draws the initial weights."""


def first_model(config: Config) -> MaskedAutoencoder:
    """The model at step 0 of a run with this configuration, on the host. Reseeds torch's global generator.

    ``load_initial`` loads the weights of ``model.init``.
    """
    torch.manual_seed(step_seed(config.run.seed, _INIT))
    return build_model(config)


def check_initial(config: Config) -> None:
    """FileNotFoundError or ValueError if ``model.init`` is neither a file, a run folder nor a checkpoint folder."""
    if config.model.init is None:
        return
    path = require(Path(config.model.init).expanduser(), INIT)
    if path.is_dir() and not checkpoint.is_checkpoint(path) and not (path / CHECKPOINTS).is_dir():
        raise ValueError(f"{INIT}, got the folder {path}, which is neither")


def load_initial(model: MaskedAutoencoder, config: Config) -> LoadReport:
    """Load the weights of ``model.init`` into ``model``, strictly; see ``dex.model.weights.load_pretrained``.

    A dense ViT is upcycled: the director and experts of a layer start as its MLP. Routers, and a decoder that the file
    lacks, keep their random initialisation. Raises: ValueError naming the field and what does not fit; the model is
    then unchanged.
    """
    path = Path(config.model.init).expanduser()
    try:
        earlier = _run_model(path) if path.is_dir() else None
        if earlier is None:
            report = load_pretrained(model, path)
        else:
            report = load_pretrained(model, earlier.reference_state_dict(), earlier.encoder.grid)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"model.init: {path}: {error}") from error
    if report.upcycled:
        init_routers_(model, config)
    return report


def _run_model(path: Path) -> MaskedAutoencoder:
    """The model of a checkpoint folder, or of the newest good checkpoint in a run folder."""
    if checkpoint.is_checkpoint(path):
        saved = checkpoint.load(path)
    else:
        saved, _ = checkpoint.newest_good(path / CHECKPOINTS)
        if saved is None:
            raise ValueError("expected a run with a checkpoint, got none")
    config = from_dict(saved.state["config"], Config(), f"{saved.folder}/state.json")
    with torch.device("meta"):
        model = build_model(replace(config, model=replace(config.model, backend=None)))
    model.to_empty(device="cpu")
    checkpoint.restore_model(saved, model)
    return model
