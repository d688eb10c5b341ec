"""A run folder as a report needs it: read leniently, every step once, with what had to be left out.

Lenient because the run may have been killed at any moment, and may come from another version of this package.
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
    """Training between two rows, or between a start and the row after it."""

    step: int
    """Of the row that ends it."""
    seconds: float
    waiting: float | None
    """Share of them spent waiting for data."""


@dataclass
class RunRecord:
    """What a run folder holds, in the order of steps, each step once."""

    name: str
    config: dict[str, Any]
    """Dotted field -> value."""
    starts: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    folder: Path
    notes: list[str] = field(default_factory=list)
    """What the reader must know: damaged lines, pictures that cannot be read."""

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
        """(step, value) of every row that has ``key``, and ``inner`` within it; None where the value is no number.

        A row without it is passed over: a modality of which a step saw no image leaves no gap.
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
        """The step of `last`."""
        return next((step for step, v in reversed(self.points(key)) if v is not None), None)

    def names(self, key: str) -> list[str]:
        """Names within the mappings under ``key``, in order of appearance."""
        return list({n: None for r in self.rows if isinstance(r.get(key), dict) for n in r[key]})

    def layers(self, key: str) -> int:
        return max((len(r[key]) for r in self.rows if isinstance(r.get(key), list)), default=0)

    def stretches(self) -> list[Stretch]:
        """The pace of training, one stretch for every row of it."""
        begun = [s for s in (whole(start.get("step")) for start in self.starts) if s is not None]
        result, before = [], 0
        for row in self.rows:
            speed, step = real(row.get("images_per_s")), row["step"]
            if "images_per_s" not in row:
                continue
            before = max([before, *(s for s in begun if s < step)])
            if speed and speed > 0 and self.batch and step > before:
                seconds = (step - before) * self.batch / speed
                wait = real(row.get("data_wait_s"))
                result.append(Stretch(step, seconds, None if wait is None else wait / seconds))
            before = step
        return result

    def state(self) -> str:
        """How far it came, and why no further."""
        if self.planned is not None and self.step >= self.planned:
            return "finished"
        last = self.events[-1] if self.events else {}
        if last.get("event") == "preempted":
            return f"preempted by {last.get('signal', 'a signal')}, resumable"
        if last.get("event") == "stopped":
            return f"stopped: {last.get('reason', 'no reason given')}"
        if self.config.get("run.stop_at") == self.step:
            return "stopped as asked"
        return "unfinished: still running or killed"


def labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    names = [p[-1] for p in parts]  # one folder, given twice
    return [f"{n} ({names[: i + 1].count(n)})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def read_run(folder: Path, name: str) -> RunRecord:
    """The run in ``folder``. ValueError naming the folder: a file is missing or unreadable, or holds no row at all."""
    if not folder.is_dir():
        raise ValueError(f"run {folder}: expected a run folder; there is none")
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
        raise ValueError(f"run {folder}: expected fields and their values in {CONFIG}")
    if not isinstance(starts, list) or not starts or not all(isinstance(s, dict) for s in starts):
        raise ValueError(f"run {folder}: expected a list of at least one start in {STARTS}")
    notes: list[str] = []
    rows, events = (_read_lines(folder / file, notes) for file in (METRICS, EVENTS))
    if not rows:
        raise ValueError(f"run {folder}: expected rows in {METRICS}; {'; '.join(notes) or 'the file is empty'}")
    return RunRecord(name, _flat(config), starts, _latest_rows(rows), _latest_events(events), folder, notes)


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows of a JSONL file that have a step; ``notes`` gets what was left out."""
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
    if damaged == [len(lines)]:  # no line break behind it
        notes.append(f"The last line of {path.name} is cut short, as a killed run leaves it, and is left out")
    elif damaged:
        listed = ", ".join(map(str, damaged[:10])) + (" …" if len(damaged) > 10 else "")
        notes.append(f"{len(damaged)} line(s) of {path.name} cannot be read and are left out: {listed}")
    return rows


def _latest_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the order of steps; what a resumed run did anew counts, not what it had done before it was killed."""
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
    """As for rows; but an event may be told of a step or two late, so only a resume takes back."""
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
    """A value of a configuration, an event or a start as people write it."""
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
    """``value[part]`` of a mapping or list; ``otherwise`` where there is no such thing."""
    if isinstance(value, dict):
        return value.get(part, otherwise)
    return value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else otherwise


def real(value: Any) -> float | None:
    """A number that can be drawn; None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e100:
        return None
    return 0.0 if abs(value) < 1e-100 else float(value)


def whole(value: Any) -> int | None:
    """A count or a step; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1e15 else None
