"""The weights that a new run starts from, `model.init`: a dense ViT or a DEX of elsewhere, or a run of one's own."""

from dataclasses import replace
from pathlib import Path

import torch

from dex.common.random import step_seed
from dex.config import Config, from_dict
from dex.model import MaskedAutoencoder
from dex.model.build import build_model, init_routers_
from dex.model.weights import LoadReport, load_pretrained
from dex.train import checkpoint

CHECKPOINTS = "checkpoints"
_INIT = -1
"""The 'step' whose seed draws the initial weights."""
_EXPECTED = (
    "model.init: expected a file of weights (.safetensors, .pth, .bin, .onnx), a run folder or a checkpoint folder"
)


def first_model(config: Config) -> MaskedAutoencoder:
    """The model at step 0 of a run with this configuration, on the host; draws from torch's global generator.

    Weights of ``model.init`` are not in it yet: `load_initial` brings them.
    """
    torch.manual_seed(step_seed(config.run.seed, _INIT))
    return build_model(config)


def check_initial(config: Config) -> None:
    """FileNotFoundError or ValueError when ``model.init`` names nothing that weights could come from."""
    if config.model.init is None:
        return
    place = Path(config.model.init).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"{_EXPECTED}; nothing at {place}")
    if place.is_dir() and not checkpoint.is_checkpoint(place) and not (place / CHECKPOINTS).is_dir():
        raise ValueError(f"{_EXPECTED}; {place} is another folder")


def load_initial(model: MaskedAutoencoder, config: Config) -> LoadReport:
    """Load what ``model.init`` names into ``model``, strictly; see `dex.model.weights.load_pretrained`.

    A dense ViT is upcycled: director and experts of a layer start as its MLP; routers, and a decoder that the file
    lacks, keep what they were drawn as. Raises: ValueError naming the field and what does not fit; nothing has changed
    then.
    """
    place = Path(config.model.init).expanduser()
    try:
        earlier = _run_model(place) if place.is_dir() else None
        if earlier is None:
            report = load_pretrained(model, place)
        else:
            report = load_pretrained(model, earlier.reference_state_dict(), earlier.encoder.grid)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"model.init: {place}: {error}") from error
    if report.upcycled:
        init_routers_(model, config)
    return report


def _run_model(place: Path) -> MaskedAutoencoder:
    """The model of a run's newest good checkpoint, or of one checkpoint."""
    if checkpoint.is_checkpoint(place):
        saved = checkpoint.load(place)
    else:
        saved, _ = checkpoint.newest_good(place / CHECKPOINTS)
        if saved is None:
            raise ValueError("expected a run with a checkpoint, got none that is whole")
    config = from_dict(saved.state["config"], Config(), f"{saved.folder}/state.json")
    with torch.device("meta"):
        model = build_model(replace(config, model=replace(config.model, backend=None)))
    model.to_empty(device="cpu")
    checkpoint.restore_model(saved, model)
    return model
