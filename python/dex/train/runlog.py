"""The run folder: what a run was, every row of metrics, events, pictures; and progress on the screen.

``config.yaml``, ``run.json`` (one entry per start), ``metrics.jsonl``, ``events.jsonl``, ``tensorboard/``,
``pictures/``, ``checkpoints/``.
"""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dex.common import atomic
from dex.common.units import duration
from dex.config import Config, read_yaml, to_yaml
from dex.train.lock import LOCK, FolderLock

CONFIG, STARTS, METRICS, EVENTS = "config.yaml", "run.json", "metrics.jsonl", "events.jsonl"
FILES, FOLDERS = (CONFIG, STARTS, METRICS, EVENTS), ("checkpoints", "pictures", "tensorboard")
"""Everything that a run writes into its folder, but for the lock."""
LOCK_WAIT = 30.0
"""Seconds that a resume waits for the process that still writes to the folder."""


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
    """Writes one run folder, of which it looks at nothing and changes nothing until it holds it.

    `hold`, then look (`holds_run`, `is_empty`), then `open`; `close` in the end, or `discard`, which takes back what
    this process made. Looking alone, without `hold`, is for those who write nothing.

    active: False on all ranks but one, where nothing is written.
    """

    def __init__(self, folder: Path, active: bool = True):
        self.folder, self.active = folder, active
        self._lock = FolderLock(folder)
        self._owned = False
        """The folder was empty when this process took hold of it, or it has replaced the run there."""
        self._files: dict[str, Any] = {}
        self._board: Any = None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    def hold(self, wait: bool = False) -> None:
        """Make the folder and keep other processes' runs out of it until `close`, or until this process ends.

        wait: for a process that may be about to end, `LOCK_WAIT` seconds. Raises: ValueError when another process holds
        the folder; nothing in it is touched then.
        """
        if self.active and not self._lock.held:
            self._lock.take(LOCK_WAIT if wait else 0.0)
            self._owned = self.is_empty()

    def holds_run(self) -> bool:
        return (self.folder / CONFIG).exists()

    def is_empty(self) -> bool:
        """Nothing is there but what a start that was killed at once leaves."""
        if not self.folder.exists():
            return True
        return {self.folder / LOCK, *self._partial()}.issuperset(self.folder.iterdir())

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

    def open(self, config: Config, start: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Begin or continue the run; ``start`` is this start's entry in ``run.json``, ``start["step"]`` its step.

        Rows and events after that step are removed: the run will write them again. overwrite: remove the run that is
        in the folder first.
        """
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        step = start["step"]
        self.hold()
        if overwrite:
            self._owned = True
            self._remove(*FOLDERS, STARTS, METRICS, EVENTS)  # not config.yaml: without it the rest would be no run's
        # First, since it makes the folder a run's, whatever comes next.
        atomic.write(self.folder / CONFIG, to_yaml(config), locked=True)
        self.pictures.mkdir(exist_ok=True)
        starts = {"starts": [*self._starts(), dict(start)]}
        atomic.write(self.folder / STARTS, json.dumps(starts, indent=1) + "\n", locked=True)
        for name in (METRICS, EVENTS):
            path = self.folder / name
            kept = [row for row in read_rows(path) if row["step"] <= step] if step else []
            atomic.write(path, "".join(json.dumps(row) + "\n" for row in kept), locked=True)
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
        self._close_files()
        self._lock.release()

    def discard(self) -> None:
        """`close`, and remove what this process made: a run that it began, folders. A run that it continued stays."""
        self._close_files()
        if self._owned and self._lock.held:
            self._remove(*FOLDERS, *FILES, *(path.name for path in self._partial()))
        self._lock.release(undo=True)

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._board is not None:
            self._board.close()
            self._board = None

    def _remove(self, *names: str) -> None:
        for name in names:
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _partial(self) -> list[Path]:
        """Where a process that was killed may have left what it had not finished writing."""
        return [atomic.work_name(self.folder / name) for name in FILES]

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
