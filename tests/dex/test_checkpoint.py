import os
import pickle
import random
import shutil

import pytest
import torch
from torch import nn

from dex import checkpoint
from dex.checkpoint import CheckpointError


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(7, 5, generator=generator), "b.c": torch.randn(3, generator=generator).bfloat16()}


def save(root, step, keep=3, seed=0):
    return checkpoint.save(root, step, tensors(seed), tensors(seed + 1), {"step": step, "x": [0.1, 1e-300]}, keep)


def test_round_trip_is_exact(tmp_path):
    folder = save(tmp_path, 100)
    assert folder.name == "step-00000100"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    )
    loaded = checkpoint.load(folder)
    for got, want in ((loaded.model, tensors()), (loaded.optimizer, tensors(1))):
        assert got.keys() == want.keys()
        assert all(got[k].dtype == want[k].dtype and torch.equal(got[k], want[k]) for k in want)
    assert loaded.state == {"step": 100, "x": [0.1, 1e-300]}


def test_views_of_shared_memory_are_saved(tmp_path):
    whole = torch.arange(12.0)
    folder = checkpoint.save(tmp_path, 1, {"head": whole[:4], "strided": whole[::3]}, {}, {"step": 1}, 1)
    loaded = checkpoint.load(folder).model
    assert torch.equal(loaded["head"], whole[:4]) and torch.equal(loaded["strided"], whole[::3])


def test_every_flipped_bit_is_found_and_named(tmp_path):
    folder = save(tmp_path, 5)
    rng = random.Random(0)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for _ in range(60):
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(CheckpointError, match=path.name):
                checkpoint.load(folder)
        path.write_bytes(good)
    assert checkpoint.load(folder).state["step"] == 5


def test_every_cut_and_missing_file_is_found_and_named(tmp_path):
    folder = save(tmp_path, 5)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for length in (0, 1, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:length])
            with pytest.raises(CheckpointError, match=path.name):
                checkpoint.load(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{path.name}: missing"):
            checkpoint.load(folder)
        path.write_bytes(good)
    with pytest.raises(FileNotFoundError, match="nothing at"):
        checkpoint.load(tmp_path / "step-00000006")


def test_the_newest_good_one_is_taken_and_bad_ones_are_named(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "step-00000002" / "state.json").unlink()
    loaded, passed_over = checkpoint.newest_good(tmp_path)
    assert loaded.state["step"] == 1
    assert len(passed_over) == 2
    assert "step-00000003" in passed_over[0] and "model.safetensors" in passed_over[0]
    assert "state.json: missing" in passed_over[1]
    (tmp_path / "step-00000001" / "MANIFEST.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        checkpoint.newest_good(tmp_path)
    assert checkpoint.newest_good(tmp_path / "nothing") == (None, [])


def test_only_the_newest_are_kept(tmp_path):
    for step in (10, 9, 20, 30, 40):
        save(tmp_path, step, keep=2)
    # 9 was saved while 10 was there: a later step never falls to an earlier one
    assert [step for step, _ in checkpoint.found(tmp_path)] == [30, 40]
    save(tmp_path, 35, keep=1)
    assert [step for step, _ in checkpoint.found(tmp_path)] == [35, 40]


@pytest.mark.parametrize("fails", ["save_file", "_sync", "_digest"])
def test_a_save_that_fails_leaves_what_was_there(fails, tmp_path, monkeypatch):
    save(tmp_path, 1)
    calls = 0
    real = getattr(checkpoint, fails)

    def full(*arguments):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, fails, full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]
    assert checkpoint.newest_good(tmp_path)[0].state["step"] == 1
    save(tmp_path, 2, keep=1)
    assert [step for step, _ in checkpoint.found(tmp_path)] == [2]


def test_what_a_kill_left_is_swept_up_by_the_next_save(tmp_path):
    save(tmp_path, 1)
    half = tmp_path / ".writing-step-00000002"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest_good(tmp_path)[0].state["step"] == 1
    save(tmp_path, 3)
    assert not half.exists()


def test_an_unreplaced_checkpoint_of_the_same_step_is_set_aside(tmp_path):
    save(tmp_path, 1, seed=5)
    save(tmp_path, 1, seed=0)
    assert torch.equal(checkpoint.load(tmp_path / "step-00000001").model["a"], tensors(0)["a"])
    assert (tmp_path / "set-aside-step-00000001").is_dir()
    save(tmp_path, 4)
    assert [p.name for p in checkpoint.set_aside_after(tmp_path, 1)] == ["set-aside-step-00000004"]
    assert [step for step, _ in checkpoint.found(tmp_path)] == [1]


def test_loading_never_unpickles(tmp_path, monkeypatch):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    folder = save(tmp_path, 1)
    for name in ("model.safetensors", "state.json"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        files = {n: checkpoint._digest(folder / n) for n in checkpoint._FILES}
        (folder / "MANIFEST.json").write_text(checkpoint._manifest_text(1, files))
        with pytest.raises(CheckpointError):
            checkpoint.load(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m, o: m.pop("weight"), "model.safetensors: weight is missing"),
        (lambda m, o: m.update(other=torch.zeros(1)), "model.safetensors: other is not expected"),
        (lambda m, o: m.update(weight=torch.zeros(3, 2)), r"weight: expected torch.float32 \[2, 3\]; got .*\[3, 2\]"),
        (
            lambda m, o: m.update(weight=torch.zeros(2, 3).half()),
            "weight: expected torch.float32 .*; got torch.float16",
        ),
        (lambda m, o: o.pop("exp_avg.bias"), "optimizer.safetensors: exp_avg.bias is missing"),
        (lambda m, o: o.update({"step.x": torch.zeros(())}), "optimizer.safetensors: step.x is not expected"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(spoil, message, tmp_path):
    def trained(seed):
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = trained(0)
    moments = checkpoint.optimizer_tensors(optimizer, model.named_parameters())
    weights, moments = dict(model.state_dict()), dict(moments)
    spoil(weights, moments)
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, weights, moments, {"step": 1}, 1))
    other, its_optimizer = trained(1)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    before_moments = {
        k: v.clone() for k, v in checkpoint.optimizer_tensors(its_optimizer, other.named_parameters()).items()
    }
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(loaded, other, its_optimizer)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    after = checkpoint.optimizer_tensors(its_optimizer, other.named_parameters())
    assert all(torch.equal(before_moments[k], v) for k, v in after.items())
    shutil.rmtree(tmp_path / "step-00000001")
