import errno
import json
import os
import pickle
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dex.train import checkpoint
from dex.train.checkpoint import CheckpointError

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(7, 5, generator=generator),
        "b.c": torch.randn(3, generator=generator).bfloat16(),
        "count": torch.tensor([seed], dtype=torch.int64),
    }


def save(root, step, keep=3, seed=0):
    saver = checkpoint.Saver(root, keep)
    saver.save(step, tensors(seed), {"step": step, "x": [0.1, 1e-300]})
    saver.wait()
    return root / f"step-{step:08d}"


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_round_trip_is_exact(tmp_path):
    folder = save(tmp_path, 100)
    assert sorted(p.name for p in folder.iterdir()) == sorted(["MANIFEST.json", SHARD, "state.json"])
    assert same(checkpoint.tensors(folder), tensors())
    assert checkpoint.load(folder).state == {"step": 100, "x": [0.1, 1e-300]}


def test_views_of_shared_memory_are_saved(tmp_path):
    whole = torch.arange(12.0)
    saver = checkpoint.Saver(tmp_path, 1)
    saver.save(1, {"head": whole[:4], "strided": whole[::3]}, {"step": 1})
    saver.wait()
    loaded = checkpoint.tensors(tmp_path / "step-00000001")
    assert torch.equal(loaded["head"], whole[:4]) and torch.equal(loaded["strided"], whole[::3])


def test_what_is_saved_is_what_was_there_when_save_returned(tmp_path, monkeypatch):
    """Training goes on, in place, while the thread writes."""
    import threading

    go = threading.Event()
    real = checkpoint.dcp.save

    def late(*arguments, **options):
        assert go.wait(20)
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint.dcp, "save", late)
    values, saver = tensors(), checkpoint.Saver(tmp_path, 1)
    saver.save(1, values, {"step": 1})
    for value in values.values():
        value.zero_()
    assert not (tmp_path / "step-00000001").exists() and saver.busy
    go.set()
    saver.wait()
    assert not saver.busy
    assert same(checkpoint.tensors(tmp_path / "step-00000001"), tensors())


def test_every_flipped_bit_is_found_and_named(tmp_path):
    folder = save(tmp_path, 5)
    rng = random.Random(0)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for _ in range(70):
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(CheckpointError, match=path.name):
                checkpoint.load(folder)
        path.write_bytes(good)
    assert checkpoint.load(folder).state["step"] == 5


def test_every_cut_missing_and_added_file_is_found_and_named(tmp_path):
    folder = save(tmp_path, 5)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for length in (0, 1, len(good) // 4, len(good) // 2, len(good) - 2, len(good) - 1):
            path.write_bytes(good[:length])
            with pytest.raises(CheckpointError, match=path.name):
                checkpoint.load(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{path.name}: missing"):
            checkpoint.load(folder)
        path.write_bytes(good)
    # torch reads every safetensors file of the folder
    extra = folder / "shard-00002-model-00001-of-00001.safetensors"
    extra.write_bytes((folder / SHARD).read_bytes())
    with pytest.raises(CheckpointError, match=f"{extra.name}: not in MANIFEST.json"):
        checkpoint.load(folder)
    with pytest.raises(FileNotFoundError, match="there is none at"):
        checkpoint.load(tmp_path / "step-00000006")


def test_the_newest_good_one_is_taken_and_bad_ones_are_named(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / SHARD).write_bytes(b"x")
    (tmp_path / "step-00000002" / "state.json").unlink()
    loaded, passed_over = checkpoint.newest_good(tmp_path)
    assert loaded.state["step"] == 1
    assert len(passed_over) == 2
    assert "step-00000003" in passed_over[0] and SHARD in passed_over[0]
    assert "state.json: missing" in passed_over[1]
    (tmp_path / "step-00000001" / "MANIFEST.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        checkpoint.newest_good(tmp_path)
    assert checkpoint.newest_good(tmp_path / "nothing") == (None, [])


def test_one_that_the_disk_will_not_read_is_passed_over(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    real = checkpoint._digest

    def broken(path):
        if path.parent.name == "step-00000002" and path.suffix == ".safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(checkpoint, "_digest", broken)
    good, passed_over = checkpoint.newest_good(tmp_path)
    assert good.state["step"] == 1
    assert len(passed_over) == 1 and "step-00000002" in passed_over[0] and "Input/output error" in passed_over[0]


def test_only_the_newest_are_kept(tmp_path):
    for step in (10, 9, 20, 30, 40):
        save(tmp_path, step, keep=2)
    # 9 was saved while 10 was there: a later step never falls to an earlier one
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [30, 40]
    save(tmp_path, 35, keep=1)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [35, 40]


@pytest.mark.parametrize("number", [errno.EBUSY, errno.ENOTEMPTY])
def test_an_old_one_that_is_being_read_does_not_fail_the_save(number, tmp_path, monkeypatch):
    """As on NFS, where the folder of a file that is open cannot go; the save after it removes it."""
    save(tmp_path, 1, keep=1)

    def busy(folder, **options):
        if folder.name == "step-00000001":
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", busy)
        save(tmp_path, 2, keep=1)
    assert checkpoint.newest_good(tmp_path)[0].state["step"] == 2
    save(tmp_path, 3, keep=1)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [3]


@pytest.mark.parametrize("fails", ["sync_path", "_digest", "_manifest_text"])
def test_a_save_that_fails_leaves_what_was_there(fails, tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = getattr(checkpoint, fails)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, fails, full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]
    assert checkpoint.newest_good(tmp_path)[0].state["step"] == 1
    assert getattr(checkpoint, fails) is real
    save(tmp_path, 2, keep=1)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [2]


def test_a_full_disk_under_the_tensors_is_an_os_error(tmp_path):
    """What torch wraps in an exception that `except Exception` would not catch comes out as itself."""
    save(tmp_path, 1)
    saver = checkpoint.Saver(tmp_path, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the system itself refuses larger files
    try:
        saver.save(2, {"large": torch.ones(5000)}, {"step": 2})
        with pytest.raises(OSError, match="File too large"):
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    saver.save(2, tensors(), {"step": 2})
    saver.wait()
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [2]


HOST = """
import re, sys, torch
from pathlib import Path
from dex.train import checkpoint

def most():  # not ru_maxrss, which begins at what the parent held
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

root, size = Path(sys.argv[1]), 25_000_000
saver = checkpoint.Saver(root, 1)
saver.save(1, {"a": torch.ones(10)}, {"step": 1})  # what a first save loads
saver.wait()
tensors = {str(i): torch.full((size,), float(i)) for i in range(4)}
before = most()
saver.save(2, tensors, {"step": 2})
saver.wait()
print((most() - before) / (4 * 4 * size))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the most memory of a process")
def test_a_save_takes_one_copy_of_what_is_saved(tmp_path):
    words = subprocess.run([sys.executable, "-c", HOST, str(tmp_path)], capture_output=True, text=True, check=True)
    assert 0.9 < float(words.stdout) < 1.2


def test_what_a_kill_left_is_swept_up_by_the_next_save(tmp_path):
    save(tmp_path, 1)
    half = tmp_path / ".writing-step-00000002"
    half.mkdir()
    (half / SHARD).write_bytes(b"half")
    assert checkpoint.newest_good(tmp_path)[0].state["step"] == 1
    save(tmp_path, 3)
    assert not half.exists()


def test_an_unreplaced_checkpoint_of_the_same_step_is_set_aside(tmp_path):
    save(tmp_path, 1, seed=5)
    save(tmp_path, 1, seed=0)
    assert torch.equal(checkpoint.tensors(tmp_path / "step-00000001")["a"], tensors(0)["a"])
    assert (tmp_path / "set-aside-step-00000001").is_dir()
    save(tmp_path, 4)
    assert [p.name for p in checkpoint.set_aside_after(tmp_path, 1)] == ["set-aside-step-00000004"]
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [1]


def test_loading_never_unpickles(tmp_path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    folder = save(tmp_path, 1)
    bomb = pickle.dumps(Bomb())
    (folder / ".metadata").write_bytes(bomb)  # where torch's usual format keeps a pickle
    assert same(checkpoint.tensors(folder), tensors())
    for name in (SHARD, "state.json"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(bomb)
        files = {n: checkpoint._digest(folder / n) for n in (SHARD, "state.json")}
        (folder / "MANIFEST.json").write_text(checkpoint._manifest_text(1, files))
        with pytest.raises(CheckpointError):
            checkpoint.load(folder)
            checkpoint.tensors(folder)
        (folder / name).write_bytes(good)
    pickle.loads(bomb)
    assert canary.exists()  # the canary works


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("model.weight"), "model.weight is missing"),
        (lambda t: t.update(other=torch.zeros(1)), "other is not expected"),
        (
            lambda t: t.update({"model.weight": torch.zeros(3, 2)}),
            r"model.weight: expected torch.float32 \[2, 3\], got .*\[3, 2\]",
        ),
        (
            lambda t: t.update({"model.weight": torch.zeros(2, 3).half()}),
            "weight: expected torch.float32 .*, got torch.float16",
        ),
        (lambda t: t.pop("exp_avg.bias"), "exp_avg.bias is missing"),
        (lambda t: t.update({"step.x": torch.zeros(())}), "step.x is not expected"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(spoil, message, tmp_path):
    def trained(seed):
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        return model, optimizer, list(model.named_parameters())

    held = checkpoint.collect(*trained(0))
    good = {k: v.clone() for k, v in held.items()}
    spoil(held)
    saver = checkpoint.Saver(tmp_path, 5)
    saver.save(1, held, {"step": 1})
    saver.save(2, good, {"step": 2})
    saver.wait()
    other = trained(1)
    before = {k: v.clone() for k, v in checkpoint.collect(*other).items()}
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(checkpoint.load(tmp_path / "step-00000001"), *other)
    assert same(before, checkpoint.collect(*other))
    checkpoint.restore(checkpoint.load(tmp_path / "step-00000002"), *other)
    assert same(good, checkpoint.collect(*other))
    other[1].step()  # moments and step counters are of a kind that the optimizer takes


def test_state_of_another_step_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "state.json").write_text(json.dumps({"step": 2}))
    files = {n: checkpoint._digest(folder / n) for n in (SHARD, "state.json")}
    (folder / "MANIFEST.json").write_text(checkpoint._manifest_text(1, files))
    with pytest.raises(CheckpointError, match="expected step 1, got 2"):
        checkpoint.load(folder)
