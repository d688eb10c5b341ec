"""Rows 12 and 16: a signal to any one rank; ranks that are killed, stopped or hang."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dex import config
from dex.train import checkpoint
from dex.train.runlog import read_rows

pytestmark = pytest.mark.slow

TIMEOUT = 20.0
LONG = {"schedule__steps": 100_000, "parallel__timeout": TIMEOUT}


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_signal_saves(fleet, tiny, change, tmp_path, traced, record, full):
    trials, good, late = (30 if full else 2), 0, []
    draw = random.Random("row 12")
    for trial in range(trials):
        strategy = "fsdp" if trial % 3 == 2 else "ddp"
        often = {"run__evaluate_every": 7, "run__checkpoint_every": 5}
        c = change(tiny, **LONG, **often, parallel__strategy=strategy)
        out, trace, rank = tmp_path / f"{trial}", tmp_path / f"{trial}.trace", trial % 2
        ranks = fleet.start(c, out, trace=str(trace))
        wait_for(lambda out=out: read_rows(out / "metrics.jsonl"))
        time.sleep(draw.uniform(0, 0.5))
        when = time.monotonic()
        ranks[rank].send(signal.SIGTERM)
        codes = fleet.end(ranks, 30)
        done = sum(entry["at"] < when for entry in traced(trace, "done")[rank])
        step, folder = checkpoint.list_checkpoints(out / "checkpoints")[-1]
        checkpoint.load(folder)
        late.append(step - (done + 1))  # beyond the step under way
        sound = codes == [75, 75] and late[-1] <= 1
        if not sound:
            print(trial, codes, late[-1], *(r.said()[-3000:] for r in ranks))
        good += sound
    details = {"steps_after_the_one_under_way": {n: late.count(n) for n in sorted(set(late))}}
    record(12, "SIGTERM to one rank: saved at most one step later, exit code 75 of both", good, trials, **details)


def torchrun(configuration, folder: Path, **faults):
    """Both ranks under torchrun; the launcher, and what it writes."""
    (folder / "c.yaml").write_text(config.to_yaml(configuration))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "60"]
    command += [str(Path(__file__).with_name("rank.py")), json.dumps(faults | {"trace": str(folder / "trace")})]
    command += ["pretrain", "--config", str(folder / "c.yaml"), "--out", str(folder / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    with (folder / "said").open("w") as said:
        return subprocess.Popen([sys.executable, *command], stdout=said, stderr=said, env=environment)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_signal_to_torchrun_saves(tiny, change, tmp_path, traced, record, full):
    """As a scheduler does: it signals the launcher, which passes it on."""
    trials, good = (6 if full else 2), 0
    for trial in range(trials):
        folder = tmp_path / f"{trial}"
        folder.mkdir()
        launcher = torchrun(change(tiny, **LONG), folder)
        wait_for(lambda folder=folder: len(read_rows(folder / "out" / "metrics.jsonl")) >= 5, 120)
        launcher.send_signal(signal.SIGUSR1 if trial % 2 else signal.SIGTERM)
        code = launcher.wait(60)
        # How long the launcher takes to pass it on is its own matter.
        when = min(entries[0]["at"] for entries in traced(folder / "trace", "signal"))
        done = max(entry["at"] < when and entry["done"] for entry in traced(folder / "trace", "done")[0])
        step, saved = checkpoint.list_checkpoints(folder / "out" / "checkpoints")[-1]
        checkpoint.load(saved)
        events = [e["event"] for e in read_rows(folder / "out" / "events.jsonl")]
        sound = code != 0 and done <= step <= done + 2 and events[-1:] == ["preempted"]
        if not sound:
            print(trial, code, step, done, events, (folder / "said").read_text()[-3000:])
        good += sound
    record(12, "SIGTERM or SIGUSR1 to torchrun: all ranks save, at most one step later", good, trials)


def test_a_signal_while_a_run_starts(fleet, tiny, change, tmp_path, record, full):
    """Nothing of what was saved is lost, the ranks end, and the next start goes on."""
    trials, good, ends = (20 if full else 3), 0, {}
    draw = random.Random("row 12, start")
    fleet.run(change(tiny, schedule__steps=40, run__stop_at=6, run__checkpoint_every=3), tmp_path / "out")
    step = 6
    for trial in range(trials):
        c = change(tiny, schedule__steps=40, run__stop_at=40, run__checkpoint_every=100, parallel__timeout=8.0)
        ranks = fleet.start(c, tmp_path / "out")
        time.sleep(draw.uniform(0, 0.8))
        ranks[trial % 2].send(signal.SIGTERM)
        codes = fleet.end(ranks, 30)  # one that waits for the other to come tries twice
        now = checkpoint.newest_good(tmp_path / "out" / "checkpoints")[0].state["step"]
        for code in codes:
            ends[str(code)] = ends.get(str(code), 0) + 1
        good += None not in codes and now >= step
        step = now
    fleet.run(change(tiny, schedule__steps=40), tmp_path / "out")
    finished = checkpoint.newest_good(tmp_path / "out" / "checkpoints")[0].state["step"] == 40
    promise = "SIGTERM to one rank while a run starts: both end, nothing saved is lost, the next start goes on"
    record(12, promise, good if finished else 0, trials, exit_codes=ends)


def test_lost_ranks_are_named(fleet, tiny, change, tmp_path, traced, record, full):
    """All cases at once: they mostly sleep."""
    cases = [(what, rank, "plain", "ddp") for what in ("kill", "stop", "hang") for rank in (0, 1)]
    if full:
        cases += [(what, rank, "plain", "fsdp") for what in ("kill", "stop", "hang") for rank in (0, 1)]
        cases += [(what, rank, "torchrun", "ddp") for what in ("kill", "stop", "hang") for rank in (0, 1)]
        groups = [cases[i : i + 6] for i in range(0, len(cases), 6)] * 2
    else:
        groups = [[("kill", 1, "plain", "ddp"), ("stop", 0, "plain", "ddp"), ("hang", 1, "plain", "ddp")]]
    good = {"kill": [], "stop": [], "hang": []}
    for number, group in enumerate(groups):
        watched = []
        for what, rank, launcher, strategy in group:
            folder = tmp_path / f"{number}-{what}-{rank}-{launcher}-{strategy}"
            folder.mkdir()
            c = change(tiny, **LONG, parallel__strategy=strategy)
            faults = {"rank": rank, "hang_at": 5} if what == "hang" else {}
            if launcher == "plain":
                started = fleet.start(c, folder / "out", trace=str(folder / "trace"), **faults)
            else:
                started = torchrun(c, folder, **faults)
            watched.append((what, rank, folder, started))
        for case in watched:
            what, rank, folder, started = case
            wait_for(lambda folder=folder: len(read_rows(folder / "out" / "metrics.jsonl")) >= 5, 120)
        if any(what == "hang" for what, *_ in watched):
            time.sleep(0.5)
        pids = [[r[0]["pid"] for r in traced(folder / "trace", "pid")] for _, _, folder, _ in watched]
        last, began, ended = time.monotonic(), [], {}
        for (what, rank, folder, _), pid in zip(watched, pids, strict=True):
            if what == "hang":
                began.append(traced(folder / "trace", "done")[rank][-1]["at"])
            else:
                began.append(time.monotonic())
                os.kill(pid[rank], signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        while time.monotonic() - last < 60 and len(ended) < len(watched):
            for k, ((what, rank, _, started), pid) in enumerate(zip(watched, pids, strict=True)):
                if isinstance(started, list):
                    for r in started:
                        r.wait(0)
                others = pid if what == "hang" else [pid[1 - rank]]
                if k not in ended and not any(map(alive, others)):
                    ended[k] = time.monotonic() - began[k]
            time.sleep(0.05)
        for k, ((what, rank, folder, started), pid) in enumerate(zip(watched, pids, strict=True)):
            for one in pid:
                if alive(one):
                    os.kill(one, signal.SIGKILL)
            if isinstance(started, list):
                fleet.end(started, 5)
                said = started[1 - rank].said()
            else:
                started.wait(60)
                said = (folder / "said").read_text()
            limit = 30 if what == "kill" else TIMEOUT + 10
            who = f"rank {rank} (process {pid[rank]} on "
            reason = "furthest behind: " if what == "hang" else f"rank {1 - rank} ends: "
            stacks = "most recent call first" in said
            named = reason + who in said and (what != "hang" or f"; rank {1 - rank}" not in said)
            sound = k in ended and ended[k] <= limit and named and stacks
            if not sound:
                print(folder.name, ended.get(k), {"named": named, "stacks": stacks}, said[-6000:])
            good[what].append(ended[k] if sound else None)
    words = {
        "kill": (30, "a rank killed: the other exits within 30 s naming it"),
        "stop": (TIMEOUT + 10, "a rank stopped: the other exits within the timeout + 10 s, naming it, with stacks"),
        "hang": (TIMEOUT + 10, "a rank that hangs in its loader: named as furthest behind, all end, with stacks"),
    }
    for what, (limit, promise) in words.items():
        seconds = [s for s in good[what] if s is not None]
        details = {"slowest_seconds": round(max(seconds, default=0.0), 1), "limit_seconds": limit}
        record(
            16,
            promise,
            len(seconds),
            len(good[what]),
            **details,
            under="plain ranks and torchrun" if full else "plain ranks",
        )


def test_a_rank_that_fails_alone_is_named(fleet, tiny, change, tmp_path, traced, record, full):
    """gloo tells the others of it; NCCL does not, and neither does it let go of a rank that leaves."""
    cases = [(1, "ddp", False), (0, "ddp", True)]
    if full:
        cases = [(rank, strategy, deaf) for rank in (0, 1) for strategy in ("ddp", "fsdp") for deaf in (False, True)]
    started = []
    for rank, strategy, deaf in cases:
        folder, c = tmp_path / f"{rank}{strategy}{deaf}", change(tiny, **LONG, parallel__strategy=strategy)
        faults = {"like_nccl": True} if deaf else {}
        started.append(fleet.start(c, folder / "out", trace=str(folder) + ".trace", rank=rank, error_at=5, **faults))
    good, slowest = 0, 0.0
    for (rank, strategy, deaf), ranks in zip(cases, started, strict=True):
        wait_for(lambda rank=rank, ranks=ranks: any(r.wait(0) is not None for r in ranks))
        began = time.monotonic()
        codes = fleet.end(ranks, 40)
        slowest = max(slowest, time.monotonic() - began)
        who, said = f"rank {1 - rank} ends: rank {rank} (process {ranks[rank].pid} on ", ranks[1 - rank].said()
        named = who in said and "failed, OSError: [Errno 5] Input/output error" in said
        sound = codes == [1, 1] and named and "OSError: [Errno 5] Input/output error" in ranks[rank].said()
        if not sound:
            print(rank, strategy, deaf, codes, *(r.said()[-4000:] for r in ranks))
        good += sound
    promise = "a rank that fails alone with an error of its own: the other exits within 30 s naming it and the error"
    details = {"slowest_seconds": round(slowest, 1), "limit_seconds": 30}
    record(16, promise, good if slowest <= 30 else 0, len(cases), **details)


def test_a_slow_rank_is_named(fleet, tiny, change, tmp_path, record, full):
    cases = [("slow_loader", 0, "fsdp"), ("slow_forward", 1, "ddp")]
    if full:
        cases += [("slow_loader", 1, "ddp"), ("slow_forward", 0, "ddp"), ("slow_loader", 1, "fsdp")]
    cases.append((None, None, "ddp"))
    good, seen = 0, []
    for number, (what, rank, strategy) in enumerate(cases):
        out = tmp_path / str(number) / "out"
        c = change(tiny, schedule__steps=12, run__log_every=4, run__evaluate_every=0, parallel__strategy=strategy)
        ranks = fleet.run(c, out, **({"rank": rank, what: 0.5} if what else {}))
        named = [row for row in read_rows(out / "events.jsonl") if row["event"] == "slow rank"]
        if what:
            who = f"rank {rank} (process {ranks[rank].pid} on "
            sound = [e["rank"] for e in named] == [rank] and f"{who}" in ranks[0].said()
            seen += [round(e["late_s"], 2) for e in named]
        else:
            sound = all(row["late_s"] < 0.4 for row in named)  # on a busy machine any rank may be a little late
        if not sound:
            print(what, rank, strategy, named, ranks[0].said()[-3000:])
        good += sound
    promise = "a rank that takes 0.5 s longer than the other in its loader or forward: named while the run goes on"
    record(16, promise, good, len(cases), found_late_seconds=seen)
