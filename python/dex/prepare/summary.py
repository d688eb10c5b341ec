"""The output of ``dex prepare``: progress while it works, a table at the end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dex.common.units import duration

from .chunks import Counts
from .filters import WITHDRAWN
from .label_maps import LABEL_MAP
from .page import count
from .splits import hints, sides

_EVERY = 5.0  # Seconds between lines if the output is not a terminal
_EVERY_ON_BAR = 0.25
_WIDTH = 160


class Progress:
    """A bar with the remaining time on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._total = 0

    def begin(self, units: int, done: Counts) -> None:
        """units: of this part; done: the counts of the chunks that were already finished."""
        self._total, self._before = units, (done.units, done.seen)
        self._began = self._said = time.monotonic()
        self._finished = Counts()
        self._finished.add(done)
        self._going: dict[str, Counts] = {}
        self._within: dict[str, int] = {}

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        if not sys.stdout.isatty():
            yield
            if self._said > self._began:
                self._print()
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("units"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bar(*columns) as self._bar:
            self._task = self._bar.add_task("", total=self._total, completed=self._finished.units)
            yield
        self._bar = None

    def update(self, chunk: str, counts: Counts) -> None:
        """counts: so far, of a chunk in progress."""
        self._going[chunk] = counts
        self._within.pop(chunk, None)
        self._show()

    def within(self, chunk: str, seen: int) -> None:
        """seen: slices so far of the current unit of a chunk."""
        self._within[chunk] = seen
        self._show()

    def finish(self, chunk: str, counts: Counts) -> None:
        """counts: of a finished chunk."""
        self._finished.add(counts)
        self._going.pop(chunk, None)
        self._within.pop(chunk, None)
        if self._bar is not None:
            self._draw()

    def _show(self) -> None:
        if self._bar is not None:
            if time.monotonic() - self._said >= _EVERY_ON_BAR:
                self._draw()
        elif time.monotonic() - self._said >= _EVERY:
            self._print()

    def _counts(self) -> Counts:
        total = Counts()
        for counts in (self._finished, *self._going.values()):
            total.add(counts)
        return total

    def _draw(self) -> None:
        counts = self._counts()
        self._bar.update(self._task, completed=counts.units, description=self._text(counts))
        self._said = time.monotonic()

    def _print(self) -> None:
        counts, seconds = self._counts(), time.monotonic() - self._began
        done = counts.units - self._before[0]
        left = duration(seconds / done * (self._total - counts.units)) if done else "unknown"
        print(f"units {counts.units:,}/{self._total:,}  {self._text(counts)}  left {left}", flush=True)
        self._said = time.monotonic()

    def _text(self, counts: Counts) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        within = sum(self._within.values())
        rate = (counts.seen + within - self._before[1]) / seconds
        text = f"kept {counts.kept:,}  dropped {counts.dropped.total():,}  "
        text += (f"under way {within:,}  " if within else "") + f"{rate:.1f} slices/s"
        return text + (f"  refused {counts.refused.total():,}" if counts.refused else "")


def table(facts: Mapping[str, Any]) -> str:
    """The card's facts by source as a plain-text table."""
    rows = Table(box=None, pad_edge=False)
    rows.add_column("source", no_wrap=True)
    rows.add_column("modality", no_wrap=True)
    for name in ("units", "seen", "kept", "train", "val"):
        rows.add_column(name, justify="right")
    rows.add_column("dropped", overflow="fold")
    rows.add_column("refused", overflow="fold")
    for source in facts["sources"]:
        rows.add_row(
            source["name"],
            source["modality"] + (" (simulated)" if source["simulated"] else ""),
            *(f"{source[name]:,}" for name in ("units", "seen", "kept", "train", "val")),
            _reasons(source["dropped"]),
            _reasons(source["refused"]),
        )
    for row in facts.get("left_out", ()):
        rows.add_row(row["source"], "-", f"{row['units']:,}", "0", "0", "0", "0", "-", _reasons(row["refused"]))
    units = sum(row["units"] for row in (*facts["sources"], *facts.get("left_out", ())))
    total = [f"{units:,}", *(f"{sum(source[name] for source in facts['sources']):,}" for name in ("seen", "kept"))]
    rows.add_row("all", "", *total, f"{facts['train']:,}", f"{facts['val']:,}", "", "")
    console = Console(width=_WIDTH, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as text:
        console.print(rows, markup=False)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def counts(facts: Mapping[str, Any]) -> list[str]:
    """The numbers of images and of atoms for training and held out."""
    train, val = (f"{count} of {groups}" if groups else count for count, groups in sides(facts))
    return [f"train:    {train}", f"held out: {val}"]


def notes(facts: Mapping[str, Any]) -> list[str]:
    """What to know before training on the set."""
    lines = list(hints(facts))
    if not facts["train"]:
        lines.append("no image to train on: all patients are held out; put split: train into a description")
    for source in facts["sources"]:
        if number := source.get("modality_assumed", 0):
            say = "says" if number == 1 else "say"
            what = f"{count(number, 'file')} of {source['name']} {say} no modality, nor does a folder"
            lines.append(f"{what}; the command says {source['modality']}")
    refused: Counter[str] = Counter()
    for row in (*facts["sources"], *facts.get("left_out", ())):
        refused.update(row["refused"])
    for reason, what, why in (
        ("another modality", "file", ": their headers or folders say another modality"),
        ("contradictory header", "file", ": their headers contradict themselves"),
        (LABEL_MAP, "label map", ""),
    ):
        if number := refused[reason]:
            lines.append(f"{count(number, what)} {'is' if number == 1 else 'are'} left out{why}")
    withdrawn = sum(source["dropped"].get(WITHDRAWN, 0) for source in facts["sources"])
    if withdrawn:
        lines.append(f"{withdrawn:,} images are left out: they were withdrawn by `dex data withdraw`")
    small = sum(source["dropped"].get("too small", 0) for source in facts["sources"])
    if 2 * small > sum(source["seen"] for source in facts["sources"]):
        lines.append(f"{small:,} slices are too small; for thick slices, planes: stored takes the acquired plane")
    flagged = sum(source["text_suspected"] for source in facts["sources"])
    if flagged:
        lines.append(f"burned-in text is suspected in {flagged:,} of the images kept; the card shows in which sources")
    return lines


def _reasons(counts: Mapping[str, int]) -> str:
    listed: Sequence[str] = [f"{reason} {count:,}" for reason, count in counts.items()]
    return ", ".join(listed) or "-"
