import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dex
from dex.model.weights import resize_pos_embed
from dex.train import checkpoint as checkpoints
from dex.train import run as training
from dex.train.checkpoint import CheckpointError

EARLIER = Path(__file__).parents[1] / "train" / "earlier_run"


@pytest.fixture
def copied(trained, tmp_path):
    """A copy to spoil, away from its data."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def checkpoint(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def pictures(config):
    size = config.model.img_size
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_features_are_those_of_the_trained_model_to_the_bit(tiny, tmp_path):
    run = training.prepare(tiny, tmp_path / "run")
    assert run.run() == 0
    model = run.trainer.model.eval()
    drawn = torch.get_rng_state()
    loaded = dex.load(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert loaded.encoder is loaded.model.encoder and not loaded.model.training
    images = pictures(tiny)
    with torch.no_grad():
        want, features = model.encoder(images), loaded.encoder(images)
        assert torch.equal(features, want) and features.shape == (3, 17, 32)
        noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
        for a, b in zip(loaded.model(images, mask_noise=noise)[:5], model(images, mask_noise=noise)[:5], strict=True):
            assert torch.equal(a, b)
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.model.named_parameters()} == asked


def test_the_record_says_what_was_trained(trained, tiny):
    loaded = dex.load(str(trained))
    assert loaded.config == tiny
    assert loaded.modalities == ("ct", "mr", "us")
    assert (loaded.step, loaded.folder) == (12, checkpoint(trained, 12))


def test_one_checkpoint_is_chosen_by_its_folder(trained, tmp_path, monkeypatch):
    loaded, newest = dex.load(checkpoint(trained, 5)), dex.load(trained)
    assert (loaded.step, loaded.modalities) == (5, ("ct", "mr", "us"))
    assert not torch.equal(loaded.encoder.cls_token, newest.encoder.cls_token)
    monkeypatch.chdir(checkpoint(trained, 5))
    assert dex.load(".").modalities == ("ct", "mr", "us")
    alone = shutil.copytree(checkpoint(trained, 5), tmp_path / "weights")
    apart = dex.load(alone)
    assert (apart.step, apart.modalities) == (5, ())
    assert torch.equal(apart.encoder.cls_token, loaded.encoder.cls_token)


@pytest.mark.parametrize("name", ["folder", "embedded"])
def test_a_run_of_before_the_packages_loads_without_its_data(name, tmp_path):
    run = Path(shutil.copytree(EARLIER / name, tmp_path / name))
    loaded = dex.load(run)
    counts = json.loads((run / "run.json").read_text())["starts"][-1]["data"]["images"]
    assert loaded.step == 3 and loaded.modalities == tuple(counts)
    assert loaded.encoder(pictures(loaded.config)).isfinite().all()


def change_model(folder, **fields):
    """Other values of ``model`` in a checkpoint's configuration, under hashes that agree."""
    state = folder / "state.json"
    values = json.loads(state.read_text())
    values["config"]["model"] |= fields
    state.write_text(json.dumps(values))
    files = json.loads((folder / "MANIFEST.json").read_text())["files"] | {"state.json": checkpoints._digest(state)}
    (folder / "MANIFEST.json").write_text(checkpoints._manifest_text(values["step"], files))


def test_the_backend_of_the_run_binds_nobody(copied):
    """A run on a GPU is loaded where its backend cannot run."""
    change_model(checkpoint(copied, 12), backend="triton")
    loaded = dex.load(copied)
    assert loaded.config.model.backend == "triton"
    assert loaded.encoder(pictures(loaded.config)).isfinite().all()


def test_weights_of_another_model_are_named(copied):
    change_model(checkpoint(copied, 12), depth=3)
    with pytest.raises(CheckpointError, match="step-00000012: model.encoder.blocks.2.* is missing"):
        dex.load(copied)
    change_model(checkpoint(copied, 12), depth=2, decoder_embed_dim=32)
    with pytest.raises(CheckpointError, match=r"model.mask_token: expected torch.float32 \[1, 1, 32\], got .*16\]"):
        dex.load(copied)


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(copied):
    (shard,) = checkpoint(copied, 12).glob("*.safetensors")
    flip(shard)
    with pytest.warns(UserWarning, match=f"passed over {shard}: damaged, .*; loaded step-00000010"):
        assert dex.load(copied).step == 10
    with pytest.raises(CheckpointError, match=f"run: {shard}: damaged"):
        dex.load(checkpoint(copied, 12))
    for step in (5, 10):
        (checkpoint(copied, step) / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="run: no checkpoint in .* can be read; .*MANIFEST.json: missing"):
        dex.load(copied)


def test_a_run_without_a_checkpoint_is_told(copied):
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(ValueError, match=f"run: expected a run with a checkpoint; {copied} has none yet"):
        dex.load(copied)


def test_starts_that_cannot_be_read_are_named(copied):
    (copied / "run.json").write_text('{"starts": []}')
    with pytest.raises(ValueError, match=f"run: expected a run's starts in {copied}/run.json"):
        dex.load(copied)


@pytest.mark.parametrize("path", ["", None, 3])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ValueError, match=f"run: expected a run folder, one of its .*, got {path!r}"):
        dex.load(path)


def test_a_path_to_nothing_to_a_file_or_to_another_folder_is_refused(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"run: expected a run folder, .*; nothing at {tmp_path}/absent"):
        dex.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=f"run: expected a run folder, .*, got the file {trained}/config.yaml"):
        dex.load(trained / "config.yaml")
    with pytest.raises(ValueError, match="holds neither config.yaml nor model.safetensors"):
        dex.load(trained / "checkpoints")


def test_the_example_of_the_docs_runs(trained, tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "pretraining.md").read_text()
    (example,) = re.findall(r"^```python needs=run\n(.*?)^```", page, flags=re.M | re.S)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "pretraining.md", "exec"), names)
    assert names["features"].shape == (4, 32) and names["features"].isfinite().all()


def test_importing_dex_stays_light():
    heavy = "{'torch', 'numpy', 'yaml', 'PIL', 'matplotlib', 'dex.inference', 'dex.config'} & set(sys.modules)"
    code = f"import sys, dex; assert not {heavy}, {heavy}; assert callable(dex.load); from dex import load"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="module 'dex' has no attribute 'laod'"):
        dex.laod  # noqa: B018


def test_another_image_size_resizes_the_positions(trained):
    loaded, as_trained = dex.load(trained, img_size=96), dex.load(trained)
    assert loaded.config.model.img_size == loaded.encoder.img_size == 96
    assert loaded.encoder.pos_embed.shape == (1, 1 + 36, 32) and loaded.model.decoder_pos_embed.shape == (1, 37, 16)
    assert torch.equal(loaded.encoder.pos_embed, resize_pos_embed(as_trained.encoder.pos_embed, 6))
    assert loaded.encoder(torch.zeros(2, 3, 96, 96)).shape == (2, 37, 32)
    assert torch.equal(dex.load(trained, img_size=64).encoder.pos_embed, as_trained.encoder.pos_embed)
    for size, expected in (
        (0, "a positive whole number, or two, height and width"),
        (65, "a multiple of the patch size, 16"),
        (64.0, "a positive whole number, or two, height and width"),
        (True, "a positive whole number, or two, height and width"),
    ):
        with pytest.raises(ValueError, match=f"img_size: expected {expected}, got"):
            dex.load(trained, img_size=size)


def test_the_director_is_the_dense_model(trained, control):
    loaded = dex.load(trained, path="director")
    assert loaded.path == "director" and dex.load(trained).path == "experts"
    images, dense = pictures(loaded.config), dex.load(trained).encoder
    with torch.no_grad():
        experts = dense(images)
        for block in dense.blocks:
            block.mlp, block.dex = block.dex.director, None
        assert torch.equal(loaded.encoder(images), dense(images))
        assert not torch.equal(loaded.encoder(images), experts)
    with pytest.raises(ValueError, match="path: expected one of experts, director, got 'both'"):
        dex.load(trained, path="both")
    assert dex.load(control).path == "experts"
    with pytest.raises(ValueError, match="path: expected experts for a monolithic model"):
        dex.load(control, path="director")


def test_preprocess_takes_what_the_set_was_prepared_with(trained, tmp_path):
    """16-bit PNG of HU + 32768, as data sets of CT are handed out."""
    hounsfield = np.full((256, 256), -200, np.int32)
    hounsfield[64:192, 64:192], hounsfield[96:160, 96:160] = 100, 400
    Image.fromarray((hounsfield + 32768).astype(np.uint16)).save(tmp_path / "slice.png")
    options = {"slope": 1.0, "intercept": -32768.0}
    (image,) = dex.load(trained).preprocess(tmp_path / "slice.png", "CT", **options).images
    assert sorted(image.unique().tolist()) == [0, 128, 255]  # (HU + 200) / 600
