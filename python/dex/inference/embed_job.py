"""``dex embed``: the features of a collection, written in parts; it resumes after a kill at any moment.

    OUT/                    a folder of Parquet parts, or one ``.npz`` file
        _embedding.json     the model, the input and the options; a start with different ones is refused
        part-00000.parquet  whole or absent
        _summary.json       once all parts are written: the number of images, and of files that gave none. Readers of
                            Parquet folders skip names that begin with an underscore
    OUT.private/            mode 0700; do not share it with the features
        salt                key of the hashed ids
        notes/              a file per part: id -> path and label, and why a file was refused

A part depends only on the input, the model and the options. Ranks divide the parts among themselves and do not
communicate.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dex.common import atomic, exits
from dex.common.exits import Stopped
from dex.common.shapes import height_width
from dex.common.units import duration
from dex.config import to_dict
from dex.data import center
from dex.inference import reading, tables
from dex.inference.collection import Collection, Decoded, Note, Row
from dex.inference.embed import Embedding, check_layers, features, joined
from dex.inference.load import Loaded
from dex.prepare.ids import private_folder

PLAN, SUMMARY, NOTES = "_embedding.json", "_summary.json", "notes"
FORMAT, VERSION = "dex-embedding", 1
_READING = "reading"
_EVERY = 10.0
"""Seconds between two lines of progress."""


class Options(NamedTuple):
    out: Path
    layers: tuple[int, ...] = ()
    batch_size: int = 64
    precision: str = "fp32"
    workers: int = 0
    """Processes that read files, with limits; 0 reads in this process."""
    rank: int = 0
    """This process computes every ``ranks``-th part, starting with part ``rank``."""
    ranks: int = 1

    @property
    def single_file(self) -> bool:
        return self.out.suffix == ".npz"


class Summary(NamedTuple):
    images: int
    refused: dict[str, int]
    """Numbers of files, or parts of files, that gave nothing, by reason."""
    complete: bool
    """Whether all parts of all ranks are written."""


class Part(NamedTuple):
    """An embedded part of a collection."""

    number: int
    rows: list[Row]
    notes: list[Note]
    embedding: Embedding


def begin(loaded: Loaded, collection: Collection, options: Options) -> None:
    """Check everything, and write the plan or compare it with that of an earlier start. ValueError."""
    check_layers(loaded.encoder, options.layers)
    if options.batch_size < 1:
        raise ValueError(f"batch-size: expected at least 1, got {options.batch_size}")
    if options.workers < 0:
        raise ValueError(f"workers: expected at least 0, got {options.workers}")
    if options.single_file:
        if options.ranks > 1:
            raise ValueError("out: expected a folder for several ranks, which write parts, got an .npz file")
        if options.out.is_dir():
            raise ValueError(f"out: expected a file, got the folder {options.out}")
        if options.out.exists():
            raise ValueError(f"out: expected a new file; {options.out} exists. Choose another --out")
        options.out.parent.mkdir(parents=True, exist_ok=True)
    else:
        begin_folder(_plan(loaded, collection, options), options.out, PLAN, may_lack=_READING)
    (private_folder(options.out) / NOTES).mkdir(mode=0o700, parents=True, exist_ok=True)


def run(loaded: Loaded, collection: Collection, options: Options, say: Callable[[str], None] | None = None) -> Summary:
    """Embed the missing parts of this rank. Call ``begin`` first, and move the model to its device.

    say: called now and then with a line of progress. Raises ``Stopped`` after a signal.
    """
    if options.single_file:
        return _run_single(loaded, collection, options, say)
    of_rank = range(options.rank, len(collection.parts), options.ranks)
    missing = [number for number in of_rank if not _path(options.out, number).exists()]
    for part in embedded(loaded, collection, missing, options, say):
        _write_notes(options.out, part)
        tables.write_parquet(_path(options.out, part.number), part.rows, part.embedding)
    return _finish(collection, options.out)


def _run_single(loaded: Loaded, collection: Collection, options: Options, say: Callable[[str], None] | None) -> Summary:
    parts = list(embedded(loaded, collection, range(len(collection.parts)), options, say))
    for part in parts:
        _write_notes(options.out, part)
    rows = [row for part in parts for row in part.rows]
    tables.write_npz(options.out, rows, joined([part.embedding for part in parts]))
    return Summary(len(rows), reasons(note.refused for part in parts for note in part.notes), True)


def embedded(
    loaded: Loaded,
    collection: Collection,
    numbers: Sequence[int],
    options: Options,
    say: Callable[[str], None] | None,
) -> Iterator[Part]:
    """The parts ``numbers``, in order; later items are read in the meantime."""
    order = [(number, item) for number in numbers for item in collection.parts[number]]
    progress = _Progress(len(order), say)
    with exits.collected() as signals:

        def check() -> None:
            if signals:
                raise Stopped

        items = reading.decoded(collection, [item for _, item in order], options.workers, check)
        with contextlib.closing(items):
            for number in numbers:
                part = _Batches(loaded, options)
                for _ in collection.parts[number]:
                    item = next(items)
                    check()
                    part.add(item)
                    progress.add(len(item.rows))
                yield part.finish(number)


class _Batches:
    """Collects the images of one part into batches that extend across its items."""

    def __init__(self, loaded: Loaded, options: Options):
        self._encoder, self._options = loaded.encoder, options
        self._device = loaded.encoder.pos_embed.device
        self._rows: list[Row] = []
        self._notes: list[Note] = []
        self._waiting: list[Tensor] = []
        self._count = 0
        self._done: list[Embedding] = []

    def add(self, item: Decoded) -> None:
        self._rows += item.rows
        self._notes += item.notes
        for array in item.images:
            images = torch.from_numpy(array)
            while len(images):
                part = images[: self._options.batch_size - self._count]
                images = images[len(part) :]
                self._waiting.append(part)
                self._count += len(part)
                if self._count == self._options.batch_size:
                    self._forward()

    def finish(self, number: int) -> Part:
        if self._waiting or not self._done:
            self._forward()
        return Part(number, self._rows, self._notes, joined(self._done))

    def _forward(self) -> None:
        size = self._encoder.img_size
        if self._waiting:
            channels = max(images.shape[1] for images in self._waiting)
            batch = torch.cat([images.expand(-1, channels, -1, -1) for images in self._waiting])
            images = center(batch.to(self._device), size, self._encoder.in_chans)
        else:
            images = torch.zeros(0, self._encoder.in_chans, *height_width(size), device=self._device)
        self._done.append(features(self._encoder, images, self._options.layers, self._options.precision))
        self._waiting, self._count = [], 0


class _Progress:
    def __init__(self, items: int, say: Callable[[str], None] | None):
        self._items, self._say = items, say
        self._start = self._last = time.monotonic()
        self._done = self._images = 0

    def add(self, images: int) -> None:
        self._done, self._images = self._done + 1, self._images + images
        now = time.monotonic()
        if self._say is None or now - self._last < _EVERY:
            return
        self._last = now
        elapsed = now - self._start
        remaining = duration(elapsed / self._done * (self._items - self._done))
        self._say(
            f"{self._done:,} of {self._items:,} items, {self._images:,} images, "
            f"{self._images / elapsed:,.0f} images/s, {remaining} left"
        )


def _plan(loaded: Loaded, collection: Collection, options: Options) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": digest_of(loaded.model),
        "step": loaded.step,
        "path": loaded.path,
        "img_size": to_dict(loaded.config.model)["img_size"],
        "input": collection.fingerprint,
        _READING: collection.reading,
        "parts": len(collection.parts),
        "layers": list(options.layers),
        "batch_size": options.batch_size,
        "precision": options.precision,
    }


def begin_folder(plan: dict[str, Any], out: Path, file: str, may_lack: str = "") -> None:
    """Create the folder of a job with its plan, or accept one that was begun with the same plan. ValueError otherwise.

    file: name of the plan in the folder. may_lack: a key that plans of earlier versions do not have.
    """
    path = out / file
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"out: expected the plan of an earlier start in {path}; {error}") from error
        if not isinstance(earlier, dict):
            raise ValueError(f"out: expected the plan of an earlier start in {path}, got {type(earlier).__name__}")
        for name, value in plan.items():
            if earlier.get(name, value if name == may_lack else None) != value:
                raise ValueError(
                    f"out: {out} was begun with {name} {earlier.get(name)}, now it is {value}; give another --out"
                )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new or empty folder, or one that this command began, got {out}")
    out.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(plan, indent=1) + "\n", sync=True)


def _finish(collection: Collection, out: Path) -> Summary:
    """Count the images and refused files, and write the summary once no part is missing."""
    paths = [path for number in range(len(collection.parts)) if (path := _path(out, number)).exists()]
    notes = [path for number in range(len(collection.parts)) if (path := _notes_path(out, number)).exists()]
    refused = reasons(json.loads(line)["refused"] for path in notes for line in path.read_text().splitlines())
    summary = Summary(sum(map(tables.count_rows, paths)), refused, len(paths) == len(collection.parts))
    if summary.complete:
        for partial in out.glob(f"*{atomic.PARTIAL}"):  # Left by killed processes; no process writes any more
            partial.unlink(missing_ok=True)
        counted = {"images": summary.images, "refused": sum(refused.values())}
        atomic.write(out / SUMMARY, json.dumps(counted) + "\n", sync=True)
    return summary


def reasons(notes: Iterable[str]) -> dict[str, int]:
    """Frequency of the reasons in notes of the form ``reason: detail``, most frequent first; "" is skipped."""
    return dict(Counter(note.partition(":")[0] for note in notes if note).most_common())


def _write_notes(out: Path, part: Part) -> None:
    lines = "".join(json.dumps(note._asdict()) + "\n" for note in part.notes)
    atomic.write(_notes_path(out, part.number), lines, sync=True, mode=0o600)


def _path(out: Path, number: int) -> Path:
    return out / f"part-{number:05d}.parquet"


def _notes_path(out: Path, number: int) -> Path:
    return private_folder(out) / NOTES / f"part-{number:05d}.jsonl"


def digest_of(model: nn.Module) -> str:
    """SHA-256 (hex) of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def say_to_stderr(line: str) -> None:
    print(f"dex embed: {line}", file=sys.stderr, flush=True)
