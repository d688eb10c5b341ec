"""The run folder, with the record of a run, its metrics, events and pictures; and progress on the screen.

``config.yaml``, ``run.json`` (one entry per start), ``metrics.jsonl``, ``events.jsonl``, ``tensorboard/``,
``pictures/``, ``checkpoints/``, and ``wandb/`` with ``run.wandb``.
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
"""Everything that a run writes into its folder, except the lock and wandb's folder."""
REPORT = "report.html"
"""Page written by ``dex report``."""
REPLACED, REMOVED = ".replaced-run", ".removed-run"
"""Folder of a replaced run until the new run has taken its first step, and while the replaced run is removed."""
LOCK_WAIT = 30.0
"""Seconds that a resumed run waits for a process that still writes to the folder."""


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, processors and the commit of the code, without names of hosts or users."""
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
    """Rows of a JSONL file, without a last line that was cut short by a kill."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def data_of(run: Path) -> dict[str, Any]:
    """What the newest start of the run in a folder recorded about its data; empty without a readable record."""
    try:
        data = json.loads((run / STARTS).read_text(encoding="utf-8"))["starts"][-1]["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return data if isinstance(data, dict) else {}


class ReplacedRun:
    """A run that is being replaced. It stays in the run folder until the new run has taken its first step.

    Its files are under the ``dex.common.atomic.work_name`` of ``REPLACED`` while they are moved, then under
    ``REPLACED``, and under ``REMOVED`` while they are removed. So after a kill either the old run or the new one is
    complete.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._kept, self._removed = folder / REPLACED, folder / REMOVED
        self._moving = atomic.work_name(self._kept)

    @property
    def exists(self) -> bool:
        """Whether a run is set aside: the new run has not taken its first step."""
        return self._kept.exists() or self._moving.exists()

    def path(self, name: str) -> Path:
        """Current path of the file or folder ``name`` of the old run."""
        if self._kept.exists():
            return self._kept / name
        return self._moving / name if (self._moving / name).exists() else self.folder / name

    def set_aside(self, names: Iterable[str]) -> None:
        """Move the existing ones of ``names``. ValueError names a link among them, whose target would not move."""
        present = [name for name in names if os.path.lexists(self.folder / name)]
        for name in present:
            if (self.folder / name).is_symlink():
                raise ValueError(f"overwrite: expected a run of files and folders; {self.folder / name} is a link")
        self._moving.mkdir()
        for name in present:
            (self.folder / name).rename(self._moving / name)
        self._moving.rename(self._kept)

    def put_back(self, names: Iterable[str]) -> bool:
        """Remove ``names``, the files of the new run, and undo ``set_aside``; either may have been interrupted before.

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
        """Remove the old run for good."""
        if self._kept.exists():
            self._kept.rename(self._removed)
        shutil.rmtree(self._removed, ignore_errors=True)


class FolderGone(OSError):
    """The run folder was removed, renamed or replaced while a run wrote to it."""


class RunLog:
    """Writes one run folder, and changes nothing there before it holds the lock.

    Call ``hold``, inspect (``holds_run``, ``is_empty``), ``open``, and ``settle`` after the first step; at the end
    ``close``, or ``discard`` to undo what this process made. Readers need no ``hold``.

    active: True on one rank; the others write nothing.
    """

    config_name: str = CONFIG
    command: str = "dex pretrain"

    def __init__(self, folder: Path, active: bool = True):
        self.folder: Path = folder
        self.active: bool = active
        self._lock = FolderLock(folder, self._say)
        self._replaced = ReplacedRun(folder)
        self._owned = False
        """The folder was empty when this process locked it, or this process has set aside the run there."""
        self._start_file: tuple[int, int] | None = None
        """Inode and time of the ``run.json`` that this process wrote."""
        self._folder_id: tuple[int, int] | None = None
        """Device and inode of the folder since ``open``."""
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
        """Create the folder and lock it until ``close`` or the end of this process.

        Puts back a run that an unfinished start has set aside.

        wait: wait up to ``LOCK_WAIT`` seconds for another process to end. Raises: ValueError if another process holds
        the folder; nothing in it is then touched.
        """
        if not self.active or self._lock.held:
            return
        self._lock.take(LOCK_WAIT if wait else 0.0)
        if self._lock.real:
            if self._replaced.put_back(self._new_names()):
                self._say(f"put back the run that an unfinished --overwrite had set aside in {self.folder}")
        else:
            self._say(f"{self.folder} is on a file system without locks: a second process could write there too")
            if self._replaced.exists:
                raise ValueError(
                    f"out: expected no run set aside by --overwrite, got one in {self.folder / REPLACED}. Without "
                    "locks another process may still be replacing it: if none is running, move its files back"
                )
        self._owned = self.is_empty() and (self._lock.real or self._lock.made_file)

    def holds_run(self) -> bool:
        return self._path(self.config_name).exists()

    def is_empty(self) -> bool:
        """Whether the folder is empty except for the files that a start leaves if it is killed at once."""
        if not self.folder.exists():
            return True
        return {self.folder / LOCK, *self._partial()}.issuperset(self.folder.iterdir())

    def config(self) -> Config:
        """Configuration of the last start. FileNotFoundError: no run. ValueError names a wrong field."""
        return read_yaml(self._path(self.config_name), Config())

    def config_text(self, config: Any) -> str:
        """Contents of the configuration file that ``open`` writes."""
        return to_yaml(config)

    def wandb_project(self, config: Any) -> str | None:
        return config.run.wandb

    def last_start(self) -> dict[str, Any] | None:
        """The newest entry of ``run.json``; None if the run was killed before it wrote one."""
        starts = self._starts()
        return starts[-1] if starts else None

    def _path(self, name: str) -> Path:
        """Path of ``name`` in the run that the next start would find in the folder."""
        return self.folder / name if self._lock.held or not self.active else self._replaced.path(name)

    def _starts(self) -> list[dict[str, Any]]:
        path = self._path(STARTS)
        if not path.exists():
            return []
        try:
            return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"out: expected the starts of a run in {path}, got {type(error).__name__}: {error}. Move the file away "
                "to continue the run without the record of its starts; nothing else needs it"
            ) from None

    def open(self, config: Any, start: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Open the run for writing at step ``start["step"]``; ``start`` is the entry of this start in ``run.json``.

        Rows and events after that step are removed, since the run will write them again. overwrite: first set aside the
        run in the folder, until ``settle``; ValueError if it contains a link.
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
        self._folder_id = _identity(self.folder)
        # First, since this file makes the folder a run folder even after a kill.
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
        """``FolderGone`` if the folder was removed, renamed or replaced since ``open``."""
        if self.active and _identity(self.folder) != self._folder_id:
            raise FolderGone(
                f"out: expected the run folder to stay while the run writes to it; {self.folder} was removed, renamed "
                "or replaced. Saved checkpoints went with it"
            )

    def settle(self) -> None:
        """After the first step: remove the replaced run for good."""
        if self.active:
            self._replaced.remove()

    def row(self, row: Mapping[str, Any]) -> None:
        """Append to ``metrics.jsonl`` and send every number to tensorboard and, with ``run.wandb``, to wandb."""
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
        """Close the files. release: unlock the folder; otherwise this process keeps the lock until it ends."""
        self._close_files()
        if release:
            self._lock.release()

    def discard(self) -> None:
        """``close``, and remove the run and folders that this process made. A continued run stays, and a replaced run
        is put back.

        Without locks, nothing is removed if another process may have started a run meanwhile.
        """
        self._close_files()
        undo = self._lock.real or (self._start_file is not None and self._start_file == self._newest_start_file())
        if self._lock.held and undo:
            if self._owned:
                for name in self._new_names():
                    _remove(self.folder / name)
            self._replaced.put_back(self._new_names())
        self._lock.release(undo=undo or not self._lock.held)

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
        """Unfinished files that a killed process may have left; an earlier version named them ``.NAME.tmp``."""
        paths = [self.folder / name for name in self._files_of_run]
        return [work for path in paths for work in (atomic.work_name(path), path.with_name(f".{path.name}.tmp"))]

    def _newest_start_file(self) -> tuple[int, int] | None:
        """Identity of the ``run.json`` in the folder; every start writes a new file."""
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
    """A progress bar with losses on a terminal, otherwise one line per row; prints nothing unless active."""

    def __init__(
        self,
        steps: int,
        start: int,
        active: bool = True,
        summary: Callable[[Mapping[str, Any]], str] | None = None,
    ):
        """summary: turns a row into the text of a line; None is that of pretraining."""
        self._steps, self._start, self._active = steps, start, active
        self._summary = summary or _summary
        self._began = time.monotonic()
        self._bar: Any = None
        self.lost: str | None = None
        """Error since which lines can no longer be printed."""
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
        """Print a line; a bar continues below it."""
        if self._bar is not None:
            self._console.print(text, markup=False, highlight=False)
        elif self._active:
            self._print(text)

    def _print(self, text: str) -> None:
        """Print; an error does not end the run, since every row is in ``METRICS`` and every warning in ``EVENTS``."""
        try:
            print(text, flush=True)
        except OSError as error:  # A closed pipe, a full disk
            self.lost = error.strerror or type(error).__name__
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Receives the rest at exit


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
    """The current time in UTC, as ISO 8601 to the second."""
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
    """Replace NaN and infinity, which JSON lacks, by None."""
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
    """Commit of the source tree and whether it has changes; None if the package does not run from its repository."""
    source = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(source.parent), *arguments], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # An installed copy may be inside another repository, which does not track this file.
    if git("ls-files", "--error-unmatch", source.name) is None:
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}
