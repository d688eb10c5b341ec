"""The run folder: what a run was, every row of metrics, events, pictures; and progress on the screen.

``config.yaml``, ``run.json`` (one entry per start), ``metrics.jsonl``, ``events.jsonl``, ``tensorboard/``,
``pictures/``, ``checkpoints/``.
"""

import contextlib
import datetime
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dex.common.units import duration
from dex.config import Config, read_yaml, to_yaml

CONFIG, STARTS, METRICS, EVENTS = "config.yaml", "run.json", "metrics.jsonl", "events.jsonl"
LOCK, LOCK_WAIT = ".lock", 30.0
"""The file that a run holds while it writes to its folder; seconds that another one waits for it."""


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, processors and the commit of the code; no names of hosts or users."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", "dexkernels", "triton", "safetensors")},
        "os": platform.platform(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda,
        **_commit(),
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a last line that a kill cut short is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


class RunLog:
    """Writes one run folder. Nothing is created before `open`; `discard` takes back the `open` of a new run.

    active: False on all ranks but one, where nothing is written.
    """

    def __init__(self, folder: Path, active: bool = True):
        self.folder, self.active = folder, active
        self._created: list[Path] = []
        self._fresh = False
        self._lock: int | None = None
        self._files: dict[str, Any] = {}
        self._board: Any = None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    def holds_run(self) -> bool:
        return (self.folder / CONFIG).exists()

    def is_empty(self) -> bool:
        """Nothing is there but what a start that was killed at once leaves."""
        left = {_work(self.folder / CONFIG), self.folder / LOCK}
        return not self.folder.exists() or left.issuperset(self.folder.iterdir())

    def lock(self) -> None:
        """Keep other processes' runs out of the folder until `close`, or until this process ends, however it does.

        What still holds it may be about to end: it is waited for, `LOCK_WAIT` seconds. Raises: ValueError when it is
        held still. A file system that knows no locks keeps nobody out.
        """
        if self._lock is not None or not self.active:
            return
        path, deadline, told = self.folder / LOCK, time.monotonic() + LOCK_WAIT, False
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while True:
                try:
                    # Not flock, which the loader's forked workers would share and keep.
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                    break
                except OSError as error:
                    if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                        break
                    if error.errno not in (errno.EACCES, errno.EAGAIN):
                        raise
                who = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "another process"
                if time.monotonic() > deadline:
                    raise ValueError(f"out: expected a folder that no other run uses; {who} writes to {self.folder}")
                if not told:
                    print(f"dex pretrain: {who} writes to {self.folder}; waiting for it to end", file=sys.stderr)
                told = True
                time.sleep(0.2)
        except BaseException:
            os.close(descriptor)
            raise
        self._lock = descriptor

    def config(self) -> Config:
        """What the run in the folder was last started with. FileNotFoundError; ValueError naming the field."""
        return read_yaml(self.folder / CONFIG, Config())

    def last_start(self) -> dict[str, Any] | None:
        """The newest entry of ``run.json``; None when the run was killed before it wrote one."""
        starts = self._starts()
        return starts[-1] if starts else None

    def _starts(self) -> list[dict[str, Any]]:
        path = self.folder / STARTS
        return json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else []

    def open(self, config: Config, start: Mapping[str, Any]) -> None:
        """Create or continue the folder; ``start`` is this start's entry in ``run.json``, ``start["step"]`` its step.

        Rows and events after that step are removed: the run will write them again.
        """
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        step = start["step"]
        self._fresh = self.is_empty()
        for folder in (*reversed(self.folder.parents), self.folder):
            if not folder.exists():
                folder.mkdir()
                self._created.append(folder)
        self.lock()
        _write(self.folder / CONFIG, to_yaml(config))  # first: it makes the folder a run's, whatever comes next
        self.pictures.mkdir(exist_ok=True)
        _write(self.folder / STARTS, json.dumps({"starts": [*self._starts(), dict(start)]}, indent=1) + "\n")
        for name in (METRICS, EVENTS):
            path = self.folder / name
            kept = [row for row in read_rows(path) if row["step"] <= step] if step else []
            _write(path, "".join(json.dumps(row) + "\n" for row in kept))
            self._files[name] = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def row(self, row: Mapping[str, Any]) -> None:
        """Append to ``metrics.jsonl`` and draw every number in tensorboard."""
        if not self.active:
            return
        self._write_line(METRICS, row)
        for key, value in row.items():
            if isinstance(value, Mapping):
                for name, number in value.items():
                    if isinstance(number, int | float):  # tables are for `dex report` alone
                        self._board.add_scalar(f"{key}/{name}", number, row["step"])
            elif isinstance(value, list):
                for layer, number in enumerate(value):
                    self._board.add_scalar(f"{key}/layer {layer}", number, row["step"])
            elif key != "step" and value is not None:
                self._board.add_scalar(key, value, row["step"])

    def event(self, step: int, kind: str, **details: Any) -> None:
        """Append to ``events.jsonl``."""
        self._write_line(EVENTS, {"step": step, "event": kind, **details})

    def picture(self, name: str, tag: str, figure: Any, step: int) -> None:
        """Write ``pictures/name`` and show it in tensorboard under ``tag``."""
        if not self.active:
            return
        from dex.analysis import plots

        drawn = plots.pixels(figure)
        plots.save(drawn, self.pictures / name)
        self._board.add_image(tag, drawn, step, dataformats="HWC")

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.folder / METRICS)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove what `open` made and what was written since; a continued run stays, and so do older folders."""
        self.close()
        if self._fresh:
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in reversed(self._created):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _write_line(self, name: str, row: Mapping[str, Any]) -> None:
        if not self.active:
            return
        self._files[name].write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self._files[name].flush()


class Progress:
    """A bar with time left and every loss on a terminal; elsewhere one plain line per row; nothing when not active."""

    def __init__(self, steps: int, start: int, active: bool = True):
        self._steps, self._start, self._active = steps, start, active
        self._began = time.monotonic()
        self._bar: Any = None
        if active and sys.stdout.isatty():
            self._make_bar(steps, start)

    def _make_bar(self, steps: int, start: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.text import Text

        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        self._task = self._bar.add_task("", total=steps, completed=start)
        self._line = Text("")

    @contextlib.contextmanager
    def shown(self) -> Iterator["Progress"]:
        if self._bar is None:
            yield self
            return
        from rich.console import Group
        from rich.live import Live

        with Live(Group(self._bar, self._line), refresh_per_second=4) as live:
            self._console = live.console
            yield self

    def step(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def row(self, row: Mapping[str, Any]) -> None:
        if not self._active:
            return
        text = _summary(row)
        if self._bar is not None:
            self._line.plain = text
            return
        done = row["step"] - self._start
        left = (time.monotonic() - self._began) / max(done, 1) * (self._steps - row["step"])
        print(f"step {row['step']}/{self._steps}  {text}  left {duration(left)}", flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._console.print(text, markup=False, highlight=False)
        elif self._active:
            print(text, flush=True)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _summary(row: Mapping[str, Any]) -> str:
    def number(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    text = (
        f"loss {number('loss', '.4f')}  align {number('align_loss', '.4f')}  balance {number('balance_loss', '.4f')}  "
        f"grad {number('grad_norm', '.3f')}  lr {row['lr']:.2e}  momentum {row['momentum']:.4f}  "
        f"noise {row['noise_std']:.3f}  {number('images_per_s', '.1f')} images/s"
    )
    return text + (f"  skipped {row['skipped']}" if row["skipped"] else "")


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    work = _work(path)
    work.write_text(text, encoding="utf-8")
    os.replace(work, path)


def _work(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """Commit of the source tree and whether it was changed; None when the package is not run from its repository."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody else's repository.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}
