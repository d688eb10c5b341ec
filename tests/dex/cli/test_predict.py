"""`dex predict` from the command line, on a tiny model that was fine-tuned for it."""

import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from dex.common import exits


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """A folder of `dex finetune`: bright squares on noise."""
    from dex import config
    from dex.tasks.cases import open_task
    from dex.tasks.finetune import finetune
    from dex.tasks.recipe import Settings
    from dex.train.run import pretrain

    root = tmp_path_factory.mktemp("predict")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_experts": 2}
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "norm_pix_loss": False}
    run = {"device": "cpu", "precision": "fp32", "evaluate_every": 0}
    values = {"model": sizes | decoder, "data": {"batch_size": 4}, "schedule": {"steps": 1}, "run": run}
    assert pretrain(config.from_dict(values, config.Config()), root / "run") == 0
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / "data" / name).mkdir(parents=True)
    for i in range(8):
        image, mask = rng.integers(0, 60, (20, 24)).astype(np.uint8), np.zeros((20, 24), np.uint8)
        image[5:12, i : i + 9], mask[5:12, i : i + 9] = 220, 1
        Image.fromarray(image).save(root / f"data/images/p{i}.png")
        Image.fromarray(mask).save(root / f"data/masks/p{i}.png")
    data = open_task(root / "data", classes=["square=1"], private=root / "private")
    settings = Settings(epochs=1, warmup_epochs=0, batch_size=4, feature_size=4, device="cpu", precision="fp32")
    assert finetune(root / "run", data, settings, root / "tuned") == 0
    return root


def test_masks_of_a_folder(run, finetuned):
    (finetuned / "data/images/broken.png").write_bytes(b"no picture")
    words = ("predict", finetuned / "tuned", finetuned / "data/images", "--out", "out", "--overlays", "--workers", "0")
    code, out, _ = run(*words)
    assert code == 0 and "out: 8 of 9 files" in out
    assert "refused: 1 files (unreadable 1); out.private/files.csv lists them" in out
    code, again, _ = run(*words)
    assert code == 0 and again == out
    (finetuned / "data/images/broken.png").unlink()


def test_nothing_that_can_be_used_is_a_failure(run, finetuned, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    code, _, err = run("predict", finetuned / "tuned", "a.png", "--out", "out", "--workers", "0")
    said = "file: expected at least one readable file, got none; "
    assert code == 1 and f"{said}{tmp_path / 'a.png'}: unreadable" in err and err.count("\n") == 1


def test_a_second_start_with_the_output_among_the_files(run, finetuned, tmp_path):
    shutil.copytree(finetuned / "data/images", tmp_path / "scans")
    words = ("predict", finetuned / "tuned", "scans", "--out", "scans/masks ü", "--workers", "0")
    for _ in range(2):
        code, out, _ = run(*words)
        assert code == 0 and "8 of 8 files" in out


def test_a_signal_leaves_what_is_written(run, finetuned, monkeypatch):
    import os

    from dex.tasks import predict

    write = predict._write_case

    def and_stop(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*given)

    monkeypatch.setattr(predict, "_write_case", and_stop)
    words = ("predict", finetuned / "tuned", finetuned / "data/images", "--out", "out", "--workers", "0")
    code, _, err = run(*words)
    assert code == exits.PREEMPTED and "the same command resumes" in err
    monkeypatch.setattr(predict, "_write_case", write)
    code, out, _ = run(*words)
    assert code == 0 and "8 of 8 files" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nowhere", "a.png", "--out", "o"), "folder: expected a folder that dex finetune wrote; nothing at nowhere"),
        ((".", "IMAGES", "--out", "o"), "folder: expected a folder that dex finetune wrote"),
        (("TUNED", "absent.png", "--out", "o"), "nothing at absent.png"),
        (("TUNED", "IMAGES", "--out", ""), "out: expected a folder, got ''"),
        (("TUNED", "IMAGES", "--out", "o", "--batch-size", "0"), "batch-size: expected at least 1"),
        (("TUNED", "IMAGES", "--out", "o", "--window", "0.5"), "window: expected a factor above 1"),
        (("TUNED", "IMAGES"), "out: expected a value, got nothing"),
        (("TUNED", "--out", "o"), "FILE: expected a value, got nothing"),
    ],
)
def test_wrong_usage_writes_nothing(run, finetuned, tmp_path, words, says):
    names = {"TUNED": finetuned / "tuned", "IMAGES": finetuned / "data/images"}
    code, _, err = run("predict", *(names.get(word, word) for word in words))
    assert code == 2 and says in err
    assert not list(tmp_path.iterdir())


def test_help(run):
    code, out, _ = run("predict", "--help")
    assert code == 0 and "--probabilities" in out and "75 stopped by a signal" in out
