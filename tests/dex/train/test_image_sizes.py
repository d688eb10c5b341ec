"""Runs on rectangles and on one channel, from the images to what is exported of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dex
from dex.config import check
from dex.model import MaskedAutoencoder
from dex.model.weights import load_pretrained
from dex.sizing.estimate import estimate
from dex.train import checkpoint
from dex.train.run import pretrain
from dex.train.runlog import read_rows

SMALL = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_experts": 4}
SMALL |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.fixture
def wide(tiny, change):
    """Images of 32 x 64 pixels and one channel, six steps."""
    base = change(tiny, model__img_size=(32, 64), model__in_chans=1, schedule__steps=6)
    return change(base, run__evaluate_every=3, run__evaluate_images=6)


def test_a_run_on_rectangles_of_one_channel(wide, change, tmp_path):
    out, halves = tmp_path / "out", tmp_path / "halves"
    assert pretrain(wide, out) == 0
    assert pretrain(change(wide, run__stop_at=2), halves) == 0
    assert pretrain(wide, halves, resume="auto") == 0
    first, second = (checkpoint.tensors(f / "checkpoints" / "step-00000006") for f in (out, halves))
    assert first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())
    assert first["model.encoder.pos_embed"].shape == (1, 1 + 2 * 4, 32)
    assert first["model.encoder.patch_embed.weight"].shape == (32, 16 * 16)
    picture = next((out / "pictures").glob("reconstructions-step-*.png"))
    with Image.open(picture) as image:
        assert image.width > 0
    assert all(np.isfinite(row["val_loss"]) for row in read_rows(out / "metrics.jsonl") if "val_loss" in row)
    with pytest.raises(ValueError, match=r"model\.img_size: expected \[32, 64\], got \[64, 32\]"):
        pretrain(change(wide, model__img_size=(64, 32)), out, resume="auto")
    assert estimate(change(wide, model__img_size=64), 6).activations > estimate(wide, 6).activations > 0

    loaded = dex.load(out)
    assert (loaded.encoder.img_size, loaded.encoder.grid, loaded.encoder.in_chans) == ((32, 64), (2, 4), 1)
    colours = np.random.default_rng(0).integers(0, 256, (2, 3, 80, 80)).astype(np.uint8)
    assert loaded.embed(colours).cls.shape == (2, 32)
    other = dex.load(out, img_size=(64, 48))
    assert other.encoder.pos_embed.shape == (1, 1 + 4 * 3, 32) and other.embed(colours).patches.shape == (2, 32)


def test_it_is_exported_as_it_is(wide, tmp_path, capsys):
    from dex.cli import main

    assert pretrain(wide, tmp_path / "out") == 0
    for format in ("safetensors", "timm", "torch-export"):
        assert main(["export", str(tmp_path / "out"), "--out", str(tmp_path / format), "--format", format]) == 0
    described = json.loads((tmp_path / "torch-export" / "config.json").read_text())
    assert described["input"]["images"] == ["batch", 1, 32, 64] and described["input"]["mean"] == [0.449]
    assert described["output"]["tokens"] == ["batch", 9, 32]
    assert dex.load(tmp_path / "safetensors").encoder.img_size == (32, 64)
    timm = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert timm["model_args"]["img_size"] == [32, 64] and timm["model_args"]["in_chans"] == 1


def test_a_run_starts_from_a_rectangle_of_another_size(wide, change, tmp_path, capsys):
    assert pretrain(wide, tmp_path / "first") == 0
    longer = change(wide, model__img_size=(64, 32), model__init=str(tmp_path / "first"), run__stop_at=1)
    assert pretrain(longer, tmp_path / "second") == 0
    assert "weights of" in capsys.readouterr().out


def test_three_colours_become_one_channel_that_sees_the_same(tmp_path):
    """A grey image, three equal channels before, gives the same tokens."""
    colours = MaskedAutoencoder(
        img_size=64, num_experts=0, top_k=1, **{k: v for k, v in SMALL.items() if k != "num_experts"}
    )
    with torch.no_grad():
        colours.encoder.patch_embed.bias.normal_()
    save_file({k: v.clone() for k, v in colours.reference_state_dict().items()}, tmp_path / "dense.safetensors")
    grey = MaskedAutoencoder(img_size=64, in_chans=1, **SMALL)
    report = load_pretrained(grey, tmp_path / "dense.safetensors")
    assert {"patch_embed.proj.weight", "patch_embed.proj.bias", "decoder_pred.weight"} <= set(report.resized)
    pixels = (torch.rand(2, 1, 64, 64) * 255).byte()
    from dex.data import center

    want = colours.encoder.patch_embed.weight
    with torch.no_grad():
        before = colours.eval().encoder(center(pixels, 64, 3))
        for block in grey.encoder.blocks:
            block.dex.path = "director"
        after = grey.eval().encoder(center(pixels, 64, 1))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert want.shape[1] == 3 * grey.encoder.patch_embed.weight.shape[1]
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight: expected \[32, 3, P, P\], got \[32, 1, 16, 16\]"):
        load_pretrained(colours, grey.reference_state_dict())


@pytest.mark.parametrize(
    "size, message",
    [
        ((30, 64), r"model.img_size: expected a multiple of model.patch_size = 16, got \(30, 64\)"),
        ((0, 64), r"model.img_size: expected at least 1, got \(0, 64\)"),
    ],
)
def test_a_size_that_cannot_be_is_named(size, message, wide, change):
    with pytest.raises(ValueError, match=message):
        check(change(wide, model__img_size=size))


def test_a_side_above_the_datas_is_named(wide, change, tmp_path):
    with pytest.raises(ValueError, match=r"model.img_size: expected at most 256 pixels, the side"):
        pretrain(change(wide, model__img_size=(256, 512)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
