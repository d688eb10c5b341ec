"""``dex predict``: applies a fine-tuned model to new files; it resumes after a kill at any moment.

    OUT/_prediction.json    the model and the options; a start with different ones is refused
    OUT/ID.nii.gz           the mask of a volume or series in its space; ID.png of a picture, ID.0007.png of a frame
    OUT/ID.probabilities.*  with --probabilities
    OUT/ID.overlay.png      with --overlays
    OUT/predictions.csv     a row per file: the outcome, and for a classification the probability of each class
    OUT.private/            mode 0700; do not share it with the predictions
        salt                key of the hashed ids
        files.csv           id -> path and Series Number, and why a file was refused
        done/ID.json        a file's row, written after all its other files

Files are read in processes with limits, so a file that crashes, hangs or eats memory fails alone.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from dex.common import atomic, exits, formats
from dex.common.csv_lines import csv_lines
from dex.common.folders import FILE
from dex.inference import embed_job, preprocess, reading
from dex.inference.collection import Collection, Decoded, Note, Row
from dex.inference.embed_job import Stopped, private_folder
from dex.prepare import chunks, readers
from dex.prepare.ids import Names, shared_salt
from dex.prepare.sources import Source
from dex.tasks import geometry, overlay
from dex.tasks.frames import Frames, read
from dex.tasks.load import LoadedTask
from dex.tasks.probabilities import check_window, of_frames
from dex.tasks.task import Case, Task
from dex.tasks.task_dataset import Say

PLAN, TABLE, FILES, DONE = "_prediction.json", "predictions.csv", "files.csv", "done"
FORMAT, VERSION = "dex-prediction", 1
REFUSED = "refused"
MAX_PROBABILITY_BYTES = 2**32


class Options(NamedTuple):
    out: Path
    probabilities: bool = False
    overlays: bool = False
    public: bool = False
    """Use readable ids from file names."""
    batch_size: int = 16
    precision: str = "fp32"
    window: float | None = None
    workers: int = 0
    """Processes that read files, with limits; 0 reads in this process."""


class Item(NamedTuple):
    """A file, a DICOM folder, or one series of it."""

    path: Path
    series: str | None = None
    """As for ``dex.inference.preprocess.opened_whole``; None if there is a single series."""
    label: str = ""
    """Series Number, for tables and readable ids."""


class Summary(NamedTuple):
    done: int
    refused: dict[str, int]
    """Numbers of refused files by reason."""
    example: str = ""
    """The first refused file and its reason in whole; for the user's own terminal."""


def inputs(arguments: Sequence[str | os.PathLike[str]], out: Path | None = None) -> list[Path]:
    """The files and DICOM folders in the arguments, in order and without duplicates; a folder stands for its contents,
    but not for earlier predictions in ``out``.

    Links below a folder are not followed. Raises: FileNotFoundError, ValueError.
    """
    own = [] if out is None else [Path(os.path.abspath(folder)) for folder in (out, private_folder(out))]
    paths: dict[Path, None] = {}
    if not arguments:
        raise ValueError(f"{FILE}, got none")
    for argument in arguments:
        if not os.fspath(argument):
            raise ValueError(f"{FILE}, got ''")
        path = Path(os.path.abspath(Path(argument).expanduser()))
        if not path.exists():
            raise FileNotFoundError(f"{FILE}; nothing at {argument}")
        files = list(_below(path, own)) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{FILE}; {argument} holds no file of the formats {', '.join(readers.formats())}")
        paths.update(dict.fromkeys(files))
    return list(paths)


def _below(folder: Path, without: Sequence[Path]) -> Iterator[Path]:
    """Files of a known format, and folders with DICOM files directly in them, except in the folders ``without``."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and Path(place, n) not in without)
        has_series = False
        for name in sorted(names):
            path = Path(place) / name
            if name.startswith(".") or path.is_symlink() or not path.is_file():
                continue
            format = readers.format_of(path) or readers.recognised(path)
            if format is not None and readers.reader_of(format).whole_folders:
                has_series = True
            elif format is not None:
                yield path
        if has_series:
            yield Path(place)


def parted(files: Sequence[Path], task: Task, series: Sequence[str] = ()) -> list[Item]:
    """One item per file, and one per series of a DICOM folder with several; only headers are read.

    series: Series Numbers or Series Instance UIDs; other series of DICOM data are left out, and data without any of
    them are refused when they are read. ValueError if no file has them.
    """
    items, matched = [], False
    for path in files:
        try:
            present = preprocess.series_in(path, task.modality or None, (task.plane,))
        except (ValueError, OSError):
            items.append(Item(path))  # Refused when it is read
            continue
        chosen = [each for each in present if any(each.answers(name) for name in series)] if series else present
        matched = matched or bool(chosen)
        if present and not chosen:
            items.append(Item(path, series[0]))
        elif len(present) < 2:
            items.append(Item(path))
        else:
            items += [Item(path, each.key, each.number) for each in chosen]
    if series and not matched:
        raise ValueError(
            f"series: expected the Series Number or Series Instance UID of a file, got {', '.join(series)}"
        )
    return items


def begin(loaded: LoadedTask, items: Sequence[Item], options: Options) -> list[str]:
    """Check everything, write the plan or compare it with that of an earlier start, and return the ids. ValueError."""
    if options.batch_size < 1:
        raise ValueError(f"batch-size: expected at least 1, got {options.batch_size}")
    if options.workers < 0:
        raise ValueError(f"workers: expected at least 0, got {options.workers}")
    if loaded.task.kind == "classification":
        for name in ("probabilities", "overlays"):
            if getattr(options, name):
                raise ValueError(f"{name}: expected a segmentation; {loaded.task.name} is a classification")
    check_window(loaded, options.window)
    in_out = next((item.path for item in items if item.path.is_relative_to(options.out.absolute())), None)
    if in_out is not None:
        raise ValueError(f"out: expected a folder apart from the files; {in_out} is in {options.out}")
    embed_job.begin_folder(_plan(loaded, options), options.out, PLAN)
    names = _ids(items, options)
    private = private_folder(options.out)
    private.mkdir(mode=0o700, exist_ok=True)
    (private / DONE).mkdir(mode=0o700, exist_ok=True)
    return names


def _ids(items: Sequence[Item], options: Options) -> list[str]:
    salt = b"" if options.public else shared_salt(private_folder(options.out))
    names = Names(Source("predict", "CT", "ct", public=options.public), salt)
    if not options.public:
        keys = ("\0".join((os.fspath(item.path), *((item.series,) if item.series else ()))) for item in items)
        return [names.unit(key).rpartition("/")[2] for key in keys]
    stems = (_stem(item.path) + (f"-series-{item.label or 'x'}" if item.series else "") for item in items)
    ids = [names.unit(stem).rpartition("/")[2] for stem in stems]
    repeated = {name for name in ids if ids.count(name) > 1}
    return [f"{name}-{ids[:place].count(name)}" if name in repeated else name for place, name in enumerate(ids)]


def _stem(path: Path) -> str:
    suffix = "" if path.is_dir() else formats.suffix_of(path)
    return path.name[: len(path.name) - len(suffix)] or path.name


def run(
    loaded: LoadedTask,
    items: Sequence[Item],
    ids: Sequence[str],
    options: Options,
    say: Say = lambda done, total, text: None,
) -> Summary:
    """Predict the files that are not done. ``ids`` are those of ``begin``; the model is on its device.

    A file that cannot be used becomes a row with its reason, and the next start tries it again.
    Raises: ``Stopped`` after a signal; OSError, ``dex.prepare.workers.WorkerFault`` for failures that no file caused.
    """
    missing = [place for place in range(len(items)) if not _done_path(options, ids[place]).exists()]
    refused: dict[str, str] = {}
    units = [_Unit(ids[place], items[place].path, items[place].series) for place in missing]
    done = len(items) - len(units)
    collection = Collection("", [range(len(units))], lambda item: [units[item]], _Reader(loaded.task))
    with exits.collected() as signals:

        def check() -> None:
            if signals:
                raise Stopped

        say(done, len(items), "")
        with contextlib.closing(reading.decoded(collection, range(len(units)), options.workers, check)) as contents:
            for number, content in enumerate(contents):
                check()
                reason = next((note.refused for note in content.notes if note.refused), "")
                if not reason:
                    reason = _write_case(loaded, units[number], content.images[0], options)
                if reason:
                    refused[units[number].id] = reason
                say(done + number + 1, len(items), "")
    return _finish(loaded, items, ids, refused, options)


class _Unit(NamedTuple):
    id: str
    path: Path
    series: str | None = None


@dataclass(frozen=True)
class _Reader:
    """A ``dex.inference.collection.Reader`` of files at their own size, whose images are ``Frames``."""

    has_paths: ClassVar[bool] = True
    task: Task

    def names(self, unit: _Unit) -> list[str]:
        return [os.fspath(unit.path)]

    def read(self, unit: _Unit, beat: Callable[[], None]) -> Decoded:
        try:
            frames = read(Case(unit.id, "", "test", unit.path, None), self.task, beat, unit.series)
        except (ValueError, OSError) as error:
            if isinstance(error.__context__, MemoryError):
                raise MemoryError from None
            cause = error.__context__
            text = str(cause) if isinstance(cause, readers.Refused) else f"unreadable: {' '.join(str(error).split())}"
            return self.refused(unit, text)
        return Decoded([frames], [Row(unit.id, "", self.task.modality, "", "")], [])

    def refused(self, unit: _Unit, reason: str) -> Decoded:
        return Decoded([], [], [Note(unit.id, os.fspath(unit.path), "", reason)])

    def weight(self, unit: _Unit) -> float:
        files = [unit.path] if unit.path.is_file() else [path for path in unit.path.iterdir() if path.is_file()]
        return len(files) + sum(path.stat().st_size for path in files) / 2**20

    def preload(self) -> None:
        chunks.preload(list(readers.formats()))


def _write_case(loaded: LoadedTask, unit: _Unit, frames: Frames, options: Options) -> str:
    """Write the results of one file, its row last. Returns the reason if it cannot be used, else ""."""
    if reason := _unusable(loaded.task, frames, options):
        return reason
    spacing = None if frames.spacing_mm is None else frames.spacing_mm[1:]
    batches = of_frames(
        loaded,
        frames.images,
        spacing,
        batch_size=options.batch_size,
        precision=options.precision,
        window=options.window,
    )
    row: dict[str, Any] = {"frames": len(frames.images)}
    if loaded.task.kind == "classification":
        shares = torch.cat(list(batches)).double().mean(0)
        _check_finite(bool(shares.isfinite().all()))
        row["class"] = loaded.task.classes[int(shares.argmax())]
        row |= {f"p {name}": round(float(p), 6) for name, p in zip(loaded.task.classes, shares, strict=True)}
    else:
        row |= _write_masks(loaded.task, unit, frames, batches, options)
    atomic.write(_done_path(options, unit.id), json.dumps(row) + "\n", sync=True, mode=0o600)
    return ""


def _unusable(task: Task, frames: Frames, options: Options) -> str:
    if task.kind == "classification":
        return ""
    if frames.grid is not None and not frames.grid.even:
        return (
            "inconsistent: its slices are unevenly spaced, but the mask's file has a single spacing; add the missing "
            "slices, or leave out those with another spacing"
        )
    size = int(np.prod(frames.images.shape[:3])) * (len(task.classes) + 1)
    if options.probabilities and size > MAX_PROBABILITY_BYTES:
        return f"too large: its probabilities take {size:,} bytes, at most {MAX_PROBABILITY_BYTES:,}"
    return ""


def _write_masks(
    task: Task, unit: _Unit, frames: Frames, batches: Iterator[torch.Tensor], options: Options
) -> dict[str, Any]:
    """Write the files of a segmentation. Returns the row's columns: millilitres of each class, or pixels if the size of
    a voxel is unknown."""
    n, height, width = frames.images.shape[:3]
    masks = np.empty((n, height, width), np.uint8)
    steps = np.empty((n, len(task.classes) + 1, height, width), np.uint8) if options.probabilities else None
    place = 0
    for batch in batches:
        _check_finite(bool(batch.isfinite().all()))
        part = slice(place, place := place + len(batch))
        masks[part] = batch.argmax(1).to(torch.uint8).numpy()
        if steps is not None:
            steps[part] = geometry.in_steps(batch.numpy())
    suffix = geometry.suffix(unit.path, frames.grid)
    if steps is not None:
        file = f"{unit.id}.probabilities{'.npy' if frames.grid is None else suffix}"
        geometry.write_probabilities(options.out / file, steps, unit.path, frames.grid)
    if options.overlays:
        number = overlay.telling_frame(masks)
        spacing = frames.spacing_mm[1:] if frames.spacing_mm else (1.0, 1.0)
        title = f"{task.name}: {unit.id}" + (f", frame {number}" if n > 1 else "")
        picture = overlay.overlay(frames.images[number], masks[number], task.classes, title=title, spacing=spacing)
        atomic.write(options.out / f"{unit.id}.overlay.png", overlay.png(picture), sync=True)
    if frames.grid is not None or n == 1:
        geometry.write_mask(options.out / f"{unit.id}{suffix}", masks, unit.path, frames.grid)
    else:
        for number in range(n):
            path = options.out / f"{unit.id}.{number:04d}{suffix}"
            geometry.write_mask(path, masks[number : number + 1], unit.path, None)
    counts = np.bincount(masks.ravel(), minlength=len(task.classes) + 1)[1:].tolist()
    if frames.grid is None or frames.spacing_mm is None:
        return {f"pixels {name}": count for name, count in zip(task.classes, counts, strict=True)}
    voxel_ml = float(np.prod(frames.spacing_mm)) / 1000
    return {f"ml {name}": round(count * voxel_ml, 3) for name, count in zip(task.classes, counts, strict=True)}


def _check_finite(finite: bool) -> None:
    if not finite:
        raise FloatingPointError("model: expected finite probabilities, got NaN: the weights are unusable")


def _plan(loaded: LoadedTask, options: Options) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": loaded.task.name,
        "classes": list(loaded.task.classes),
        "checkpoint": loaded.sha256,
        "step": loaded.step,
        "probabilities": options.probabilities,
        "overlays": options.overlays,
        "public": options.public,
        "window": options.window,
        "precision": options.precision,
    }


def _done_path(options: Options, id: str) -> Path:
    return private_folder(options.out) / DONE / f"{id}.json"


def _finish(
    loaded: LoadedTask, items: Sequence[Item], ids: Sequence[str], refused: dict[str, str], options: Options
) -> Summary:
    """Write the two tables: all files ever done in this folder, and those that this start refused."""
    done = {path.stem: json.loads(path.read_text()) for path in sorted(_done_path(options, "*").parent.glob("*.json"))}
    columns = ["id", "outcome", "frames"]
    columns += [name for row in done.values() for name in row if name not in columns]
    columns = list(dict.fromkeys(columns))
    rows = [{"id": id, "outcome": "done", **row} for id, row in done.items()]
    rows += [{"id": id, "outcome": f"{REFUSED}: {reason.partition(':')[0]}"} for id, reason in refused.items()]
    _write_table(options.out / TABLE, columns, rows, 0o666)
    private = private_folder(options.out) / FILES
    known = {row["id"]: row for row in _read_table(private)}
    for id, item in zip(ids, items, strict=True):
        known[id] = {"id": id, "file": os.fspath(item.path), "series": item.label, REFUSED: refused.get(id, "")}
    _write_table(private, ["id", "file", "series", REFUSED], list(known.values()), 0o600)
    for partial in options.out.glob(f"*{atomic.PARTIAL}*"):  # Left by killed processes
        partial.unlink(missing_ok=True)
    example = next((f"{item.path}: {refused[id]}" for id, item in zip(ids, items, strict=True) if id in refused), "")
    return Summary(sum(id in done for id in ids), embed_job.reasons(refused.values()), example)


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]], mode: int) -> None:
    text = csv_lines([columns, *([row.get(name) for name in columns] for row in rows)])
    atomic.write(path, text.encode("utf-8", "surrogateescape"), sync=True, mode=mode)


def _read_table(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8", "surrogateescape"), newline="")))
