import shutil
from pathlib import Path

import dex
from dex.inference.model_card import model_card

EARLIER = Path(__file__).parents[1] / "train" / "earlier_run"


def test_the_card_says_what_the_run_was(tmp_path):
    run = Path(shutil.copytree(EARLIER / "embedded", tmp_path / "Jane Doe"))
    text = model_card(dex.load(run))
    for line in (
        "# DEX ViT 16/2/2",
        "| experts | 4 per layer, 2 per image |",
        "| steps | 3 |",
        "| on held-out images | step 3 | before training |",
        "| fundus | 45 |",
    ):
        assert line in text.splitlines()
    assert "Jane" not in text and str(tmp_path) not in text
    assert "| reconstruction loss | 1.8482 | " in text and "| kNN accuracy of the modality | 62.5% | " in text
    assert "**No downstream study.**" in text and "lists its sources and licences" in text
    sections = [line for line in text.splitlines() if line.startswith("## ")]
    assert sections == [f"## {name}" for name in ("Intended use", "Training", "Measured", "Limits", "Licence", "Use")]


def test_oblong_images_have_both_sides_in_the_card():
    patch = dex.load(EARLIER / "embedded").encoder.patch_size
    text = model_card(dex.load(EARLIER / "embedded", img_size=(2 * patch, 3 * patch)))
    assert f"images at {2 * patch} x {3 * patch} pixels" in text


def test_what_was_not_measured_is_said(tmp_path):
    run = Path(shutil.copytree(EARLIER / "embedded", tmp_path / "run"))
    (run / "metrics.jsonl").unlink()
    text = model_card(dex.load(run))
    assert "Nothing was measured on held-out images." in text and "before training" not in text


def test_a_checkpoint_alone_and_the_control_have_a_card(trained, control, tmp_path):
    alone = shutil.copytree(trained / "checkpoints" / "step-00000012", tmp_path / "a" / "b" / "weights")
    text = model_card(dex.load(alone))
    assert "| modalities | not recorded |" in text and "| modality | images |" not in text
    assert "| experts | none: the monolithic control |" in model_card(dex.load(control))
