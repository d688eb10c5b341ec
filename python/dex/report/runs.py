"""Reads a run folder for a report: leniently, each step once, with notes on what is left out.

The run may have been killed at any moment, and may come from another version of this package.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dex.train.runlog import CONFIG, EVENTS, METRICS, STARTS

_ABSENT = object()


class Stretch(NamedTuple):
    """Training between two rows, or between a start and the next row."""

    step: int
    """Step of the row that ends the stretch."""
    seconds: float
    waiting: float | None
    """Share of the time spent waiting for data."""


@dataclass
class RunRecord:
    """The contents of a run folder in the order of steps, each step once."""

    name: str
    config: dict[str, Any]
    """Dotted field -> value."""
    starts: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    folder: Path
    notes: list[str] = field(default_factory=list)
    """Warnings on the page: damaged lines, unreadable pictures."""

    @property
    def step(self) -> int:
        return max(r["step"] for r in self.rows + self.events)

    @property
    def planned(self) -> int | None:
        return whole(self.starts[-1].get("steps"))

    @property
    def has_experts(self) -> bool:
        experts = self.config.get("model.num_experts", 1)
        return any(experts) if isinstance(experts, list) else bool(experts)

    @property
    def batch(self) -> int | None:
        return whole(self.config.get("data.batch_size"))

    def points(self, key: str, *inner: str | int) -> list[tuple[int, float | None]]:
        """``(step, value)`` of every row that has ``key`` and, within it, ``inner``; None if the value is no number.

        Rows without it are skipped: a modality that had no image in a step leaves no gap.
        """
        points = []
        for row in self.rows:
            value = row
            for part in (key, *inner):
                value = within(value, part, _ABSENT)
            if value is not _ABSENT:
                points.append((row["step"], real(value)))
        return points

    def last(self, key: str, *inner: str | int) -> float | None:
        return next((v for _, v in reversed(self.points(key, *inner)) if v is not None), None)

    def last_step(self, key: str) -> int | None:
        """The step of ``last(key)``."""
        return next((step for step, v in reversed(self.points(key)) if v is not None), None)

    def names(self, key: str) -> list[str]:
        """Names within the mappings under ``key``, in order of appearance."""
        return list({n: None for r in self.rows if isinstance(r.get(key), dict) for n in r[key]})

    def layers(self, key: str) -> int:
        return max((len(r[key]) for r in self.rows if isinstance(r.get(key), list)), default=0)

    def stretches(self) -> list[Stretch]:
        """The durations of training, one stretch for each training row."""
        start_steps = [s for s in (whole(start.get("step")) for start in self.starts) if s is not None]
        result, previous = [], 0
        for row in self.rows:
            speed, step = real(row.get("images_per_s")), row["step"]
            if "images_per_s" not in row:
                continue
            previous = max([previous, *(s for s in start_steps if s < step)])
            if speed and speed > 0 and self.batch and step > previous:
                seconds = (step - previous) * self.batch / speed
                wait = real(row.get("data_wait_s"))
                result.append(Stretch(step, seconds, None if wait is None else wait / seconds))
            previous = step
        return result

    def state(self) -> str:
        """Whether the run finished, and if not, why."""
        if self.planned is not None and self.step >= self.planned:
            return "finished"
        last = self.events[-1] if self.events else {}
        if last.get("event") == "preempted":
            return f"preempted by {last.get('signal', 'a signal')}, resumable"
        if last.get("event") == "stopped":
            return f"stopped: {last.get('reason', 'no reason given')}"
        if self.config.get("run.stop_at") == self.step:
            return "stopped at run.stop_at"
        return "unfinished: still running or killed"


def labels(folders: Sequence[Path]) -> list[str]:
    """The names of the folders, with as many parents as make them distinct."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    names = [p[-1] for p in parts]  # A folder is given twice
    return [f"{n} ({names[: i + 1].count(n)})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def read_run(folder: Path, name: str) -> RunRecord:
    """The run in ``folder``. ValueError naming the folder if a file is missing or unreadable, or no row is left."""
    if not folder.is_dir():
        raise ValueError(f"run {folder}: expected a run folder; no such folder")
    for file in (CONFIG, STARTS, METRICS, EVENTS):
        if not (folder / file).is_file():
            raise ValueError(f"run {folder}: expected the files of a run folder; {file} is missing")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        starts = json.loads((folder / STARTS).read_text(encoding="utf-8"))["starts"]
    except (ValueError, yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"run {folder}: {CONFIG} or {STARTS} cannot be read: {reason}") from error
    if not isinstance(config, dict):
        raise ValueError(f"run {folder}: expected fields and values in {CONFIG}, got {type(config).__name__}")
    if not isinstance(starts, list) or not starts or not all(isinstance(s, dict) for s in starts):
        raise ValueError(f"run {folder}: expected a list of at least one start in {STARTS}")
    notes: list[str] = []
    rows, events = (_read_lines(folder / file, notes) for file in (METRICS, EVENTS))
    if not rows:
        raise ValueError(f"run {folder}: expected rows in {METRICS}; {'; '.join(notes) or 'the file is empty'}")
    return RunRecord(name, _flat(config), starts, _latest_rows(rows), _latest_events(events), folder, notes)


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of a JSONL file that have a step; what is left out is added to ``notes``."""
    rows, damaged = [], []
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and whole(row.get("step")) is not None:
            rows.append(row)
        else:
            damaged.append(i)
    if damaged == [len(lines)]:  # No line break at its end
        notes.append(f"The last line of {path.name} is incomplete, as after a kill, and is left out")
    elif damaged:
        listed = ", ".join(map(str, damaged[:10])) + (" …" if len(damaged) > 10 else "")
        notes.append(f"{len(damaged)} line(s) of {path.name} cannot be read and are left out: {listed}")
    return rows


def _latest_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of steps; those that a resumed run wrote again replace the earlier ones."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] > row["step"]:
            kept.pop()
        first = len(kept)
        while first and kept[first - 1]["step"] == row["step"]:
            first -= 1
        kept[first:] = [r for r in kept[first:] if _row_kind(r) != _row_kind(row)] + [row]
    return kept


def _row_kind(row: Mapping[str, Any]) -> str:
    return next((key for key in ("val_loss", "loss") if key in row), "")


def _latest_events(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events in the order of steps. One may be logged a step or two late, so only a resume discards events."""
    kept: list[dict[str, Any]] = []
    for event in events:
        kind = str(event.get("event", "event"))
        if kind == "resumed":
            kept = [e for e in kept if e["step"] <= event["step"]]
        kept.append(event | {"event": kind})
    return sorted(kept, key=lambda e: e["step"])


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def plain(value: Any) -> str:
    """A value of a configuration, an event or a start in plain words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(v)}" for key, v in value.items())
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def within(value: Any, part: str | int, otherwise: Any = None) -> Any:
    """``value[part]`` of a mapping or list; ``otherwise`` if there is no such item."""
    if isinstance(value, dict):
        return value.get(part, otherwise)
    return value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else otherwise


def real(value: Any) -> float | None:
    """``value`` if it is a number that can be drawn, else None."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e100:
        return None
    return 0.0 if abs(value) < 1e-100 else float(value)


def whole(value: Any) -> int | None:
    """``value`` if it is a count or a step, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1e15 else None
