import hashlib
import json
import shutil
import signal
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from dex import config
from dex.data import CorruptDataError, SampleError
from dex.data.folder import FolderDataset
from dex.train import checkpoint, runlog
from dex.train import trainer as engine
from dex.train.run import pretrain
from dex.train.runlog import read_rows

TIMES = ("images_per_s", "data_wait_s", "memory_mb", "memory_now_mb", "evaluation_s")


def digest(folder):
    """SHA-256 of every tensor of a checkpoint, and its state."""
    saved = checkpoint.load(folder)
    tensors = checkpoint.tensors(folder)
    return {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in tensors.items()} | saved.state


def same_run(a, b):
    """What two states share when they are the same run; where the data lay and when to stop are not part of it."""
    a, b = dict(a), dict(b)
    for state in (a, b):
        state["config"] = {k: v for k, v in state["config"].items() if k != "run"}
    return a == b


def metrics(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(folder / "metrics.jsonl")]


def last(folder, step=12):
    return folder / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return {}


def once(store, name, factory, configuration):
    if name not in store:
        store[name] = factory.mktemp(name) / "run"
        assert pretrain(configuration, store[name]) == 0
    return store[name]


@pytest.fixture
def whole(uninterrupted, tiny, tmp_path_factory):
    """12 steps without a break. Tests read it and change copies."""
    return once(uninterrupted, "whole", tmp_path_factory, tiny)


@pytest.fixture
def pictured(uninterrupted, tiny, change, tmp_path_factory):
    """The same with evaluations after 0, 6 and 12 steps."""
    return once(uninterrupted, "pictured", tmp_path_factory, change(tiny, run__evaluate_every=6))


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_a_run_leaves_everything(pictured, tiny, change):
    assert sorted(p.name for p in pictured.iterdir()) == sorted(
        ["config.yaml", "run.json", "metrics.jsonl", "events.jsonl", "tensorboard", "pictures", "checkpoints", ".lock"]
    )
    assert config.read_yaml(pictured / "config.yaml", config.Config()) == change(tiny, run__evaluate_every=6)
    assert [p.name for p in sorted((pictured / "checkpoints").iterdir())] == [f"step-{s:08d}" for s in (5, 10, 12)]
    assert sorted(p.name for p in (pictured / "pictures").iterdir()) == sorted(
        [f"{kind}-step-{step:06d}.png" for kind in ("reconstructions", "experts") for step in (0, 6, 12)]
        + ["losses.png"]
    )
    rows = read_rows(pictured / "metrics.jsonl")
    train, held_out = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    assert [r["step"] for r in train] == [4, 8, 12] and [r["step"] for r in held_out] == [0, 6, 12]
    for key in "epoch loss total align_loss balance_loss grad_norm lr momentum noise_std skipped".split():
        assert all(isinstance(r[key], int | float) for r in train), key
    assert all(r["images_per_s"] > 0 and r["data_wait_s"] >= 0 for r in train)
    assert all(100 < r["memory_now_mb"] <= 1.01 * r["memory_mb"] for r in train)
    assert train[-1]["lr"] == 0.0 and train[-1]["noise_std"] == 0.0 and train[-1]["momentum"] == 0.999
    assert held_out[-1]["val_loss"] < held_out[0]["val_loss"]  # it learns, even in 12 steps
    assert set(held_out[0]["val_modality_loss"]) <= {"ct", "mr", "us"}
    (start,) = json.loads((pictured / "run.json").read_text())["starts"]
    assert start["torch"] == version("torch") and start["step"] == 0 and start["steps"] == 12
    assert {"python", "numpy", "os", "cpu", "threads", "commit", "dirty", "command", "started"} <= start.keys()
    assert start["data"]["images"] == {"ct": 40, "mr": 40, "us": 40} and len(start["data"]["fingerprint"]) == 64


@pytest.mark.parametrize("stops", [(6,), (5, 7)])
def test_stopped_and_resumed_is_bit_exact(stops, whole, tiny, change, tmp_path):
    """12 steps against 6 + 6 and against 5 + 2 + 5; the breaks fall between two rows."""
    out = tmp_path / "out"
    for stop in stops:
        assert pretrain(change(tiny, run__stop_at=stop), out, resume="auto") == 0
    torch.manual_seed(1234)  # what the process drew before is of no matter
    assert pretrain(tiny, out, resume="auto") == 0
    assert same_run(digest(last(whole)), digest(last(out)))
    assert metrics(whole) == metrics(out)
    starts = json.loads((out / "run.json").read_text())["starts"]
    assert [s["step"] for s in starts] == [0, *stops]
    assert starts[-1]["resumed_from"] == f"step-{stops[-1]:08d}"


def test_evaluations_change_neither_the_run_nor_a_resume(whole, pictured, tiny, change, tmp_path):
    ours, theirs = digest(last(whole)), digest(last(pictured))
    assert same_run(ours, theirs)
    out = Path(shutil.copytree(pictured, tmp_path / "out"))
    assert pretrain(change(tiny, run__evaluate_every=6), out, resume=last(out, 10)) == 0
    assert metrics(pictured) == metrics(out) and same_run(digest(last(pictured)), digest(last(out)))


def test_rows_after_the_checkpoint_are_not_repeated(whole, tiny, change, tmp_path, monkeypatch):
    """A crash at step 9 leaves the row of step 8 behind the checkpoint of step 5."""
    out = tmp_path / "crashed"
    real = engine.Trainer.train_step

    def crash(self):
        if self.step == 9:
            raise RuntimeError("the power went")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "train_step", crash)
        with pytest.raises(RuntimeError, match="the power went"):
            pretrain(tiny, out)
    assert [r["step"] for r in metrics(out)] == [4, 8]
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # cut short
    assert pretrain(tiny, out, resume="auto") == 0
    assert metrics(out) == metrics(whole)
    assert same_run(digest(last(whole)), digest(last(out)))


def test_workers_do_not_change_the_run(whole, tiny, change, tmp_path):
    assert pretrain(change(tiny, data__num_workers=1, run__stop_at=5), tmp_path / "out") == 0
    assert pretrain(tiny, tmp_path / "out", resume="auto") == 0
    got, want = digest(last(tmp_path / "out")), digest(last(whole))
    got["config"]["data"]["num_workers"] = 0
    assert same_run(got, want)


def test_a_damaged_checkpoint_is_passed_over_and_named(copy, tiny, capsys):
    want = digest(last(copy))
    path = last(copy) / "shard-00001-model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    capsys.readouterr()
    assert pretrain(tiny, copy, resume="auto") == 0
    said = capsys.readouterr().out
    assert "passed over" in said and "step-00000012/shard-00001-model-00001-of-00001.safetensors: damaged" in said
    assert "resumed from step-00000010" in said and "set aside set-aside-step-00000012" in said
    assert same_run(digest(last(copy)), want)
    assert (copy / "checkpoints" / "set-aside-step-00000012").is_dir()
    events = read_rows(copy / "events.jsonl")
    assert events[-1]["event"] == "resumed" and "damaged" in events[-1]["notes"][0]


def test_going_back_to_an_earlier_checkpoint(copy, tiny):
    want, rows = digest(last(copy)), metrics(copy)
    assert pretrain(tiny, copy, resume=last(copy, 5)) == 0
    assert same_run(digest(last(copy)), want) and metrics(copy) == rows


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__embed_dim": 64}, "model.embed_dim: expected 32, got 64"),
        ({"run__seed": 7}, "run.seed: expected 0, got 7"),
        ({"data__batch_size": 4}, "data.batch_size: expected 8, got 4"),
        ({"schedule__steps": 20}, "schedule.steps: expected 12, got 20"),
        ({"run__precision": "bf16"}, "precision: expected 'fp32', got 'bf16'"),
    ],
)
def test_another_run_is_refused_by_name(fields, message, tiny, change, tmp_path):
    out = tmp_path / "out"
    assert pretrain(change(tiny, run__stop_at=3), out) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="belongs to another run") as error:
        pretrain(change(tiny, **fields), out, resume="auto")
    assert message in str(error.value)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.fixture
def killed_early(tiny, tmp_path, monkeypatch):
    """A run folder without a checkpoint, as a crash after two steps leaves it."""
    real = engine.Trainer.train_step

    def crash(self):
        if self.step == 2:
            raise RuntimeError("the power went")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "train_step", crash)
        with pytest.raises(RuntimeError, match="the power went"):
            pretrain(tiny, tmp_path / "killed")
    assert not checkpoint.list_checkpoints(tmp_path / "killed" / "checkpoints")
    return tmp_path / "killed"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__align": "mse"}, "model.align: expected 'kd', got 'mse'"),
        ({"run__seed": 7}, "run.seed: expected 0, got 7"),
        ({"schedule__steps": 20}, "schedule.steps: expected 12, got 20"),
        ({"run__precision": "bf16"}, "run.precision: expected 'fp32', got 'bf16'"),
    ],
)
def test_another_run_is_refused_without_a_checkpoint_too(fields, message, killed_early, tiny, change):
    before = {p: p.read_bytes() for p in killed_early.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="belongs to another run") as error:
        pretrain(change(tiny, **fields), killed_early, resume="auto")
    assert message in str(error.value)
    assert {p: p.read_bytes() for p in killed_early.rglob("*") if p.is_file()} == before


def test_other_data_is_refused_without_a_checkpoint_too(killed_early, tiny, change, images, tmp_path):
    fewer = Path(shutil.copytree(images, tmp_path / "fewer"))
    next((fewer / "ct").iterdir()).unlink()
    with pytest.raises(ValueError, match=f"data: expected the images .*; those in {fewer} differ"):
        pretrain(change(tiny, data__path=str(fewer)), killed_early, resume="auto")
    (killed_early / "run.json").unlink()  # killed between the two files: config.yaml alone still tells runs apart
    with pytest.raises(ValueError, match="run.seed: expected 0, got 7"):
        pretrain(change(tiny, run__seed=7), killed_early, resume="auto")


def test_the_configuration_in_the_folder_is_what_runs(killed_early, whole, tiny, change):
    """What a resume may change is written down, at every start."""
    for fields in ({"run__keep_checkpoints": 9, "run__stop_at": 6}, {"data__num_workers": 1}):
        assert pretrain(change(tiny, **fields), killed_early, resume="auto") == 0
        assert config.read_yaml(killed_early / "config.yaml", config.Config()) == change(tiny, **fields)
    assert [p.name for p in killed_early.glob(".*")] == [".lock"]
    assert metrics(killed_early) == metrics(whole)


def test_other_data_is_refused(tiny, change, images, tmp_path):
    assert pretrain(change(tiny, run__stop_at=3), tmp_path / "out") == 0
    moved, fewer = tmp_path / "moved", tmp_path / "fewer"
    shutil.copytree(images, moved)
    shutil.copytree(images, fewer)
    next((fewer / "ct").iterdir()).unlink()
    with pytest.raises(ValueError, match=f"data: expected the images .*; those in {fewer} differ"):
        pretrain(change(tiny, data__path=str(fewer)), tmp_path / "out", resume="auto")
    assert pretrain(change(tiny, data__path=str(moved), run__stop_at=4), tmp_path / "out", resume="auto") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_the_step(number, whole, tiny, change, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real = engine.Trainer.train_step

    def interrupted(self):
        if self.step == 6:
            signal.raise_signal(number)
        return real(self)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "train_step", interrupted)
        assert pretrain(tiny, out) == 75
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert [step for step, _ in checkpoint.list_checkpoints(out / "checkpoints")] == [5, 7]
    assert read_rows(out / "events.jsonl")[-1] == {"step": 7, "event": "preempted", "signal": number.name}
    assert pretrain(tiny, out, resume="auto") == 0
    assert metrics(out) == metrics(whole) and same_run(digest(last(whole)), digest(last(out)))


def test_whoever_is_preempted_at_an_evaluation_evaluates_after_the_resume(
    pictured, tiny, change, tmp_path, monkeypatch
):
    """A scheduler kills soon after it warned; what it left undone is not left out."""
    out, c = tmp_path / "out", change(tiny, run__evaluate_every=6)
    real = engine.Trainer.train_step

    def interrupted(self):
        if self.step == 5:
            signal.raise_signal(signal.SIGTERM)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "train_step", interrupted)
        assert pretrain(c, out) == 75
    assert [row["step"] for row in read_rows(out / "metrics.jsonl") if "val_loss" in row] == [0]
    assert pretrain(c, out, resume="auto") == 0
    assert metrics(out) == metrics(pictured)
    assert {p.name for p in (out / "pictures").iterdir()} == {p.name for p in (pictured / "pictures").iterdir()}
    assert pretrain(c, out, resume="auto") == 0  # it is done, and nothing of it is done twice
    assert metrics(out) == metrics(pictured)


def test_a_folder_that_another_run_writes_to_is_refused(
    tiny, change, dex_process, wait_for_rows, tmp_path, monkeypatch, capsys
):
    long = change(tiny, schedule__steps=10**6, run__log_every=1)
    (tmp_path / "c.yaml").write_text(config.to_yaml(long))
    out = tmp_path / "out"
    first = dex_process("pretrain", "--config", tmp_path / "c.yaml", "--out", out)
    wait_for_rows(first, out, 3)
    monkeypatch.setattr(runlog, "LOCK_WAIT", 0.5)
    starts = (out / "run.json").read_bytes()
    with pytest.raises(ValueError, match=f"out: expected a folder that no other run uses; process {first.pid} on "):
        pretrain(long, out, resume="auto")
    assert f"process {first.pid} on " in capsys.readouterr().err
    assert (out / "run.json").read_bytes() == starts
    assert "# resumes from" in cli_dry_run(dex_process, tmp_path / "c.yaml", out)  # looking is allowed
    # One that is about to end is waited for, and a lock does not outlive its process.
    monkeypatch.setattr(runlog, "LOCK_WAIT", 30.0)
    threading.Timer(1.0, first.kill).start()
    assert pretrain(change(long, run__stop_at=len(read_rows(out / "metrics.jsonl")) + 40), out, resume="auto") == 0


def cli_dry_run(dex_process, configuration, out):
    return dex_process(
        "pretrain", "--config", configuration, "--out", out, "--resume", "auto", "--dry-run"
    ).communicate(timeout=60)[0]


def nan_at(monkeypatch, *steps):
    real = engine.Trainer.train_step

    def poisoned(self):
        if self.step in steps:
            hook = self.parameters[0].register_hook(lambda g: g * float("nan"))
            try:
                return real(self)
            finally:
                hook.remove()
        return real(self)

    monkeypatch.setattr(engine.Trainer, "train_step", poisoned)


def test_three_bad_steps_in_a_row_stop_the_run(tiny, tmp_path, monkeypatch, capsys):
    nan_at(monkeypatch, 2, 5, 6, 7)  # one alone does not
    out = tmp_path / "out"
    assert pretrain(tiny, out) == 3
    said = capsys.readouterr()
    assert "stopped at step 8: 3 non-finite steps in a row; samples of the last: " in said.err
    assert said.err.count("\n") == 1 and "warning: step 3 changed nothing" in said.out
    events = read_rows(out / "events.jsonl")
    assert [(e["event"], e["step"]) for e in events] == [
        ("non-finite step", 3),
        ("non-finite step", 6),
        ("non-finite step", 7),
        ("non-finite step", 8),
        ("stopped", 8),
    ]
    assert all(len(e["samples"]) == 8 for e in events[:4])
    saved, earlier = checkpoint.tensors(last(out, 8)), checkpoint.tensors(last(out, 5))
    assert all(torch.equal(saved[k], earlier[k]) for k in saved)
    monkeypatch.undo()
    assert pretrain(tiny, out, resume="auto") == 0  # goes on behind the bad batches
    assert sum(r["skipped"] for r in metrics(out) if "skipped" in r) == 4


def test_the_count_of_bad_steps_survives_a_resume(tiny, change, tmp_path, monkeypatch):
    nan_at(monkeypatch, 3, 4, 5)
    assert pretrain(change(tiny, run__stop_at=5), tmp_path / "out") == 0
    assert pretrain(tiny, tmp_path / "out", resume="auto") == 3


def test_a_failure_before_the_first_step_leaves_no_folder(tiny, change, tmp_path, monkeypatch):
    def fail(self):
        raise MemoryError("no room")

    monkeypatch.setattr(engine.Trainer, "train_step", fail)
    empty = tmp_path / "empty"
    empty.mkdir()
    for out in (tmp_path / "a" / "b", empty):
        with pytest.raises(MemoryError):
            pretrain(change(tiny, run__evaluate_every=6), out)
    assert list(tmp_path.iterdir()) == [empty] and not list(empty.iterdir())
    with pytest.raises(FileNotFoundError):
        pretrain(change(tiny, data__path=str(tmp_path / "absent")), tmp_path / "a")
    assert list(tmp_path.iterdir()) == [empty]


def test_a_folder_that_is_in_use_is_refused(tiny, change, tmp_path):
    out = tmp_path / "out"
    assert pretrain(change(tiny, run__stop_at=1), out) == 0
    with pytest.raises(ValueError, match="out: expected a new or empty folder; .* holds a run"):
        pretrain(tiny, out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        pretrain(tiny, other)
    with pytest.raises(ValueError, match="out: expected a folder, got the file "):
        pretrain(tiny, other / "thesis.txt")
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]


def test_auto_starts_where_there_is_nothing_yet(tiny, change, tmp_path, capsys):
    out = tmp_path / "out"
    assert pretrain(change(tiny, run__stop_at=1), out, resume="auto") == 0
    for _, folder in checkpoint.list_checkpoints(out / "checkpoints"):
        (folder / "state.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in .* can be read"):
        pretrain(tiny, out, resume="auto")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE: expected a whole number, got 'many'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected at least 1, got 0"),
        ({"WORLD_SIZE": "2"}, "RANK: expected a value with WORLD_SIZE=2; start with torchrun"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK: expected 0 <= RANK < WORLD_SIZE = 2, got 2",
        ),
    ],
)
def test_a_launch_that_makes_no_sense_is_named(environment, message, tiny, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        pretrain(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def unreadable_from(monkeypatch, tiny, batch):
    """Every image that batches from this one on begin with cannot be read, nor can what replaces it."""
    real, bad = FolderDataset.read, set()

    def read(self, index, out):
        if bad:
            raise SampleError(self.sample_id(index), "torn")
        return real(self, index, out)

    step = engine.Trainer.train_step

    def train_step(self):
        if self.step == batch:
            bad.add(True)
        return step(self)

    monkeypatch.setattr(FolderDataset, "read", read)
    monkeypatch.setattr(engine.Trainer, "train_step", train_step)


def test_unreadable_images_save_the_run_and_are_named(whole, tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        unreadable_from(patch, tiny, 7)
        with pytest.raises(CorruptDataError, match="cannot be read.*torn") as error:
            pretrain(tiny, out)
    assert [step for step, _ in checkpoint.list_checkpoints(out / "checkpoints")] == [5, 7]
    *named, stopped = read_rows(out / "events.jsonl")
    assert {e["sample"]: e["reason"] for e in named} == error.value.samples and len(named) > 10
    assert {(e["event"], e["step"]) for e in named} == {("unreadable sample", 7)}
    assert (stopped["event"], stopped["step"]) == ("stopped", 7)
    assert pretrain(tiny, out, resume="auto") == 0  # the disk is back: the same batch, and the same run
    assert metrics(out) == metrics(whole) and same_run(digest(last(whole)), digest(last(out)))


def test_unreadable_images_at_the_first_step_leave_no_folder(tiny, tmp_path, monkeypatch):
    unreadable_from(monkeypatch, tiny, 0)
    with pytest.raises(CorruptDataError):
        pretrain(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_stays_locked_while_a_failed_run_still_saves(tiny, tmp_path, monkeypatch):
    """Among several ranks nobody waits for the thread after a failure; here a second Ctrl-C ends the waiting."""
    out, go, real = tmp_path / "out", threading.Event(), checkpoint.dcp.save
    late, step = (lambda *a, **o: go.wait(60) and real(*a, **o)), engine.Trainer.train_step

    def interrupt(self):
        raise KeyboardInterrupt

    def fail(self):
        if self.step == 6:
            monkeypatch.setattr(checkpoint.Saver, "wait", interrupt)
            raise RuntimeError("the power went")
        return step(self)

    monkeypatch.setattr(checkpoint.dcp, "save", late)
    monkeypatch.setattr(engine.Trainer, "train_step", fail)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny, out)
    monkeypatch.undo()
    try:
        with pytest.raises(ValueError, match="out: expected a folder that no other run uses; this process"):
            pretrain(tiny, out, resume="auto")
    finally:
        go.set()
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join(60)
    assert checkpoint.verify(last(out, 5)) == 5


def test_a_full_disk_leaves_the_last_good_state(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real = checkpoint.sync_path

    def full(path):
        if "step-00000010" in str(path):
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(checkpoint, "sync_path", full)
    with pytest.raises(OSError, match="No space left"):
        pretrain(tiny, out)
    monkeypatch.undo()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000005"]
    assert pretrain(tiny, out, resume="auto") == 0


def test_killed_processes_resume_bit_exactly(whole, tiny, change, tmp_path, dex_process):
    """SIGTERM ends with 75; kill -9 at any point, too, resumes to the same weights, moments, cursor and rows."""
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(config.to_yaml(change(tiny, run__checkpoint_every=1, run__keep_checkpoints=9)))
    for number, step in ((signal.SIGKILL, 2), (signal.SIGTERM, 5)):
        process = dex_process("pretrain", "--config", path, "--out", out, "--resume", "auto")
        deadline = time.monotonic() + 60
        while not last(out, step).exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.005)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert stderr == "" or number == signal.SIGKILL
        assert process.returncode in ((-9, 0) if number == signal.SIGKILL else (75, 0)), stdout
    process = dex_process("pretrain", "--resume", out)  # the folder knows its configuration
    assert process.wait(timeout=60) == 0, process.communicate()
    assert metrics(out) == metrics(whole)
    assert same_run(digest(last(whole)), digest(last(out)))


@pytest.mark.parametrize("name", ["demo", "demo-monolithic"])
def test_the_demo_runs_on_the_images_in_the_package(name, change, tmp_path):
    """Two steps of it; the monolithic control has no experts and so no picture of them."""
    little = change(
        config.preset(name), schedule__steps=2, data__batch_size=4, run__evaluate_images=7, run__evaluate_every=2
    )
    assert pretrain(little, tmp_path / "out") == 0
    pictures = {p.name for p in (tmp_path / "out" / "pictures").iterdir()}
    assert "reconstructions-step-000002.png" in pictures and "losses.png" in pictures
    assert ("experts-step-000002.png" in pictures) == (name == "demo")
    rows = metrics(tmp_path / "out")
    assert len(rows[0]["val_modality_loss"]) == 7
    assert all(row["balance_loss"] > 0 for row in rows if "loss" in row) == (name == "demo")
