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
        "| held-out loss | 2.1260 at step 3 |",
        "| modality by kNN, held out | 75.0% |",
        "| fundus | 46 |",
    ):
        assert line in text.splitlines()
    assert "Jane" not in text and str(tmp_path) not in text


def test_a_checkpoint_alone_and_the_control_have_a_card(trained, control, tmp_path):
    alone = shutil.copytree(trained / "checkpoints" / "step-00000012", tmp_path / "a" / "b" / "weights")
    text = model_card(dex.load(alone))
    assert "| modalities | not recorded |" in text and "| modality | images |" not in text
    assert "| experts | none: the monolithic control |" in model_card(dex.load(control))
