"""Rows 7 to 18, 27 and 28 of what we promise, on two gloo ranks: sampled, or in full with DEX_RELIABILITY=full set.

Every promise records what was wanted and what was done; DEX_RELIABILITY_OUT names a JSON file for all of them. With
DEX_RELIABILITY_PART what runs takes its place in that file, and the rest of it stays.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
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
from dex.train.runlog import describe_machine, read_rows

ROWS = pytest.StashKey[list]()
BEGAN = time.monotonic()


def pytest_configure(config):
    config.stash[ROWS] = []


def pytest_collection_modifyitems(items):
    """The page is compared with what was tried, so it comes last."""
    items.sort(key=lambda item: item.path.name == "test_page.py")


@pytest.fixture
def tried(request) -> list[dict]:
    """What promises were tried so far, as in the results."""
    return request.config.stash[ROWS]


@pytest.fixture(scope="session")
def full() -> bool:
    return os.environ.get("DEX_RELIABILITY") == "full"


@pytest.fixture
def record(request):
    """``record(row, promise, done, wanted, **details)``: one figure, printed, kept, and then asserted."""
    began = time.monotonic()

    def add(row: int, promise: str, done: int, wanted: int, **details) -> None:
        seconds = round(time.monotonic() - began, 1)
        request.config.stash[ROWS].append(
            {"row": row, "promise": promise, "done": done, "wanted": wanted, "seconds": seconds, "details": details}
        )
        assert done == wanted, f"row {row}, {promise}: {done} of {wanted}; {details}"

    return add


def pytest_terminal_summary(terminalreporter, config):
    rows = sorted(config.stash[ROWS], key=lambda r: (r["row"], r["promise"]))
    if not rows:
        return
    in_full = os.environ.get("DEX_RELIABILITY") == "full"
    terminalreporter.section(f"reliability, {'in full' if in_full else 'sampled'}")
    for r in rows:
        line = f"{r['row']:>2}  {r['done']} of {r['wanted']}  {r['promise']}  {r['details']}  ({r['seconds']} s)"
        terminalreporter.write_line(line)
    if out := os.environ.get("DEX_RELIABILITY_OUT"):
        path, date = Path(out), datetime.datetime.now(datetime.UTC).date().isoformat()
        machine = describe_machine(torch.device("cpu"))
        for row in rows:
            row |= {"commit": machine["commit"], "dirty": machine["dirty"], "date": date, "cpu": machine["cpu"]}
        failed = [report.nodeid for kind in ("failed", "error") for report in terminalreporter.getreports(kind)]
        before = json.loads(path.read_text(encoding="utf-8")) if os.environ.get("DEX_RELIABILITY_PART") else None
        if before:  # what was tried again takes the place of what was there; the rest stays, with its own commit
            tried = {(row["row"], row["promise"]) for row in rows}
            ran = {report.nodeid for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)}
            rows += [row for row in before["rows"] if (row["row"], row["promise"]) not in tried]
            failed += [name for name in before["failed"] if name not in ran | set(failed)]
        body = {
            "date": date,
            "full": in_full and (before is None or before["full"]),
            "seconds": round(time.monotonic() - BEGAN) + (before["seconds"] if before else 0),
            "machine": machine,
            "rows": sorted(rows, key=lambda r: (r["row"], r["promise"])),
            "failed": failed,
        }
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


@dataclasses.dataclass
class Rank:
    """One process; `stdout` and `stderr` are files."""

    fleet: "Fleet"
    pid: int
    stdout: Path
    stderr: Path
    code: int | None = None

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None when it still runs then."""
        if self.code is None:
            self.code = self.fleet.ask({"wait": self.pid, "seconds": max(seconds, 0)})
        return self.code

    def send(self, number: int) -> None:
        if self.wait(0) is None:
            os.kill(self.pid, number)

    def said(self) -> str:
        return self.stdout.read_text() + self.stderr.read_text()


class Fleet:
    """Starts ranks of ``dex pretrain`` by forking one process that has imported everything already."""

    def __init__(self, folder: Path, **environment: str):
        self.folder, self.number, self.started = folder, 0, []
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | threads | path | environment,
        )

    def ask(self, order: dict):
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, configuration: config.Config, out: Path, count: int = 2, **faults) -> list[Rank]:
        """``count`` ranks of a run in ``out``, resumed if it is there; faults as in ``rank.py``."""
        self.number += 1
        path = self.folder / f"{self.number}.yaml"
        path.write_text(config.to_yaml(configuration))
        ranks, port = [], free_port()
        for rank in range(count):
            files = [self.folder / f"{self.number}.{rank}.{kind}" for kind in ("out", "err")]
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            order = {
                "arguments": ["pretrain", "--config", str(path), "--out", str(out), "--resume", "auto"],
                "environment": {k: str(v) for k, v in environment.items()} | {"MASTER_ADDR": "127.0.0.1"},
                "faults": faults,
                "stdout": str(files[0]),
                "stderr": str(files[1]),
            }
            ranks.append(Rank(self, self.ask({"start": order}), *files))
        self.started += ranks
        return ranks

    def end(self, ranks: list[Rank], seconds: float = 120) -> list[int | None]:
        """Exit codes; None for one that had to be killed after ``seconds``."""
        deadline = time.monotonic() + seconds
        codes = [rank.wait(deadline - time.monotonic()) for rank in ranks]
        for rank in ranks:
            if rank.code is None:
                os.kill(rank.pid, signal.SIGKILL)
                rank.wait(10)
        return codes

    def run(self, configuration: config.Config, out: Path, count: int = 2, codes=(0,), **faults) -> list[Rank]:
        """`start` and `end`, with the exit codes that are expected."""
        ranks = self.start(configuration, out, count, **faults)
        got = self.end(ranks)
        assert all(code in codes for code in got), (got, [rank.said() for rank in ranks])
        return ranks

    def close(self) -> None:
        for rank in self.started:
            with contextlib.suppress(ProcessLookupError):
                if rank.code is None:
                    os.kill(rank.pid, signal.SIGKILL)
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def fleet(tmp_path_factory):
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    yield fleet
    fleet.close()


@pytest.fixture
def other_fleet(tmp_path):
    """Ranks that compute with another processor's instructions."""
    fleet = Fleet(tmp_path, ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE", ONEDNN_MAX_CPU_ISA="SSE41")
    yield fleet
    fleet.close()


@pytest.fixture
def clocked_fleet(tmp_path):
    """Ranks whose time of day is moved by the seconds in a file, 8 bytes; and the file."""
    offset, library = tmp_path / "offset", tmp_path / "clock.so"
    offset.write_bytes(bytes(8))
    source = Path(__file__).with_name("clock.c")
    if shutil.which("cc") is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler for a clock that jumps")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    fleet = Fleet(tmp_path, LD_PRELOAD=str(library), CLOCK_OFFSET=str(offset))
    yield fleet, offset
    fleet.close()


@pytest.fixture(scope="session")
def tiny(images) -> config.Config:
    """A step in milliseconds: 64 pixels, 2 layers, 4 experts."""
    values = {
        "model": {
            "img_size": 64,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "num_experts": 4,
            "decoder_embed_dim": 16,
            "decoder_depth": 1,
            "decoder_num_heads": 2,
            "norm_pix_loss": False,
        },
        "data": {"path": str(images), "batch_size": 8},
        "optim": {"base_lr": 0.2},
        "schedule": {"steps": 20, "warmup": 0.25},
        "parallel": {"timeout": 60.0},
        "run": {
            "device": "cpu",
            "precision": "fp32",
            "log_every": 1,
            "evaluate_every": 0,
            "evaluate_images": 6,
            "checkpoint_every": 100_000,
        },
    }
    return config.from_dict(values, config.Config())


@pytest.fixture(scope="session")
def change():
    """``base`` with ``section__field=value`` replaced."""

    def changed(base: config.Config, **fields) -> config.Config:
        for name, value in fields.items():
            section, field = name.split("__")
            base = dataclasses.replace(base, **{section: dataclasses.replace(getattr(base, section), **{field: value})})
        return base

    return changed


@pytest.fixture(scope="session")
def state_of():
    """SHA-256 over all tensors of a checkpoint and over what its state says of place and counters."""

    def state(folder: Path) -> tuple[str, str]:
        sha = hashlib.sha256()
        for name, tensor in sorted(checkpoint.tensors(folder).items()):
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
        said = checkpoint.load(folder).state
        said.pop("config")
        return sha.hexdigest(), json.dumps(said, sort_keys=True)

    return state


@pytest.fixture(scope="session")
def traced():
    """What ranks wrote to a trace: one list of entries per rank, those that have ``key``."""

    def read(path: Path, key: str, count: int = 2) -> list[list[dict]]:
        return [[r for r in read_rows(Path(f"{path}.{rank}")) if key in r] for rank in range(count)]

    return read


@dataclasses.dataclass
class Base:
    """A run of two ranks, saved every 4 of 16 steps and stopped at step 8; and the same one without a stop."""

    config: config.Config
    folder: Path
    whole: dict[int, tuple[str, str]]
    """`state_of` its checkpoints at 4, 8, 12 and 16."""
    operations: list[tuple[int, int, str]]
    """(rank, number, name) of every file operation of the save at 12 and of the removal of those at 4 and 8."""


@pytest.fixture(scope="session")
def base(fleet, tiny, change, state_of, tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    c = change(tiny, schedule__steps=16, run__checkpoint_every=4)
    fleet.run(change(c, run__keep_checkpoints=4), root / "whole")
    whole = {step: state_of(folder) for step, folder in checkpoint.list_checkpoints(root / "whole" / "checkpoints")}
    fleet.run(change(c, run__stop_at=8), root / "out")
    shutil.copytree(root / "out", root / "count")
    c = change(c, run__keep_checkpoints=1)
    fleet.run(change(c, run__stop_at=12), root / "count", operation=None, operations=str(root / "operations"))
    lines = [(r, line.split()) for r in (0, 1) for line in (root / f"operations.{r}").read_text().splitlines()]
    return Base(c, root / "out", whole, [(rank, int(number), name) for rank, (number, name) in lines])
