"""A fine-tuned model from its folder alone."""

import json
import shutil
import warnings

import pytest
import torch

from dex.inference.load import load
from dex.tasks.load import load_task_model, read_description
from dex.train import checkpoint


def test_the_best_and_the_last_checkpoint_and_one_by_name(finetuned):
    saved, _ = checkpoint.newest_good(finetuned / "checkpoints")
    last = load_task_model(finetuned, "last")
    assert last.step == saved.state["step"] and not last.model.training
    best = load_task_model(finetuned)
    assert best.step == saved.state["best"]["step"] and len(best.sha256) == 64
    named = load_task_model(best.folder)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(named.model(images), best.model(images))
    assert best.task.classes == ("disc",) and best.pretrained["run"] == "run" and best.img_size == 32


def test_it_needs_neither_the_pretrained_run_nor_where_it_was(finetuned, tmp_path):
    moved = shutil.copytree(finetuned, tmp_path / "anderswo ö")
    assert load_task_model(moved).step == load_task_model(finetuned).step
    text = (moved / "finetune.yaml").read_text()
    assert "/" not in json.dumps(read_description(moved).pretrained) and str(tmp_path.parent) not in text


def test_a_damaged_best_checkpoint_is_passed_over_with_a_warning(finetuned, tmp_path):
    folder = shutil.copytree(finetuned, tmp_path / "out")
    root = folder / "checkpoints"
    steps = [step for step, _ in checkpoint.list_checkpoints(root)]
    state = json.loads((root / f"step-{steps[-1]:08d}" / "state.json").read_text())
    damaged = root / f"step-{steps[-1]:08d}"
    (file,) = damaged.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    if state["best"]["step"] == steps[-1] and len(steps) == 1:
        with pytest.raises(checkpoint.CheckpointError):
            load_task_model(folder)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert load_task_model(folder).step < steps[-1]
    assert any("passed over" in str(w.message) for w in said)


def test_it_is_no_pretrained_run_and_its_commands_are_named(finetuned):
    for folder in (finetuned, *(finetuned / "checkpoints").glob("step-*")):
        with pytest.raises(ValueError, match="^run: .*fine-tuned by dex finetune: dex evaluate and dex predict take"):
            load(folder)


@pytest.mark.parametrize("which", ["newest", None])
def test_another_word_is_refused(finetuned, which):
    with pytest.raises(ValueError, match="checkpoint: expected best or last"):
        load_task_model(finetuned, which)


def test_other_folders_are_refused(pretrained, tmp_path):
    with pytest.raises(ValueError, match="got the pretrained run .*: dex finetune .* TASK fine-tunes it"):
        load_task_model(pretrained)
    with pytest.raises(ValueError, match="folder that dex finetune wrote; .* holds no finetune.yaml"):
        load_task_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing at"):
        load_task_model(tmp_path / "none")
    with pytest.raises(ValueError, match="got the file .*file"):
        (tmp_path / "file").touch()
        load_task_model(tmp_path / "file")
    with pytest.raises(ValueError, match="got 3"):
        load_task_model(3)


@pytest.mark.parametrize(
    "edit, word",
    [
        (lambda text: "", "TypeError"),
        (lambda text: "\x00", "finetune.yaml"),
        (lambda text: text.replace("mode: full", "mode: half"), "mode: expected one of full"),
        (lambda text: text.replace("pretrained:", "before:"), "KeyError"),
        (lambda text: text.replace("embed_dim: 32", "embed_dim: wide"), "model.embed_dim"),
    ],
)
def test_a_broken_description_is_named(finetuned, tmp_path, edit, word):
    folder = shutil.copytree(finetuned, tmp_path / "out")
    path = folder / "finetune.yaml"
    path.write_text(edit(path.read_text()))
    with pytest.raises(ValueError, match=word):
        load_task_model(folder)


def test_weights_of_another_size_are_named(finetuned, tmp_path):
    folder = shutil.copytree(finetuned, tmp_path / "out")
    path = folder / "finetune.yaml"
    path.write_text(path.read_text().replace("feature_size: 4", "feature_size: 8"))
    with pytest.raises(checkpoint.CheckpointError, match=r"head\.\S+: expected"):
        load_task_model(folder)
