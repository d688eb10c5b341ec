"""The run folder: what a run was, every row of metrics, events, pictures; and progress on the screen.

``config.yaml``, ``run.json`` (one entry per start), ``metrics.jsonl``, ``events.jsonl``, ``tensorboard/``, ``wandb/``
where it is asked for, ``pictures/``, ``checkpoints/``.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dex.common import atomic
from dex.common.units import duration
from dex.config import Config, read_yaml, to_yaml
from dex.train import tracker
from dex.train.lock import LOCK, FolderLock

CONFIG, STARTS, METRICS, EVENTS = "config.yaml", "run.json", "metrics.jsonl", "events.jsonl"
FILES, FOLDERS = (CONFIG, STARTS, METRICS, EVENTS), ("checkpoints", "pictures", "tensorboard")
"""Everything that a run writes into its folder, but for the lock and, where it is asked for, wandb's folder."""
REPORT = "report.html"
"""What `dex report` writes there."""
REPLACED, REMOVED = ".replaced-run", ".removed-run"
"""Where the run that a new one replaces is until the new one has taken its first step, and while it is removed."""
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


class ReplacedRun:
    """The run that a new one replaces. It stays in the run folder until the new one has taken its first step.

    It is under the `dex.common.atomic.work_name` of `REPLACED` while its files move, then under `REPLACED`, and under
    `REMOVED` while they are removed. So a process that was killed leaves either the old run, whole, or the new one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._kept, self._removed = folder / REPLACED, folder / REMOVED
        self._moving = atomic.work_name(self._kept)

    @property
    def there(self) -> bool:
        """The new run has not taken its first step, or will never take it."""
        return self._kept.exists() or self._moving.exists()

    def path(self, name: str) -> Path:
        """Where the file or folder ``name`` of the old run is."""
        if self._kept.exists():
            return self._kept / name
        return self._moving / name if (self._moving / name).exists() else self.folder / name

    def set_aside(self, names: Iterable[str]) -> None:
        """Move what is there of ``names``. ValueError names a link among them: its target would be left behind."""
        present = [name for name in names if os.path.lexists(self.folder / name)]
        for name in present:
            if (self.folder / name).is_symlink():
                raise ValueError(f"overwrite: expected a run of files and folders; {self.folder / name} is a link")
        self._moving.mkdir()
        for name in present:
            (self.folder / name).rename(self._moving / name)
        self._moving.rename(self._kept)

    def put_back(self, names: Iterable[str]) -> bool:
        """Undo `set_aside`, also when either was cut short; first remove what is there of ``names``, the new run's.

        Returns whether there was a run to put back.
        """
        shutil.rmtree(self._removed, ignore_errors=True)
        if self._kept.exists():
            for name in names:
                _remove(self.folder / name)
            self._kept.rename(self._moving)
        if not self._moving.exists():
            return False
        for path in list(self._moving.iterdir()):
            path.rename(self.folder / path.name)
        self._moving.rmdir()
        return True

    def remove(self) -> None:
        """For good."""
        if self._kept.exists():
            self._kept.rename(self._removed)
        shutil.rmtree(self._removed, ignore_errors=True)


class FolderGone(OSError):
    """The run folder was removed, renamed or replaced by another one while a run wrote to it."""


class RunLog:
    """Writes one run folder. It changes nothing there before it holds it.

    Call `hold`, then look (`holds_run`, `is_empty`), then `open`, and `settle` after the first step; `close` in the
    end, or `discard`, which takes back what this process made. Readers that write nothing need no `hold`.

    active: False on all ranks but one, where nothing is written.
    """

    config_name: str = CONFIG
    command: str = "dex pretrain"

    def __init__(self, folder: Path, active: bool = True):
        self.folder: Path = folder
        self.active: bool = active
        self._lock = FolderLock(folder, self._say)
        self._replaced = ReplacedRun(folder)
        self._owned = False
        """The folder was empty when this process took hold of it, or it has replaced the run there."""
        self._start_file: tuple[int, int] | None = None
        """Inode and time of the ``run.json`` that this process wrote."""
        self._place: tuple[int, int] | None = None
        """Device and inode of the folder since `open`."""
        self._files: dict[str, Any] = {}
        self._board: Any = None
        self._tracker: tracker.Tracker | None = None

    @property
    def checkpoints(self) -> Path:
        return self._path("checkpoints")

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    def hold(self, wait: bool = False) -> None:
        """Make the folder and keep other processes' runs out of it until `close`, or until this process ends.

        A run that an unfinished start has set aside is put back.

        wait: for a process that may be about to end, `LOCK_WAIT` seconds. Raises: ValueError when another process holds
        the folder; nothing in it is touched then.
        """
        if not self.active or self._lock.held:
            return
        self._lock.take(LOCK_WAIT if wait else 0.0)
        if self._lock.real:
            if self._replaced.put_back(self._new_names()):
                self._say(f"put back the run that an unfinished --overwrite had set aside in {self.folder}")
        else:
            self._say(f"{self.folder} is on a file system without locks: nothing keeps a second process out")
            if self._replaced.there:
                raise ValueError(
                    f"out: expected no run that --overwrite has set aside; {self.folder / REPLACED} holds one, and "
                    "without locks a process may still be about to replace it: move its files back when none is"
                )
        self._owned = self.is_empty() and (self._lock.real or self._lock.made_file)

    def holds_run(self) -> bool:
        return self._path(self.config_name).exists()

    def is_empty(self) -> bool:
        """Nothing is there but what a start that was killed at once leaves."""
        if not self.folder.exists():
            return True
        return {self.folder / LOCK, *self._partial()}.issuperset(self.folder.iterdir())

    def config(self) -> Config:
        """What the run in the folder was last started with. FileNotFoundError; ValueError naming the field."""
        return read_yaml(self._path(self.config_name), Config())

    def config_text(self, config: Any) -> str:
        """What `open` writes of its ``config``."""
        return to_yaml(config)

    def wandb_project(self, config: Any) -> str | None:
        return config.run.wandb

    def last_start(self) -> dict[str, Any] | None:
        """The newest entry of ``run.json``; None when the run was killed before it wrote one."""
        starts = self._starts()
        return starts[-1] if starts else None

    def _path(self, name: str) -> Path:
        """Where ``name`` of the run is that the next start would find in the folder."""
        return self.folder / name if self._lock.held or not self.active else self._replaced.path(name)

    def _starts(self) -> list[dict[str, Any]]:
        path = self._path(STARTS)
        if not path.exists():
            return []
        try:
            return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"out: expected the starts of a run in {path}; got {type(error).__name__}: {error}. Nothing else needs "
                "the file: move it away, and the run goes on without the record of its starts"
            ) from None

    def open(self, config: Any, start: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Begin or continue the run; ``start`` is this start's entry in ``run.json``, ``start["step"]`` its step.

        Rows and events after that step are removed: the run will write them again. overwrite: first set aside the run
        that is in the folder, until `settle`; ValueError when a link is part of it.
        """
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        step = start["step"]
        self.hold()
        if overwrite and self.holds_run():
            reports = [REPORT, *(path.name for path in self.folder.glob(f"{REPORT}.*{atomic.PARTIAL}"))]
            self._replaced.set_aside([*self._new_names(), *reports])
            self._owned = True
        self._place = _identity(self.folder)
        # First, since it makes the folder a run's, whatever comes next.
        atomic.write(self.folder / self.config_name, self.config_text(config), sync=True, locked=True)
        self.pictures.mkdir(exist_ok=True)
        for path in (*self._partial(), *self.pictures.glob(f"*{atomic.PARTIAL}"), *self.pictures.glob(".*.tmp")):
            path.unlink(missing_ok=True)
        starts = {"starts": [*self._starts(), dict(start)]}
        atomic.write(self.folder / STARTS, json.dumps(starts, indent=1) + "\n", sync=True, locked=True)
        self._start_file = self._newest_start_file()
        for name in (METRICS, EVENTS):
            path = self.folder / name
            kept = [row for row in read_rows(path) if row["step"] <= step] if step else []
            atomic.write(path, "".join(json.dumps(row) + "\n" for row in kept), sync=True, locked=True)
            self._files[name] = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
        if self.wandb_project(config) is not None:
            self._tracker = tracker.Tracker(config, self.folder, starts["starts"], self._say)

    def check_there(self) -> None:
        """`FolderGone` when what is written now would go nowhere, or into another folder. Once the log is open."""
        if self.active and _identity(self.folder) != self._place:
            raise FolderGone(
                f"out: expected the run folder to stay while the run writes there; {self.folder} was removed, renamed "
                "or replaced, and what was saved is where it went"
            )

    def settle(self) -> None:
        """The run has taken its first step: the run that it replaced is removed for good."""
        if self.active:
            self._replaced.remove()

    def row(self, row: Mapping[str, Any]) -> None:
        """Append to ``metrics.jsonl`` and draw every number in tensorboard and, where it is asked for, wandb."""
        if not self.active:
            return
        self._write_line(METRICS, row)
        for name, number in tracker.scalars(row).items():
            self._board.add_scalar(name, number, row["step"])
        if self._tracker is not None:
            self._tracker.row(row)

    def event(self, step: int, kind: str, **details: Any) -> None:
        """Append to ``events.jsonl``."""
        self._write_line(EVENTS, {"step": step, "event": kind, **details})

    def picture(self, name: str, tag: str, figure: Any, step: int) -> None:
        """Write ``pictures/name`` and show it in tensorboard under ``tag``."""
        if not self.active:
            return
        self.check_there()
        from dex.analysis import plots

        drawn = plots.pixels(figure)
        plots.save(drawn, self.pictures / name, locked=True)
        self._board.add_image(tag, drawn, step, dataformats="HWC")

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.folder / METRICS)

    def close(self, release: bool = True) -> None:
        """End writing. release: let other processes have the folder; otherwise this one keeps it until it ends."""
        self._close_files()
        if release:
            self._lock.release()

    def discard(self) -> None:
        """`close`, and remove what this process made: a run that it began, folders. A run that it continued stays, and
        one that it replaced is put back.

        Without locks another process may have begun a run meanwhile: then nothing is removed.
        """
        self._close_files()
        ours = self._lock.real or (self._start_file is not None and self._start_file == self._newest_start_file())
        if self._lock.held and ours:
            if self._owned:
                for name in self._new_names():
                    _remove(self.folder / name)
            self._replaced.put_back(self._new_names())
        self._lock.release(undo=ours or not self._lock.held)

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None

    @property
    def _files_of_run(self) -> tuple[str, ...]:
        return (self.config_name, *(name for name in FILES if name != CONFIG))

    def _say(self, line: str) -> None:
        print(f"{self.command}: {line}", file=sys.stderr)

    def _new_names(self) -> list[str]:
        """Everything that a run may have written into its folder."""
        return [*FOLDERS, tracker.FOLDER, *self._files_of_run, *(path.name for path in self._partial())]

    def _partial(self) -> list[Path]:
        """Where a process that was killed may have left what it had not finished writing.

        ``.NAME.tmp`` is what an earlier version called it.
        """
        paths = [self.folder / name for name in self._files_of_run]
        return [work for path in paths for work in (atomic.work_name(path), path.with_name(f".{path.name}.tmp"))]

    def _newest_start_file(self) -> tuple[int, int] | None:
        """Which ``run.json`` is in the folder: every start writes a new one."""
        with contextlib.suppress(FileNotFoundError):
            stat = (self.folder / STARTS).stat()
            return stat.st_ino, stat.st_mtime_ns
        return None

    def _write_line(self, name: str, row: Mapping[str, Any]) -> None:
        if not self.active:
            return
        self.check_there()
        self._files[name].write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self._files[name].flush()


class Progress:
    """A bar with time left and every loss on a terminal; elsewhere one plain line per row; nothing when not active."""

    def __init__(
        self,
        steps: int,
        start: int,
        active: bool = True,
        summary: Callable[[Mapping[str, Any]], str] | None = None,
    ):
        """summary: what a line says of a row; None: of pretraining's."""
        self._steps, self._start, self._active = steps, start, active
        self._summary = summary or _summary
        self._began = time.monotonic()
        self._bar: Any = None
        self.lost: str | None = None
        """Why lines can no longer be written, if so."""
        if active and sys.stdout is not None and sys.stdout.isatty():
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
        text = self._summary(row)
        if self._bar is not None:
            self._line.plain = text
            return
        done = row["step"] - self._start
        left = (time.monotonic() - self._began) / max(done, 1) * (self._steps - row["step"])
        self._print(f"step {row['step']}/{self._steps}  {text}  left {duration(left)}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._console.print(text, markup=False, highlight=False)
        elif self._active:
            self._print(text)

    def _print(self, text: str) -> None:
        """The run goes on without whoever read its lines: every row is in `METRICS`, every warning in `EVENTS`."""
        try:
            print(text, flush=True)
        except OSError as error:  # a closed pipe, a full disk
            self.lost = error.strerror or type(error).__name__
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end


def _identity(folder: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        stat = folder.stat()
        return stat.st_dev, stat.st_ino
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
