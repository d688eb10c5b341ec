"""Two gloo ranks against one: the same run, whatever is cut how; and what happens when one of them does not come on.

Run as a program, this file is one rank: ``test_parallel.py CONFIG OUT STEPS``; it writes what it saw to OUT.RANK.json.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dex import config
from dex.train import checkpoint
from dex.train.runlog import read_rows

RUN = {"schedule__balance_weight": (0.0, 0.0), "schedule__steps": 6, "run__checkpoint_every": 100}
# The balance loss is local to what a rank computes at once; without it every way of cutting a batch is the same sum.


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def ranks():
    """Starts ``count`` ranks of a command; what still runs at the end of the test is killed."""
    started = []

    def start(count, *command, stderr=subprocess.PIPE):
        port, here = str(free_port()), []
        for rank in range(count):
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            here.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    env=environment,
                )
            )
        started.extend(here)
        return here

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(processes, timeout=120):
    """(exit code, stdout, stderr) of each."""
    deadline = time.monotonic() + timeout
    return [(p.returncode, *out) for p in processes for out in [p.communicate(timeout=deadline - time.monotonic())]]


@pytest.fixture
def steps(ranks, tmp_path):
    """Takes steps of a configuration on some ranks, and gives what each rank saw."""
    number = 0

    def take(configuration, count, steps):
        nonlocal number
        number += 1
        path, out = tmp_path / f"{number}.yaml", tmp_path / f"{number}"
        path.write_text(config.to_yaml(configuration))
        ended = finish(ranks(count, Path(__file__), path, out, steps))
        assert [code for code, *_ in ended] == [0] * count, ended
        return [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(count)]

    return take


def test_any_cut_of_a_batch_is_the_same_run(tiny, change, steps):
    """1 x 8, 2 micro-batches of 4, 2 ranks, 2 ranks of 2 micro-batches, FSDP2: same images, losses, directors."""
    base = change(tiny, **RUN)
    (whole,) = steps(base, 1, 6)
    cuts = {
        "micro": steps(change(base, parallel__micro_batch=2), 1, 6),
        "ddp": steps(base, 2, 6),
        "ddp micro": steps(change(base, parallel__micro_batch=2, parallel__checkpointing=True), 2, 6),
        "fsdp": steps(change(base, parallel__strategy="fsdp", parallel__micro_batch=2), 2, 6),
    }
    for name, seen in cuts.items():
        # every image once, in one global order
        for step in range(6):
            assert [i for rank in seen for i in rank["ids"][step]] == whole["ids"][step], name
        assert len({rank["directors"] for rank in seen}) == 1, f"{name}: directors differ between ranks"
        for rank in seen:
            assert rank["losses"] == pytest.approx(whole["losses"], rel=2e-5), name
            # AdamW divides by the root of tiny squares at first: a last bit of a gradient may move a weight by 1e-4
            assert rank["moved"] == pytest.approx(whole["moved"], rel=1e-3), name
            assert rank["mass"] == pytest.approx(whole["mass"], rel=1e-5), name
    assert len(set(whole["losses"])) == 6 and whole["moved"] > 1e-3


@pytest.mark.slow
def test_the_fused_optimizer_is_the_same_run_however_the_batch_is_cut(tiny, change, steps):
    """Directors are updated with their experts on every rank, also where these are cut by fsdp."""
    base = change(tiny, **RUN)
    (plain,) = steps(base, 1, 6)
    fused = change(base, optim__fused=True)
    cuts = {
        "one rank": steps(fused, 1, 6),
        "ddp": steps(fused, 2, 6),
        "fsdp micro": steps(change(fused, parallel__strategy="fsdp", parallel__micro_batch=2), 2, 6),
    }
    for name, seen in cuts.items():
        assert len({rank["directors"] for rank in seen}) == 1, f"{name}: directors differ between ranks"
        for rank in seen:
            assert rank["losses"] == pytest.approx(plain["losses"], rel=2e-5), name
            assert rank["moved"] == pytest.approx(plain["moved"], rel=1e-3), name
            assert rank["mass"] == pytest.approx(plain["mass"], rel=1e-5), name
            assert rank["alone"] == 0, f"{name}: directors are updated apart from their experts"
    assert plain["alone"] == 6 and plain["moved"] > 1e-3


@pytest.mark.slow
def test_a_checkpoint_of_the_fused_optimizer_is_cut_anew_for_other_ranks(tiny, change, ranks, tmp_path):
    """2 ranks FSDP2 -> 1 rank -> 2 ranks DDP is the run of one rank, to rounding."""
    base = change(tiny, **RUN, optim__fused=True, run__log_every=2)
    for out, stops in (("out", ((2, 2, "fsdp"), (4, 1, "ddp"), (6, 2, "ddp"))), ("whole", ((6, 1, "ddp"),))):
        for stop, count, strategy in stops:
            c = change(base, run__stop_at=stop, parallel__strategy=strategy)
            (tmp_path / "c.yaml").write_text(config.to_yaml(c))
            command = ("-m", "dex", "pretrain", "--config", tmp_path / "c.yaml", "--resume", "auto")
            ended = finish(ranks(count, *command, "--out", tmp_path / out))
            assert [code for code, *_ in ended] == [0] * count, ended
    rows = [[r["loss"] for r in read_rows(tmp_path / name / "metrics.jsonl")] for name in ("out", "whole")]
    assert len(rows[1]) == 3 and rows[0] == pytest.approx(rows[1], rel=5e-5)


@pytest.mark.slow
def test_a_checkpoint_is_cut_anew_for_other_ranks(tiny, change, ranks, tmp_path):
    """2 ranks DDP -> 1 rank -> 2 ranks FSDP2 -> 1 rank: one run, and what is loaded is what was saved, bit for bit."""
    base = change(tiny, **RUN | {"schedule__steps": 8, "optim__ema": 0.5, "optim__layer_decay": 0.8})
    out, rows = tmp_path / "out", {}
    for stop, count, strategy in ((2, 2, "ddp"), (4, 1, "ddp"), (6, 2, "fsdp"), (8, 1, "ddp")):
        c = change(base, run__stop_at=stop, run__log_every=2, parallel__strategy=strategy)
        (tmp_path / "c.yaml").write_text(config.to_yaml(c))
        command = ("-m", "dex", "pretrain", "--config", tmp_path / "c.yaml", "--out", out, "--resume", "auto")
        ended = finish(ranks(count, *command))
        assert [code for code, *_ in ended] == [0] * count, ended
        assert len(list((out / "checkpoints" / f"step-{stop:08d}").glob("shard-*"))) == count
    (tmp_path / "c.yaml").write_text(config.to_yaml(change(base, run__log_every=2)))
    finish(ranks(1, "-m", "dex", "pretrain", "--config", tmp_path / "c.yaml", "--out", tmp_path / "whole"))
    for name in ("out", "whole"):
        rows[name] = [r["loss"] for r in read_rows(tmp_path / name / "metrics.jsonl")]
    assert len(rows["whole"]) == 4 and rows["out"] == pytest.approx(rows["whole"], rel=5e-5)
    ours, theirs = (checkpoint.tensors(tmp_path / name / "checkpoints" / "step-00000008") for name in rows)
    averages = [name for name in ours if name.startswith("ema.")]
    assert len(averages) > 50
    for name in averages:  # a last bit of a gradient may move a weight by 1e-4 at first
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)
    # resharding itself loses no bit: restore on two FSDP2 ranks, save again
    saved = out / "checkpoints" / "step-00000006"
    (tmp_path / "again.yaml").write_text(config.to_yaml(change(base, parallel__strategy="fsdp")))
    ended = finish(ranks(2, Path(__file__), tmp_path / "again.yaml", tmp_path / "again", saved))
    assert [code for code, *_ in ended] == [0, 0], ended
    want, got = checkpoint.tensors(saved), checkpoint.tensors(tmp_path / "again" / "step-00000006")
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)


def test_a_folder_that_rank_0_may_not_use_ends_all_ranks(ranks, tiny, tmp_path):
    """Rank 0 says why on one line; nothing waits, and nothing is changed."""
    (tmp_path / "c.yaml").write_text(config.to_yaml(tiny))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    ended = finish(ranks(2, "-m", "dex", "pretrain", "--config", tmp_path / "c.yaml", "--out", tmp_path / "out"), 60)
    reason = f"out: expected a new or empty folder; {tmp_path / 'out'} holds other files"
    (first, _, said), (second, _, heard) = ended
    assert (first, said) == (2, f"dex pretrain: {reason}\n")
    assert second == 1 and f"Failed: rank 0: ValueError: {reason}" in heard
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def running(ranks, tiny, change, tmp_path, **fields):
    """A long run on two ranks that has taken its first steps."""
    c = change(tiny, schedule__steps=100_000, run__log_every=1, run__checkpoint_every=50_000, **fields)
    (tmp_path / "c.yaml").write_text(config.to_yaml(c))
    out = tmp_path / "out"
    processes = ranks(2, "-m", "dex", "pretrain", "--config", tmp_path / "c.yaml", "--out", out, "--resume", "auto")
    deadline = time.monotonic() + 90
    while not (out / "metrics.jsonl").exists() or not read_rows(out / "metrics.jsonl"):
        assert all(p.poll() is None for p in processes), finish(processes)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return processes, out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_all(number, ranks, tiny, change, tmp_path):
    processes, out = running(ranks, tiny, change, tmp_path)
    processes[1].send_signal(number)
    last_row = read_rows(out / "metrics.jsonl")[-1]["step"]
    ended = finish(processes, 60)
    assert [code for code, *_ in ended] == [75, 75], ended
    ((step, folder),) = checkpoint.list_checkpoints(out / "checkpoints")
    state = checkpoint.load(folder).state
    assert state["step"] == step >= last_row and read_rows(out / "metrics.jsonl")[-1]["step"] == step
    event = read_rows(out / "events.jsonl")[-1]
    assert event == {"step": step, "event": "preempted", "signal": "a signal to another rank"}


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_others_end(ranks, tiny, change, tmp_path):
    processes, _ = running(ranks, tiny, change, tmp_path)
    processes[1].kill()
    began = time.monotonic()
    _, stderr = processes[0].communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert processes[0].returncode == 1
    assert f"rank 1 (process {processes[1].pid} on" in stderr and "no sign of life" in stderr
    assert "train_step" in stderr  # with the stacks


@pytest.mark.slow
def test_a_stopped_rank_is_named_within_its_time(ranks, tiny, change, tmp_path):
    processes, _ = running(ranks, tiny, change, tmp_path, parallel__timeout=20.0)
    processes[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    _, stderr = processes[0].communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert processes[0].returncode == 1 and f"rank 1 (process {processes[1].pid} on" in stderr
    processes[1].kill()


def main(path: Path, out: Path, what: str) -> None:
    from dex.common.ranks import announced, full, gather, start, stop
    from dex.data import open_dataset
    from dex.train import trainer as engine
    from dex.train.plan import resolve, resolve_device
    from dex.train.trainer import Trainer
    from dexkernels.ops import backends

    torch.set_num_threads(1)
    configuration = config.read_yaml(path, config.Config())
    ranks = announced()
    ranks = start(ranks, resolve_device(configuration.run.device, ranks), 60)
    trainer = Trainer(resolve(configuration, open_dataset(configuration.data.path), ranks))
    if not what.isdigit():
        trainer.restore(checkpoint.load(Path(what)))
        saver = checkpoint.Saver(out, 1, ranks)
        saver.save(trainer.step, trainer.tensors(), trainer.state())
        saver.wait()
        trainer.close()
        return stop(ranks)
    parameters = dict(trainer.model.named_parameters())
    names = sorted(n for n in parameters if ".director." in n)
    before = torch.cat([full(parameters[n]).detach().flatten().clone() for n in names])
    seen = {"ids": [], "losses": [], "mass": None, "alone": 0}
    move, load = engine.move, backends.load

    def watched(optimizer, model, gate_mass, *arguments):
        seen["mass"] = torch.cat(gate_mass).tolist()
        move(optimizer, model, gate_mass, *arguments)

    def loaded(op, backend):
        seen["alone"] += op == "group_ema_"
        return load(op, backend)

    engine.move, backends.load = watched, loaded
    batch = trainer._next_batch

    def noted():
        found = batch()
        seen["ids"].append(list(found[0].ids))
        return found

    trainer._next_batch = noted
    for _ in range(int(what)):
        assert trainer.train_step() == []
        seen["losses"].append(trainer.row()["loss"])
    after = torch.cat([full(parameters[n]).detach().flatten() for n in names])
    seen["directors"] = hashlib.sha256(after.numpy().tobytes()).hexdigest()
    seen["moved"] = (after - before).norm().item() / before.norm().item()
    assert len(gather(ranks, ranks.rank)) == ranks.world_size
    Path(f"{out}.{ranks.rank}.json").write_text(json.dumps(seen))
    trainer.close()
    stop(ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
