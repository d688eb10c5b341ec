"""`dex.weights` takes what `dex.load` takes; the rest is in tests/dex/model/test_weights.py."""

import shutil
from pathlib import Path

import pytest
import torch

import dex
from dex.config import Config
from dex.inference.export import export
from dex.model import MaskedAutoencoder, weights
from dex.weights import load_pretrained

RUN = Path(__file__).parent / "train" / "earlier_run" / "embedded"


def model(**options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_experts": 4}
    return MaskedAutoencoder(**{**sizes, "decoder_embed_dim": 16, **_decoder(), **options})


def _decoder():
    of_run = dex.load(RUN).config.model
    return {"decoder_depth": of_run.decoder_depth, "decoder_num_heads": of_run.decoder_num_heads}


def test_runs_checkpoints_and_exports_are_the_same_weights(tmp_path):
    loaded = dex.load(RUN)
    export(loaded, "safetensors", tmp_path / "model")
    want = loaded.model.state_dict()
    places = [RUN, str(loaded.folder), tmp_path / "model", tmp_path / "model" / "model.safetensors"]
    for place in places:
        mine = model()
        report = load_pretrained(mine, place)
        assert (report.naming, report.resized, report.kept) == ("published DEX", (), ())
        assert all(torch.equal(tensor, want[name]) for name, tensor in mine.state_dict().items())


def test_another_image_size_is_resized():
    assert load_pretrained(model(img_size=64), RUN).resized == ("pos_embed", "decoder_pos_embed")


def test_what_fits_not_is_named(tmp_path):
    with pytest.raises(ValueError, match="experts.4"):
        load_pretrained(model(num_experts=5), RUN)
    shutil.copy(RUN / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="run: expected a run with a checkpoint"):
        load_pretrained(model(), tmp_path)
    assert isinstance(dex.load(RUN).config, Config)


def test_other_names_are_those_of_the_model():
    from dex import weights as public

    assert all(getattr(public, name) is getattr(weights, name) for name in public.__all__ if name != "load_pretrained")
