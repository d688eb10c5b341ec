"""What is resolved before a run, and who may start one in a folder."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dex import config
from dex.common import exits
from dex.data import FolderDataset, ShardWriter, open_dataset, shard_rewrite
from dex.train import checkpoint, plan
from dex.train.plan import EARLIER_FINGERPRINT, check_cuda_graph, resolve, resolve_device, resolve_precision
from dex.train.run import pretrain
from dex.train.runlog import RunLog, read_rows
from dex.train.trainer import Trainer

LONG = {"schedule__steps": 10**6, "run__log_every": 1, "run__checkpoint_every": 10**6}


def tree(folder) -> dict[str, str]:
    """SHA-256 of every file below a folder; the lock is not looked at, since it names who held it last."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_everything_is_resolved_once(tiny, change, images, monkeypatch):
    asked = []
    for name in ("check", "resolve_device", "resolve_precision", "resolve_micro_batch", "batches_per_epoch"):
        real = getattr(plan, name)
        monkeypatch.setattr(plan, name, lambda *a, real=real, name=name: [asked.append(name), real(*a)][1])
    c = change(tiny, schedule__steps=None, schedule__epochs=2.0, parallel__micro_batch=4)
    planned = resolve(c, open_dataset(images))
    trainer = Trainer(planned)
    assert sorted(asked) == sorted(set(asked)) and len(asked) == 5
    assert planned.batches_per_epoch == len(planned.train) // 8 == trainer.loader.batches_per_epoch
    assert planned.steps == 2 * planned.batches_per_epoch == trainer.steps
    assert (planned.micro_batch, planned.precision, planned.device) == (4, "fp32", torch.device("cpu"))
    assert len(planned.train) + len(planned.held_out) == len(planned.dataset) == 120
    assert planned.fingerprint == planned.dataset.fingerprint
    assert planned.saved is None and planned.notes == ()


def test_a_data_set_without_training_images_is_refused(tiny, images):
    dataset = open_dataset(images)
    dataset._in_split = lambda name: [name == "val"] * len(dataset)
    with pytest.raises(ValueError, match="data: expected training images; .*'images.*' is empty"):
        resolve(tiny, dataset)


def test_too_small_a_data_set_is_refused(tiny, images, change):
    with pytest.raises(ValueError, match="data.batch_size: expected at most the 113 training images"):
        resolve(change(tiny, data__batch_size=1000), open_dataset(images))


def test_cuda_is_refused_by_name_where_there_is_none(tiny, change, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="run.device: expected an available device, got 'cuda'"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


@pytest.mark.parametrize("in_hardware", [True, False])
def test_auto_precision_is_what_the_processor_computes_in(in_hardware, tiny, change, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": in_hardware})
    cpu = torch.device("cpu")
    assert resolve_precision(change(tiny, run__precision="auto"), cpu) == ("bf16" if in_hardware else "fp32")
    assert resolve_precision(change(tiny, run__precision="bf16"), cpu) == "bf16"


@pytest.mark.parametrize(
    "device, ranks, fields, words",
    [
        ("cpu", 1, {}, "expected a CUDA device, got cpu"),
        ("cuda", 2, {"model__backend": "triton"}, "expected one rank, .*, got 2"),
        ("cuda", 1, {}, r"expected experts .* \(model.backend triton\), got plain torch experts"),
        ("cuda", 1, {"model__backend": "reference"}, ".*got plain torch experts"),
        ("cuda", 1, {"model__backend": "triton"}, None),
        ("cuda", 1, {"model__num_experts": 0, "model__backend": "reference"}, None),
    ],
)
def test_a_graph_is_refused_by_name_where_a_step_cannot_be_captured(
    tiny, change, monkeypatch, device, ranks, fields, words
):
    monkeypatch.setattr("dexkernels.ops.backends.why_not", lambda op, backend, feature=None: None)
    monkeypatch.setattr("dexkernels.ops.backends.architecture", lambda device: "sm_00")
    device, asked = torch.device(device), change(tiny, parallel__cuda_graph=True, **fields)
    with pytest.raises(ValueError, match=f"parallel.cuda_graph: {words}") if words else contextlib.nullcontext():
        check_cuda_graph(asked, device, ranks)
    check_cuda_graph(change(asked, parallel__cuda_graph=False), device, ranks)


def test_a_graph_on_a_cpu_is_refused(tiny, change, images):
    with pytest.raises(ValueError, match="parallel.cuda_graph: expected a CUDA device, got cpu"):
        resolve(change(tiny, parallel__cuda_graph=True), open_dataset(images))


# Who may start in a folder.


@pytest.fixture
def earlier(tiny, change, tmp_path):
    """A run of 12 steps that was stopped after the second."""
    assert pretrain(change(tiny, run__stop_at=2), tmp_path / "earlier") == 0
    return tmp_path / "earlier"


@pytest.fixture
def starts(tiny, change, tmp_path):
    """Starts of one long run in one folder at the same moment, as processes; see starts.py."""
    path = tmp_path / "long.yaml"
    path.write_text(config.to_yaml(change(tiny, **LONG)))

    def start(out, *options, pauses=()):
        command = ["pretrain", "--config", str(path), "--out", str(out)]
        order = {"starts": [[*command, *more] for more in options], "wait": 1.0, "pauses": pauses}
        order |= {"out": str(out), "ended": str(tmp_path)}
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        program = [sys.executable, str(Path(__file__).with_name("starts.py"))]
        done = subprocess.run(program, input=json.dumps(order), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return start


def assert_whole(out):
    """One start wrote what is there, from its first step on, and it was saved where it stopped."""
    (start,) = json.loads((out / "run.json").read_text())["starts"]
    assert start["step"] == 0 and start["steps"] == 10**6
    assert config.read_yaml(out / "config.yaml", config.Config()).schedule.steps == 10**6
    steps = [row["step"] for row in read_rows(out / "metrics.jsonl")]
    assert len(steps) >= 3 and steps == list(range(1, len(steps) + 1))
    ((step, saved),) = checkpoint.list_checkpoints(out / "checkpoints")
    assert checkpoint.load(saved).state["step"] == step == steps[-1]
    assert [event["event"] for event in read_rows(out / "events.jsonl")] == ["preempted"]


OPTIONS = pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="new"),
        pytest.param(("--resume", "auto"), id="resume"),
        pytest.param(("--overwrite",), id="overwrite", marks=pytest.mark.slow),
    ],
)


@OPTIONS
def test_of_eight_simultaneous_starts_one_runs(options, starts, earlier, tmp_path):
    out = earlier if options == ("--overwrite",) else tmp_path / "out"
    ended = starts(out, *[options] * 8)
    assert sorted(code for code, _ in ended) == [2] * 7 + [75], ended
    for code, said in ended:
        assert code == 75 or said.splitlines()[-1].startswith("dex pretrain: out: expected a folder that no other run")
    assert_whole(out)


@OPTIONS
def test_a_start_that_locks_late_takes_nothing_from_the_run_that_began(options, starts, tmp_path):
    out = tmp_path / "out"
    late = {"start": 0, "method": ["dex.train.lock", "FolderLock", "take"], "until": str(out / "metrics.jsonl")}
    ended = starts(out, options, options, pauses=[late])
    assert [code for code, _ in ended] == [2, 75], ended
    assert_whole(out)


@OPTIONS
def test_a_start_that_has_looked_keeps_the_folder_however_long_it_takes(options, starts, tmp_path):
    out = tmp_path / "out"
    slow = {"start": 0, "method": ["dex.train.runlog", "RunLog", "open"], "until": str(tmp_path / "1")}
    second = {"start": 1, "method": ["dex.train.lock", "FolderLock", "take"], "until": str(out / ".lock")}
    ended = starts(out, options, options, pauses=[slow, second])
    assert [code for code, _ in ended] == [75, 2], ended
    assert_whole(out)


def test_a_refused_start_changes_nothing(earlier, tiny, change, tmp_path):
    before = tree(earlier)
    absent = change(tiny, data__path=str(tmp_path / "absent"))
    for c, options, message in (
        (tiny, {}, "holds a run: --resume auto continues it, --overwrite replaces it"),
        (change(tiny, run__seed=7), {"resume": "auto"}, "belongs to another run: run.seed: expected 0, got 7"),
        (tiny, {"resume": "auto", "overwrite": True}, "overwrite: expected a new run, without resume, got both"),
        (absent, {"overwrite": True}, "data.path: expected a folder of images or shards"),
        (change(tiny, model__backend="x"), {"overwrite": True}, "backend: expected one of"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            pretrain(c, earlier, **options)
        if "backend" not in message:  # for that a model has to be built
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                plan.plan(c, earlier, **options)
        assert tree(earlier) == before


@pytest.mark.parametrize("options", [{}, {"resume": "auto"}, {"overwrite": True}], ids=str)
def test_a_folder_of_other_files_is_refused_and_left_alone(options, tiny, tmp_path):
    (tmp_path / "thesis" / "checkpoints").mkdir(parents=True)
    (tmp_path / "thesis" / "checkpoints" / "chapter.txt").write_text("mine")
    (tmp_path / "thesis" / "metrics.jsonl").write_text("mine too")
    before = sorted(tmp_path.rglob("*")), tree(tmp_path)
    with pytest.raises(ValueError, match="out: expected a new or empty folder; .* holds other files"):
        pretrain(tiny, tmp_path / "thesis", **options)
    assert (sorted(tmp_path.rglob("*")), tree(tmp_path)) == before


def fail_at_the_first_step(monkeypatch, then=lambda: None):
    def fail(self):
        then()
        raise MemoryError("no room")

    monkeypatch.setattr(Trainer, "train_step", fail)


def test_a_failed_start_removes_only_what_it_made(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    fail_at_the_first_step(monkeypatch, then=lambda: (out / "thesis.txt").write_text("mine"))
    with pytest.raises(MemoryError):
        pretrain(tiny, out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_failed_resume_removes_nothing(earlier, tiny, monkeypatch):
    before = tree(earlier)
    fail_at_the_first_step(monkeypatch)
    with pytest.raises(MemoryError):
        pretrain(tiny, earlier, resume="auto")
    after = tree(earlier)
    assert before.keys() <= after.keys()
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {"config.yaml", "run.json", "events.jsonl"}  # a start leaves its mark


def test_overwrite_that_fails_at_the_first_step_leaves_the_run_before(earlier, tiny, change, monkeypatch, capsys):
    before = tree(earlier)
    with monkeypatch.context() as patch:
        fail_at_the_first_step(patch, then=lambda: (earlier / "thesis.txt").write_text("mine"))
        with pytest.raises(MemoryError):
            pretrain(change(tiny, run__seed=7, run__evaluate_every=6), earlier, overwrite=True)
    (earlier / "thesis.txt").unlink()
    assert tree(earlier) == before
    assert not [p.name for p in earlier.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    assert pretrain(change(tiny, run__stop_at=4), earlier, resume="auto") == 0
    assert "resumed from step-" in capsys.readouterr().out


def test_overwrite_that_is_killed_before_its_first_step_leaves_the_run_before(earlier, tiny, change, capsys):
    """As by a kill: what was begun is neither discarded nor closed."""
    before = tree(earlier)
    new = RunLog(earlier)
    new.open(change(tiny, run__seed=7), {"step": 0, "new": True}, overwrite=True)
    new.close()
    assert plan.plan(tiny, earlier, "auto").saved.state["step"] == 2  # whoever only looks sees it where it is
    assert pretrain(change(tiny, run__stop_at=4), earlier, resume="auto") == 0
    said = capsys.readouterr()
    assert f"put back the run that an unfinished --overwrite had set aside in {earlier}" in said.err
    assert "resumed from step-00000002" in said.out
    after = tree(earlier)
    assert before.keys() <= after.keys() and not (earlier / ".replaced-run").exists()


@pytest.mark.parametrize("options", [{}, {"resume": "auto"}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize("number", exits.SCHEDULER_SIGNALS)
def test_a_signal_before_the_first_step_changes_nothing(number, options, earlier, tiny, tmp_path, monkeypatch, capsys):
    out = earlier if options else tmp_path / "out"
    before = tree(out)

    def interrupted(self, meanwhile):
        signal.raise_signal(number)
        signal.raise_signal(number)

    monkeypatch.setattr(FolderDataset, "take_fingerprint", interrupted)
    assert pretrain(tiny, out, **options) == exits.PREEMPTED
    name = signal.Signals(number).name
    assert capsys.readouterr().err == f"dex pretrain: {name} before the first step: start the same command again\n"
    assert tree(out) == before and out.exists() == bool(options)


def test_overwrite_leaves_nothing_of_the_run_before(earlier, tiny, change):
    (earlier / "notes.txt").write_text("mine")
    (earlier / "report.html").write_text("of the run before")
    assert pretrain(change(tiny, run__seed=7, schedule__steps=4), earlier, overwrite=True) == 0
    (start,) = json.loads((earlier / "run.json").read_text())["starts"]
    assert (start["step"], start["steps"], start["resumed_from"]) == (0, 4, None)
    assert config.read_yaml(earlier / "config.yaml", config.Config()).run.seed == 7
    assert [step for step, _ in checkpoint.list_checkpoints(earlier / "checkpoints")] == [4]
    assert [row["step"] for row in read_rows(earlier / "metrics.jsonl")] == [4]
    assert len(list((earlier / "tensorboard").iterdir())) == 1
    assert not (earlier / "report.html").exists() and not (earlier / ".replaced-run").exists()
    assert (earlier / "notes.txt").read_text() == "mine"
    new = earlier.with_name("new")  # where there is nothing to replace
    assert pretrain(change(tiny, schedule__steps=1), new, overwrite=True) == 0


def test_overwrite_is_refused_while_the_run_lives(tiny, change, dex_process, wait_for_rows, tmp_path):
    path, out = tmp_path / "long.yaml", tmp_path / "out"
    path.write_text(config.to_yaml(change(tiny, **LONG)))
    live = dex_process("pretrain", "--config", path, "--out", out)
    wait_for_rows(live, out, 3)
    with pytest.raises(ValueError, match=f"out: expected a folder that no other run uses; process {live.pid} on "):
        pretrain(tiny, out, overwrite=True)
    live.terminate()
    assert live.wait(timeout=60) == 75
    assert_whole(out)


def test_what_a_killed_start_left_is_no_run(tiny, change, tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "config.yaml.partial").write_text("cut sh")
    assert RunLog(tmp_path).is_empty()
    assert pretrain(change(tiny, schedule__steps=1), tmp_path) == 0
    assert not (tmp_path / "config.yaml.partial").exists()


# Which data a run that goes on was started with.


def started_with(out, name):
    """Let the checkpoints of a run say that its data had another fingerprint."""
    for _, folder in checkpoint.list_checkpoints(out / "checkpoints"):
        state = json.loads((folder / "state.json").read_text()) | {"data_fingerprint": name}
        (folder / "state.json").write_text(json.dumps(state) + "\n")
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        files = manifest["files"] | {"state.json": checkpoint._digest(folder / "state.json")}
        (folder / "MANIFEST.json").write_text(checkpoint._manifest_text(manifest["step"], files))


def test_a_run_whose_fingerprint_did_not_cover_pixels_goes_on_and_says_so(earlier, tiny, change, images, capsys):
    dataset = open_dataset(images)
    assert dataset.earlier_fingerprint not in (None, dataset.fingerprint)
    started_with(earlier, dataset.earlier_fingerprint)
    assert plan.plan(tiny, earlier, "auto").notes == (EARLIER_FINGERPRINT,)
    assert pretrain(change(tiny, run__stop_at=4), earlier, resume="auto") == 0
    assert EARLIER_FINGERPRINT in capsys.readouterr().out
    assert checkpoint.newest_good(earlier / "checkpoints")[0].state["data_fingerprint"] == dataset.fingerprint
    assert plan.plan(tiny, earlier, "auto").notes == ()
    started_with(earlier, "0" * 64)
    with pytest.raises(
        ValueError, match=f"{earlier}/.*: data: expected the images .* was started; those in {images} differ"
    ):
        pretrain(tiny, earlier, resume="auto")


def test_arrays_that_were_replaced_in_place_are_noticed(tiny, change, tmp_path):
    """Other pixels, with the same names, sizes and times."""
    folder = tmp_path / "arrays"
    for number in range(24):
        (folder / "ct").mkdir(parents=True, exist_ok=True)
        np.save(folder / "ct" / f"{number:02d}.npy", np.full((32, 32), number, np.uint8))
    c = change(tiny, data__path=str(folder))
    assert pretrain(change(c, run__stop_at=2), tmp_path / "out") == 0
    for path in (folder / "ct").iterdir():
        times = path.stat()
        np.save(path, 255 - np.load(path))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match=f"data: expected the images .* was started; those in {folder} differ"):
        pretrain(c, tmp_path / "out", resume="auto")


def test_a_run_on_images_that_were_withdrawn_is_refused(tiny, change, tmp_path):
    """Also when others were withdrawn since; a run that was started in between has seen the second ones alone."""
    folder = tmp_path / "set"
    with ShardWriter(folder, name="set", modalities=("CT",), image_size=64) as writer:
        for number in range(24):
            stream = io.BytesIO()
            Image.fromarray(np.full((64, 64), 10 * number, np.uint8)).save(stream, "PNG")
            group = f"p{number // 4}"
            writer.add(f"s{number}", stream.getvalue(), kind="png", modality="CT", split="train", group=group)
    c = change(tiny, data__path=str(folder))
    stopped = change(c, run__stop_at=2)
    for run, gone in (("first", ["s1", "s2"]), ("second", ["s7"])):
        assert pretrain(stopped, tmp_path / run) == 0
        withdrawal = shard_rewrite.plan(folder, frozenset(gone), {}, f"2026-01-0{len(gone)}T03:04:05+00:00")
        shard_rewrite.carry_out(folder, withdrawal)
    for run, count, dates in (("first", 3, "2026-01-02, 2026-01-01"), ("second", 1, "2026-01-01")):
        before = tree(tmp_path / run)
        words = (
            rf"{count} images were withdrawn from {folder} since the run began \({dates}\). Its checkpoints have seen"
        )
        with pytest.raises(ValueError, match=words):
            pretrain(c, tmp_path / run, resume="auto")
        assert tree(tmp_path / run) == before
    assert pretrain(stopped, tmp_path / "third") == 0


def test_pixels_that_were_replaced_in_place_are_noticed(tiny, change, images, tmp_path):
    copy = Path(shutil.copytree(images, tmp_path / "copy"))
    c = change(tiny, data__path=str(copy))
    assert pretrain(change(c, run__stop_at=2), tmp_path / "out") == 0
    path = copy / "ct" / "000.png"
    times, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(
        ValueError, match=f"belongs to another run: data: expected .* in {copy} differ .*pixels.*new --out$"
    ):
        pretrain(c, tmp_path / "out", resume="auto")


def test_a_long_read_is_announced_and_says_how_far_it_is(images, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(plan.time, "monotonic", lambda: now[0])
    large, slow = plan._Reading(open_dataset(images)), plan._Reading(open_dataset(images))
    for seconds in (0.5, 4.0, 25.0, 6.0, 30.0):
        now[0] += seconds
        large(int(now[0] - 100) * 10**9, 100 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "reading 120 images, 100.0 GB, for their fingerprint",
        "read 35.0 GB of 100.0 GB  left 1m06s",
        "read 65.0 GB of 100.0 GB  left 35s",
    ]
    now[0] = 104.0
    slow(10, 1000)
    assert capsys.readouterr().err == ""
    now[0] = 106.0
    slow(20, 1000)
    assert capsys.readouterr().err == "reading 120 images, 1 kB, for their fingerprint\n"
