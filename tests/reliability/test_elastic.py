"""Row 28: torchrun starts the ranks again after one is lost, and with as many nodes as there are."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dex import config
from dex.train import checkpoint
from dex.train.runlog import read_rows

pytestmark = pytest.mark.slow

RANK = str(Path(__file__).with_name("rank.py"))
NODES = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=5"
"""Seconds that others are waited for, and after which a node that is gone is none."""


def wait_for(condition, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def torchrun():
    """Starts a launcher of ranks that resume; it and its ranks are killed in the end."""
    started = []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    # Without it a node that is first no longer after a change goes on to look for the others at its own address.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"

    def start(configuration: config.Config, folder: Path, *options: str) -> subprocess.Popen:
        path = folder / "c.yaml"
        path.write_text(config.to_yaml(configuration))
        command = [sys.executable, "-m", "torch.distributed.run", *options, RANK, json.dumps({"trace": f"{folder}/t"})]
        command += ["pretrain", "--config", str(path), "--out", str(folder / "out"), "--resume", "auto"]
        with (folder / f"said{len(started)}").open("w") as said:
            started.append(subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True))
        return started[-1]

    yield start
    for launcher in started:
        kill(launcher)


def kill(launcher: subprocess.Popen) -> None:
    """It and its ranks, at once, as when a node goes: each rank has a group of its own."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    with contextlib.suppress(OSError):
        for child in children.read_text().split():
            os.kill(int(child), signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        launcher.kill()
    launcher.wait()


def starts(folder: Path) -> list[dict]:
    path = folder / "out" / "run.json"
    return json.loads(path.read_text())["starts"] if path.exists() else []


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "out" / "metrics.jsonl") if "loss" in row]


def said(folder: Path) -> str:
    return "".join(path.read_text()[-4000:] for path in sorted(folder.glob("said*")))


def test_a_lost_rank_is_started_again(fleet, torchrun, tiny, change, state_of, tmp_path, traced, record, full):
    """Rank 0 and rank 1 in turn, at random moments; the end is that of a run that nothing happened to."""
    c = change(tiny, schedule__steps=60, run__checkpoint_every=5, run__keep_checkpoints=2)
    fleet.run(c, tmp_path / "whole")
    want = state_of(tmp_path / "whole" / "checkpoints" / "step-00000060")
    draw, trials, good = random.Random("row 28"), 4 if full else 1, 0
    for trial in range(trials):
        folder = tmp_path / f"{trial}"
        folder.mkdir()
        launcher = torchrun(c, folder, "--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
        for number in (0, 1):
            wait_for(
                lambda folder=folder, n=number, launcher=launcher: (
                    len(starts(folder)) > n or launcher.poll() is not None
                )
            )
            least = starts(folder)[-1]["step"] + draw.randrange(2, 12)
            wait_for(
                lambda folder=folder, n=least, launcher=launcher: len(steps(folder)) >= n or launcher.poll() is not None
            )
            with contextlib.suppress(ProcessLookupError):
                os.kill(traced(folder / "t", "pid")[(trial + number) % 2][-1]["pid"], signal.SIGKILL)
        code = launcher.wait(240)
        resumed = [start["step"] for start in starts(folder)[1:]]
        same = code == 0 and state_of(folder / "out" / "checkpoints" / "step-00000060") == want
        if not same or len(resumed) != 2:
            print(trial, code, resumed, said(folder))
        good += same and len(resumed) == 2
    promise = "torchrun --max-restarts, a rank killed twice: the run goes on by itself and ends in the same bits"
    record(28, promise, good, trials)


def test_nodes_go_and_come(torchrun, tiny, change, tmp_path, record, full):
    """2 nodes, then 1, then 2 again, of one rank each, under one torchrun --nnodes 1:2 a node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "9", "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "elastic", "--rdzv-conf", NODES]
    c = change(tiny, schedule__steps=100_000, run__checkpoint_every=5)
    trials, good = 2 if full else 1, 0
    for trial in range(trials):
        folder = tmp_path / f"{trial}"
        folder.mkdir()
        # Ranks go by address: whoever joins becomes the first, and the node that stays the second.
        first = torchrun(c, folder, *options, "--local-addr", "127.0.0.2")
        time.sleep(1)
        second = torchrun(c, folder, *options, "--local-addr", "127.0.0.1")
        wait_for(lambda folder=folder: len(steps(folder)) > 8)
        if [start["ranks"] for start in starts(folder)] == [1]:  # the other node was late
            wait_for(
                lambda folder=folder: len(starts(folder)) > 1 and steps(folder)[-1] > starts(folder)[-1]["step"] + 8
            )
        before = len(starts(folder))
        kill(second)
        wait_for(lambda f=folder, n=before: len(starts(f)) > n and steps(f)[-1] > starts(f)[-1]["step"] + 8)
        alone = len(starts(folder))
        torchrun(c, folder, *options, "--local-addr", "127.0.0.1")
        wait_for(lambda f=folder, n=alone: len(starts(f)) > n and steps(f)[-1] > starts(f)[-1]["step"] + 8)
        first.send_signal(signal.SIGTERM)
        first.wait(120)
        ranks = [start["ranks"] for start in starts(folder)]
        done = steps(folder)
        saved, passed_over = checkpoint.newest_good(folder / "out" / "checkpoints")
        sound = ranks[-3:] == [2, 1, 2] and done == list(range(1, len(done) + 1)) and saved and not passed_over
        if not sound:
            print(trial, ranks, done[-5:], passed_over, said(folder))
        good += bool(sound)
    promise = "torchrun --nnodes 1:2, a node killed and started again: 2, 1 and 2 ranks go on, every step once"
    record(28, promise, good, trials)
