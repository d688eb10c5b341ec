"""A tiny pretrained run, and folders with tasks that it can learn in seconds."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A run folder: 32 pixels, patches of 8, width 32, 2 layers, 4 experts, 6 steps on the embedded images."""
    from dex import config
    from dex.train.run import pretrain

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_experts": 4}
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "norm_pix_loss": False}
    run = {"device": "cpu", "precision": "fp32", "log_every": 6, "evaluate_every": 0, "checkpoint_every": 6}
    values = {"model": sizes | decoder, "data": {"batch_size": 8}, "schedule": {"steps": 6}, "run": run}
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    assert pretrain(config.from_dict(values, config.Config()), folder) == 0
    return folder


@pytest.fixture(scope="session")
def discs(tmp_path_factory) -> Path:
    """Pairs of pictures, 40 x 56, and masks: a bright disc of value 255 on noise; 24 of them, one a patient."""
    from PIL import Image

    root = tmp_path_factory.mktemp("discs") / "Scheiben für alle"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:40, 0:56]
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i in range(24):
        inside = (x - rng.integers(14, 42)) ** 2 + (y - rng.integers(12, 28)) ** 2 < rng.integers(6, 11) ** 2
        picture = rng.integers(0, 60, (40, 56)) + 160 * inside
        Image.fromarray(picture.astype(np.uint8)).save(root / "images" / f"p{i:02d}.png")
        Image.fromarray((255 * inside).astype(np.uint8)).save(root / "masks" / f"p{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def shades(tmp_path_factory) -> Path:
    """A folder per class: dark and bright pictures, 24 of each, one a patient."""
    from PIL import Image

    root = tmp_path_factory.mktemp("shades")
    rng = np.random.default_rng(0)
    for label, level in (("bright", 150), ("dark", 60)):
        (root / label).mkdir()
        for i in range(24):
            picture = (level + rng.integers(-40, 40, (32, 32))).astype(np.uint8)
            Image.fromarray(picture).save(root / label / f"{label[0]}{i:02d}.png")
    return root


@pytest.fixture
def disc_data(discs, tmp_path):
    from dex.tasks.cases import open_task

    return open_task(discs, discs, classes=["disc=255"], private=tmp_path / "private")


@pytest.fixture
def shade_data(shades, tmp_path):
    from dex.tasks.cases import open_task

    return open_task(shades, shades, private=tmp_path / "private")


@pytest.fixture
def quick():
    """Settings of seconds."""
    from dex.tasks.recipe import Settings

    return Settings(epochs=3, warmup_epochs=1, batch_size=8, lr=3e-3, feature_size=4, device="cpu", precision="fp32")


@pytest.fixture(scope="session")
def finetuned(pretrained, discs, tmp_path_factory) -> Path:
    """A fine-tuned folder of `discs`: 2 epochs, everything trained."""
    from dex.tasks.cases import open_task
    from dex.tasks.finetune import finetune
    from dex.tasks.recipe import Settings

    root = tmp_path_factory.mktemp("finetuned")
    data = open_task(discs, discs, classes=["disc=255"], private=root / "private")
    settings = Settings(
        epochs=2, warmup_epochs=1, batch_size=8, lr=3e-3, feature_size=4, device="cpu", precision="fp32"
    )
    assert finetune(pretrained, data, settings, root / "out") == 0
    return root / "out"
