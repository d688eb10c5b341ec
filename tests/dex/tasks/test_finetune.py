"""A fine-tuning in its folder: to the end, stopped and resumed to the bit, and refused before anything trains."""

import itertools
import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import yaml

from dex.common import exits
from dex.prepare.modalities import NAMES
from dex.tasks import finetune as engine
from dex.tasks.cases import open_task
from dex.tasks.finetune import finetune, plan
from dex.tasks.load import load_task_model
from dex.tasks.recipe import Settings
from dex.train import checkpoint
from dex.train.runlog import read_rows

QUICK = Settings(
    epochs=3, warmup_epochs=1, batch_size=8, lr=3e-3, feature_size=4, device="cpu", precision="fp32", workers=0
)
"""As the fixture ``quick``."""
OF_TIME = {"images_per_s", "data_wait_s", "memory_mb", "memory_now_mb", "val_seconds"}


def rows_of(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in OF_TIME} for row in rows]


def newest(folder):
    saved, _ = checkpoint.newest_good(folder / "checkpoints")
    return checkpoint.tensors(saved.folder), saved.state


def same(a, b):
    tensors, state = newest(a)
    others, other = newest(b)
    assert state == other and tensors.keys() == others.keys()
    return all(torch.equal(t, others[name]) for name, t in tensors.items()) and rows_of(a) == rows_of(b)


@pytest.fixture(scope="module")
def once(pretrained, discs, tmp_path_factory):
    """A fine-tuning that nothing stopped; nobody writes there."""
    root = tmp_path_factory.mktemp("once")
    data = open_task(discs, discs, classes=["disc=255"], private=root / "private")
    settings = Settings(
        epochs=3, warmup_epochs=1, batch_size=8, lr=3e-3, feature_size=4, device="cpu", precision="fp32", workers=0
    )
    assert finetune(pretrained, data, settings, root / "whole") == exits.DONE
    return root


@pytest.fixture
def disc_data(once, discs):
    """Its data, ids included."""
    return open_task(discs, discs, classes=["disc=255"], private=once / "private")


@pytest.fixture
def whole(once, tmp_path):
    return shutil.copytree(once / "whole", tmp_path / "whole")


def stopped_after(monkeypatch, steps, number=signal.SIGTERM):
    """A signal comes during step ``steps``."""
    real = engine.TaskTrainer.train_step

    def step(self):
        if self.step == steps:
            signal.raise_signal(number)
        return real(self)

    monkeypatch.setattr(engine.TaskTrainer, "train_step", step)


def test_it_learns_and_its_folder_says_how(whole, quick):
    rows = rows_of(whole)
    losses = [row["loss"] for row in rows if "loss" in row]
    judged = [row for row in rows if "val_dice" in row]
    assert len(losses) == len(judged) == quick.epochs and losses[-1] < losses[0]
    assert judged[-1]["val_loss"] < judged[0]["val_loss"]
    best = max(judged, key=lambda row: row["val_dice"])
    loaded = load_task_model(whole)
    assert loaded.step == best["step"]
    described = yaml.safe_load((whole / "finetune.yaml").read_text(encoding="utf-8"))
    assert described["task"]["name"] == "Scheiben-f-r-alle" and described["settings"]["lr"] == quick.lr
    starts = json.loads((whole / "run.json").read_text())["starts"]
    assert len(starts) == 1 and starts[0]["data"]["cases"]["train"] > 10


@pytest.mark.parametrize("steps", [1, 2])
def test_stopped_by_a_signal_it_goes_on_to_the_same_bits(
    whole, pretrained, disc_data, quick, tmp_path, monkeypatch, steps
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_after(patch, steps)
        assert finetune(pretrained, disc_data, quick, out) == exits.PREEMPTED
    assert newest(out)[1]["step"] == steps + 1
    assert finetune(pretrained, disc_data, quick, out, resume=True) == exits.DONE
    assert same(whole, out)
    assert finetune(pretrained, disc_data, quick, out, resume=True) == exits.DONE  # nothing is left to do
    assert same(whole, out)


def test_killed_at_any_point_it_goes_on_to_the_same_bits(whole, pretrained, disc_data, quick, tmp_path, monkeypatch):
    out = tmp_path / "out"

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    def second_time_dies(real):
        times = itertools.count()
        return lambda self, *a, **k: die() if next(times) == 1 else real(self, *a, **k)

    for place in ("_judge", "_row", "_save"):
        with monkeypatch.context() as patch:
            patch.setattr(engine.FinetuneRun, place, second_time_dies(getattr(engine.FinetuneRun, place)))
            patch.setattr(engine.TaskLog, "discard", lambda self: None)
            with pytest.raises(Killed):
                finetune(pretrained, disc_data, quick, out, resume=True)
    assert finetune(pretrained, disc_data, quick, out, resume=True) == exits.DONE
    assert same(whole, out)


def test_patience_ends_it_and_a_resume_leaves_it_so(pretrained, disc_data, quick, tmp_path, monkeypatch):
    values = iter([0.5, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(engine, "value_of", lambda trainer: engine_judged(next(values)))
    settings = replace(quick, epochs=5, patience=2)
    out = tmp_path / "out"
    assert finetune(pretrained, disc_data, settings, out) == exits.DONE
    judged = [row for row in rows_of(out) if "val_dice" in row]
    assert [row["val_dice"] for row in judged] == [0.5, 0.4, 0.3]
    assert load_task_model(out).step == judged[0]["step"] and load_task_model(out, "last").step == judged[2]["step"]
    assert finetune(pretrained, disc_data, settings, out, resume=True) == exits.DONE
    assert len([row for row in rows_of(out) if "val_dice" in row]) == 3
    assert [e["event"] for e in read_rows(out / "events.jsonl")].count("ended early") == 1


def engine_judged(value):
    from dex.tasks.judge import Judged

    return Judged(value, 1.0)


def test_three_non_finite_steps_end_it_saved(pretrained, disc_data, quick, tmp_path, monkeypatch, capsys):
    real = engine.TaskTrainer.image_loss
    monkeypatch.setattr(
        engine.TaskTrainer, "image_loss", lambda self, *a: real(self, *a) * (float("nan") if self.step >= 1 else 1)
    )
    monkeypatch.setattr(engine, "value_of", lambda trainer: engine_judged(0.1))
    assert finetune(pretrained, disc_data, quick, tmp_path / "out") == exits.NONFINITE
    assert "dex finetune: stopped at step 4" in capsys.readouterr().err
    assert newest(tmp_path / "out")[1]["nonfinite_in_a_row"] == 0


@pytest.mark.parametrize("mode", ["frozen", "linear", "lora"])
def test_every_mode_comes_back_from_its_folder(pretrained, shade_data, quick, tmp_path, mode):
    settings = replace(quick, mode=mode, epochs=2, lora_rank=2)
    assert finetune(pretrained, shade_data, settings, tmp_path / "out") == exits.DONE
    loaded = load_task_model(tmp_path / "out", "last")
    names = loaded.model.state_dict()
    assert not any("parametrizations" in name for name in names)
    assert loaded.model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_the_directors_path_and_another_size(pretrained, disc_data, quick, tmp_path):
    settings = replace(quick, path="director", img_size=48, epochs=2)
    assert finetune(pretrained, disc_data, settings, tmp_path / "out") == exits.DONE
    loaded = load_task_model(tmp_path / "out")
    assert loaded.img_size == 48 and {layer.path for layer in loaded.model.encoder.dex_layers} == {"director"}


def test_a_random_start_is_a_control(pretrained, disc_data, quick):
    weights = {}
    for start in ("pretrained", "random"):
        _, model = plan(pretrained, disc_data, replace(quick, start=start))
        weights[start] = model.encoder.blocks[0].attn.qkv.weight
    assert not torch.equal(*weights.values())
    _, again = plan(pretrained, disc_data, replace(quick, start="random"))
    assert torch.equal(again.encoder.blocks[0].attn.qkv.weight, weights["random"])


def test_only_the_same_fine_tuning_goes_on(whole, pretrained, disc_data, quick, tmp_path):
    with pytest.raises(ValueError, match="lr: expected 0.003, got 0.001"):
        finetune(pretrained, disc_data, replace(quick, lr=1e-3), whole, resume=True)
    fewer = disc_data._replace(cases=disc_data.cases[:-3])
    with pytest.raises(ValueError, match="data: expected the images, masks and splits"):
        finetune(pretrained, fewer, quick, whole, resume=True)
    nsd = disc_data._replace(task=replace(disc_data.task, metric="nsd"))
    with pytest.raises(ValueError, match="task: expected '.*' as described there"):
        finetune(pretrained, nsd, quick, whole, resume=True)
    reworded = disc_data._replace(task=replace(disc_data.task, title="Another title"))
    assert finetune(pretrained, reworded, replace(quick, keep_checkpoints=1), whole, resume=True) == exits.DONE


def test_folders_in_use_are_left_alone(whole, pretrained, disc_data, quick, tmp_path):
    before = rows_of(whole)
    with pytest.raises(ValueError, match="out: expected a new or empty folder; .* holds a fine-tuning"):
        finetune(pretrained, disc_data, quick, whole)
    with pytest.raises(ValueError, match="overwrite: expected a new fine-tuning"):
        finetune(pretrained, disc_data, quick, whole, resume=True, overwrite=True)
    assert rows_of(whole) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        finetune(pretrained, disc_data, quick, other)
    with pytest.raises(ValueError, match="holds other files"):
        finetune(pretrained, disc_data, quick, pretrained)
    assert [p.name for p in other.iterdir()] == ["mine.txt"]
    assert finetune(pretrained, disc_data, replace(quick, seed=1), whole, overwrite=True) == exits.DONE
    assert rows_of(whole) != before


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"img_size": 30}, "img_size: expected a multiple of the patch size, 8, got 30"),
        ({"img_size": 8}, "img_size: expected a multiple of the patch size, 8, and at least two patches, got 8"),
        ({"mode": "lora", "lora_rank": 64}, "lora_rank: expected 1 to 32"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_bad_settings_make_no_folder(pretrained, disc_data, quick, tmp_path, changes, word):
    with pytest.raises(ValueError, match=word):
        finetune(pretrained, disc_data, replace(quick, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_among_the_data_is_refused(pretrained, disc_data, shade_data, discs, shades, quick):
    for data, out in ((disc_data, discs / "out"), (disc_data, discs / "images/out"), (shade_data, shades / "out")):
        with pytest.raises(ValueError, match="out: expected a folder apart from the data"):
            finetune(pretrained, data, quick, out)
        assert not out.exists()


def test_bad_data_makes_no_folder(pretrained, disc_data, discs, quick, tmp_path):
    cases = tuple(case._replace(target=case.image) for case in disc_data.cases)  # pictures in the place of masks
    with pytest.raises(ValueError, match="p00.png|p0|p1|p2"):
        finetune(pretrained, disc_data._replace(cases=cases), quick, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    task = replace(disc_data.task, metric="auc")
    with pytest.raises(ValueError, match="task.metric: expected one of dice, hd95, nsd for a segmentation, got 'auc'"):
        finetune(pretrained, disc_data._replace(task=task), quick, tmp_path / "out")


def test_a_run_without_weights_is_named(disc_data, quick, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    with pytest.raises(ValueError, match="run: expected a run with a checkpoint"):
        finetune(tmp_path / "run", disc_data, quick, tmp_path / "out")


def test_a_modality_that_the_run_has_not_seen_is_a_note(pretrained, disc_data, quick):
    planned, _ = plan(pretrained, disc_data, quick)
    seen = planned.pretrained["modalities"][0]
    other = next(name for name in NAMES if name not in planned.pretrained["modalities"])
    task = replace(disc_data.task, modality=other)
    planned, _ = plan(pretrained, disc_data._replace(task=task), quick)
    assert any(f"not on {other}" in note for note in planned.notes)
    planned, _ = plan(pretrained, disc_data._replace(task=replace(task, modality=seen)), quick)
    assert not any("was pretrained on" in note for note in planned.notes)


def test_defaults_are_the_papers(pretrained, disc_data):
    planned, model = plan(pretrained, disc_data, Settings(device="cpu"))
    assert model.trained_parameters() == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.settings.lr == 1e-4 and planned.config.model.img_size == 32
