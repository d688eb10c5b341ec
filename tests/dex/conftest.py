import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dex import config

sys.path.append(os.path.dirname(__file__))  # for browser, evaluations and killing


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # The tensors are tiny: a second thread costs more than it brings.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(images) -> config.Config:
    """Seconds on one core: 64 pixels, 2 layers, 4 experts, 12 steps."""
    return config.from_dict(
        {
            "model": {
                "img_size": 64,
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 2,
                "num_experts": 4,
                "decoder_embed_dim": 16,
                "decoder_depth": 1,
                "decoder_num_heads": 2,
                "norm_pix_loss": False,
            },
            "data": {"path": str(images), "batch_size": 8},
            "optim": {"base_lr": 0.2},
            "schedule": {"steps": 12, "warmup": 0.25},
            "run": {
                "device": "cpu",
                "precision": "fp32",
                "log_every": 4,
                "evaluate_every": 0,
                "evaluate_images": 6,
                "checkpoint_every": 5,
            },
        },
        config.Config(),
    )


def changed(base: config.Config, **fields) -> config.Config:
    """``base`` with ``section__field=value`` replaced."""
    for name, value in fields.items():
        section, field = name.split("__")
        base = dataclasses.replace(base, **{section: dataclasses.replace(getattr(base, section), **{field: value})})
    return base


@pytest.fixture
def change():
    return changed


@pytest.fixture
def dex_process():
    """Starts `python -m dex ARGUMENTS` on one thread; what still runs at the end of the test is killed."""
    started = []

    def start(*arguments, **options):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "dex", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def on_two_ranks():
    """Runs ``program RANK ARGUMENTS`` as each of two ranks of gloo; the JSON that each has printed."""

    def run(program, *arguments):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        path = os.pathsep.join(p for p in sys.path if p)
        shared = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = [
            subprocess.Popen(
                [sys.executable, str(program), str(rank), *map(str, arguments)],
                stdout=subprocess.PIPE,
                text=True,
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]
        said = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0]
        return [json.loads(words) for words in said]

    return run


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
    import numpy as np
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
def finetuned(pretrained, discs, tmp_path_factory) -> Path:
    """A fine-tuned folder of `discs`: 2 epochs, everything trained."""
    from dex.tasks.cases import open_task
    from dex.tasks.finetune import finetune
    from dex.tasks.recipe import Settings

    root = tmp_path_factory.mktemp("finetuned")
    data = open_task(discs, discs, classes=["disc=255"], private=root / "private")
    settings = Settings(
        epochs=2, warmup_epochs=1, batch_size=8, lr=3e-3, feature_size=4, device="cpu", precision="fp32", workers=0
    )
    assert finetune(pretrained, data, settings, root / "out") == 0
    return root / "out"
