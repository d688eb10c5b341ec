"""The plan of a run: configuration, ranks and data, resolved once into one record before a model is built.

It also inspects the run folder: which run is in it, and whether that run may be continued or replaced.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dex.common.cores import cores
from dex.common.folders import check_folder
from dex.common.ranks import ALONE, Ranks, decided, default_workers, from_first, gather, ranks_here
from dex.common.shapes import height_width
from dex.common.units import duration, format_bytes
from dex.config import Config, check, from_dict, per_layer, resolve_micro_batch, to_dict
from dex.data import open_dataset
from dex.data.dataset import Dataset
from dex.data.folder import FolderDataset
from dex.data.loader import batches_per_epoch
from dex.train import checkpoint, cuda_graph
from dex.train.continuation import Change, Override, continue_run
from dex.train.initial import check_initial
from dex.train.runlog import RunLog
from dex.train.schedules import total_steps
from dexkernels.ops import backends

EARLIER_FINGERPRINT = (
    "This run was started by a version whose fingerprint did not cover pixels; paths and sizes match, pixels were not "
    "compared."
)
LONG_READ = 5.0
"""Reading for a fingerprint is announced if it is likely to take more seconds than this."""
SAY_EVERY = 30.0
"""Seconds between progress lines of that reading."""
_BYTES_PER_S, _FILES_PER_S = 300e6, 10_000


class Placement(NamedTuple):
    """A checked configuration and everything about a run that can be resolved without data."""

    config: Config
    ranks: Ranks
    device: torch.device
    precision: str
    micro_batch: int
    """Images that a rank computes at once."""
    num_workers: int
    """Reading processes per rank."""


class Plan(NamedTuple):
    """A ``Placement`` with its data: everything that ``dex.train.trainer.Trainer`` needs."""

    config: Config
    ranks: Ranks
    device: torch.device
    precision: str
    micro_batch: int
    num_workers: int
    dataset: Dataset
    train: Dataset
    held_out: Dataset
    fingerprint: str
    """Of the whole data set, as rank 0 sees it; empty in a dry run of a new run."""
    batches_per_epoch: int
    steps: int
    saved: checkpoint.Checkpoint | None = None
    """The checkpoint to resume from; None starts at step 0."""
    notes: tuple[str, ...] = ()
    """Lines to print before the run."""
    changes: tuple[Change, ...] = ()
    """Fields of the run that change from here on."""


class FolderState(NamedTuple):
    """Contents of the run folder as seen by rank 0, as plain values for all ranks; the defaults are a new run."""

    checkpoint: str | None = None
    """Folder of the checkpoint to resume from."""
    run: str | None = None
    """Path of the checkpoint or run folder to resume, for messages."""
    state: dict[str, Any] | None = None
    """State of its checkpoint; without one, config, data, steps and precision as recorded at its start."""
    notes: Sequence[str] = ()


def resolve_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of this rank for ``name``: auto, cpu or cuda.

    ValueError: ``name`` is cuda and there is no CUDA device, or there are more ranks than devices on this machine.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: expected an available device, got 'cuda', but torch finds no CUDA device")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK: expected at most one rank for each of {torch.cuda.device_count()} CUDA devices, "
            f"got {ranks.local_rank}"
        )
    return torch.device("cuda", ranks.local_rank) if ranks.world_size > 1 else torch.device("cuda")


def resolve_precision(config: Config, device: torch.device) -> str:
    """``auto`` becomes bf16 if the device multiplies bf16 in hardware; otherwise bf16 is slower than fp32."""
    if config.run.precision != "auto":
        return config.run.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"


def check_cuda_graph(config: Config, device: torch.device, world_size: int) -> None:
    """ValueError if ``parallel.cuda_graph`` is set and a step cannot be captured here."""
    if not config.parallel.cuda_graph:
        return
    m = config.model
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(config.run.precision, torch.bfloat16)
    if reason := cuda_graph.why_not(device, world_size, m.backend, any(per_layer(m.num_experts, m.depth)), dtype):
        raise ValueError(f"parallel.cuda_graph: {reason}")


def place(config: Config, ranks: Ranks = ALONE) -> Placement:
    """Check ``config`` and resolve what needs no data. Ranks need not have started. ValueError names the field."""
    check(config)
    try:
        backends.check_backend(config.model.backend)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None
    if config.run.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"run.wandb: expected null, since the package wandb is not installed (pip install wandb), "
            f"got {config.run.wandb!r}"
        )
    micro_batch = resolve_micro_batch(config, ranks.world_size)
    device = resolve_device(config.run.device, ranks)
    check_cuda_graph(config, device, ranks.world_size)
    workers = default_workers(device.type) if config.data.num_workers is None else config.data.num_workers
    return Placement(config, ranks, device, resolve_precision(config, device), micro_batch, workers)


def resolve(config: Config, dataset: Dataset, ranks: Ranks = ALONE) -> Plan:
    """The plan of a new run without a run folder, trained on the split "train" of ``dataset``.

    All ranks call it after they have started. ValueError names what cannot work.
    """
    placement = place(config, ranks)
    return _with_data(placement, dataset, fingerprint_of(dataset, ranks))


def fingerprint_of(dataset: Dataset, ranks: Ranks = ALONE, waiting: Callable[[], None] = lambda: None) -> str:
    """Rank 0's fingerprint of the data, on every rank. For a folder, rank 0 reads every image, which may take long.

    Meanwhile the ranks synchronise twice a second, so that no collective times out, and call ``waiting`` each time.
    ValueError: paths or sizes differ between ranks, or a file cannot be read.
    """
    if ranks.world_size == 1:
        return dataset.take_fingerprint(_Reading(dataset))
    listings = gather(ranks, dataset.earlier_fingerprint or dataset.fingerprint)
    others = [str(rank) for rank, listing in enumerate(listings) if listing != listings[0]]
    if others:
        raise ValueError(
            f"data.path: expected the same files on every rank; those of rank {', '.join(others)} differ from rank 0's"
        )
    if not ranks.first:
        while not from_first(ranks):
            waiting()
        return decided(ranks, lambda: None)
    reading = _Reading(dataset)

    def synchronise(done: int, total: int) -> None:
        reading(done, total)
        from_first(ranks, False)
        waiting()

    fingerprint, error = "", None
    try:
        fingerprint = dataset.take_fingerprint(synchronise)
    except RuntimeError:  # Raised by a collective: another rank is gone
        raise
    except Exception as e:
        error = e
    from_first(ranks, True)

    def answer() -> str:
        if error is not None:
            raise error
        return fingerprint

    return decided(ranks, answer)


class _Reading:
    """Called while a data set is read for its fingerprint; prints progress on stderr if it takes long."""

    def __init__(self, dataset: Dataset):
        self._dataset, self._began = dataset, time.monotonic()
        self._printed_at: float | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        elapsed = now - self._began
        if self._printed_at is None:
            expected = max(elapsed, total / _BYTES_PER_S + len(self._dataset) / _FILES_PER_S)
            if expected > LONG_READ:
                self._print(f"reading {len(self._dataset):,} images, {format_bytes(total)}, for their fingerprint", now)
        elif now - self._printed_at >= SAY_EVERY:
            left = elapsed * (total - done) / max(done, 1)
            self._print(f"read {format_bytes(done)} of {format_bytes(total)}  left {duration(left)}", now)

    def _print(self, text: str, now: float) -> None:
        self._printed_at = now
        print(text, file=sys.stderr, flush=True)


def _with_data(placement: Placement, dataset: Dataset, fingerprint: str) -> Plan:
    config = placement.config
    train = dataset.split("train")
    if len(train) == 0:
        raise ValueError(f"data: expected training images; the training split of {dataset.name!r} is empty")
    if config.data.batch_size > len(train):
        raise ValueError(
            f"data.batch_size: expected at most the {len(train):,} training images of {dataset.name!r}, got "
            f"{config.data.batch_size:,}"
        )
    if max(height_width(config.model.img_size)) > dataset.image_size:
        raise ValueError(
            f"model.img_size: expected at most {dataset.image_size} pixels, the side of the images of "
            f"{dataset.name!r}, got {config.model.img_size}"
        )
    batches = batches_per_epoch(train, config.data.batch_size)
    steps = total_steps(config, batches)
    if config.run.stop_at is not None and config.run.stop_at > steps:
        raise ValueError(
            f"run.stop_at: expected at most the run's {steps:,} steps, got {config.run.stop_at:,}. Leave it out to run "
            "to the end"
        )
    if max(config.run.milestones or (0,)) > steps:
        raise ValueError(f"run.milestones: expected at most the run's {steps:,} steps, got {config.run.milestones}")
    if config.run.keep_best and len(dataset.split("val")) == 0:
        raise ValueError(f"run.keep_best: expected held-out images; {dataset.name!r} has none")
    if config.schedule.span is not None and config.schedule.span > steps:
        raise ValueError(
            f"schedule.span: expected at most the run's {steps:,} steps, or null, got {config.schedule.span:,} (an "
            "extended run keeps its original span)"
        )
    available = cores()
    notes = ()
    if placement.num_workers * ranks_here() > available:
        notes = (f"data.num_workers: {placement.num_workers} per rank, but there are only {available} cores",)
    return Plan(
        **placement._asdict(),
        dataset=dataset,
        train=train,
        held_out=dataset.split("val"),
        fingerprint=fingerprint,
        batches_per_epoch=batches,
        steps=steps,
        notes=notes,
    )


def plan(
    config: Config,
    out: Path,
    resume: str | Path | None = None,
    *,
    overwrite: bool = False,
    override: Override | None = None,
) -> Plan:
    """The plan of ``dex.train.run.pretrain``, with the same arguments and errors; nothing is written or locked."""
    placement = place(config)
    if override is not None:
        override.check(resume)
    state = inspect_folder(RunLog(out), resume, overwrite)
    dataset = open_data(config, out)
    fingerprint = fingerprint_of(dataset) if state.run else ""  # A new run has nothing to compare it with
    return with_folder(placement, dataset, fingerprint, state, override)


def inspect_folder(log: RunLog, resume: str | Path | None, overwrite: bool, *, hold: bool = False) -> FolderState:
    """What the run folder holds, called on rank 0. ValueError if a run may not start there.

    hold: first lock the folder against runs of other processes, for a caller that will write there.
    """
    out = log.folder
    if resume is not None and overwrite:
        raise ValueError("overwrite: expected a new run, without resume, got both")
    check_folder(out)
    if hold:
        log.hold(wait=resume is not None)
    if resume is None or (resume == "auto" and not log.holds_run()):
        if log.holds_run():
            if not overwrite:
                raise ValueError(
                    f"out: expected a new or empty folder; {out} holds a run: --resume auto continues it, --overwrite "
                    "replaces it"
                )
        elif not log.is_empty():
            raise ValueError(f"out: expected a new or empty folder; {out} holds other files")
        return FolderState()
    if resume == "auto":
        saved, errors = checkpoint.newest_good(log.checkpoints)
        notes = [f"passed over {error}" for error in errors]
        if saved is None:
            notes = ["no checkpoint yet in this run folder: starting at step 0"]
    else:
        saved, notes = checkpoint.load(Path(resume)), []
    if saved:
        return FolderState(str(saved.folder), str(saved.folder), saved.state, notes)
    state: dict[str, Any] = {"config": to_dict(log.config())}
    if start := log.last_start():  # None if the run was killed before it wrote one
        state["data_fingerprint"] = start["data"]["fingerprint"]
        state |= {name: start[name] for name in ("steps", "precision")}
    return FolderState(run=str(out), state=state, notes=notes)


def open_data(config: Config, out: Path | None = None) -> Dataset:
    """The data set of a run in folder ``out``. ValueError and FileNotFoundError name the field."""
    try:
        dataset = open_dataset(config.data.path)
    except (ValueError, FileNotFoundError) as error:
        if not str(error).startswith("path: "):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"data.{error}") from error
    if out is not None and isinstance(dataset, FolderDataset) and out.resolve().is_relative_to(dataset.root):
        raise ValueError(
            f"out: expected a folder outside the data in {dataset.root}, since the run's pictures would become images "
            f"of the data, got {out}"
        )
    dataset.channels = config.model.in_chans
    return dataset


def with_folder(
    placement: Placement, dataset: Dataset, fingerprint: str, state: FolderState, override: Override | None = None
) -> Plan:
    """The plan of a run in a folder with this state.

    ValueError names what cannot work, or every field in which the run in the folder differs from the configuration.
    """
    planned = _with_data(placement, dataset, fingerprint)
    if state.checkpoint is None:
        check_initial(planned.config)
    if state.run is not None:
        planned = _continued(state, planned, override)
    saved = None if state.checkpoint is None else checkpoint.Checkpoint(Path(state.checkpoint), state.state)
    return planned._replace(saved=saved)


def _continued(folder: FolderState, planned: Plan, override: Override | None) -> Plan:
    """``planned`` as the continuation of the run in the folder. ValueError names every field that differs."""
    state = folder.state
    earlier = from_dict(state["config"], Config(), f"{folder.run}/state.json" if folder.checkpoint else folder.run)
    resolved = {"steps": planned.steps, "precision": planned.precision}
    config, changes, refused = continue_run(earlier, state, planned.config, resolved, override)
    if refused:
        refused.append("--override FIELD --reason TEXT accepts another value")
    notes = [*planned.notes, *folder.notes]
    fingerprint = state.get("data_fingerprint", planned.fingerprint)
    if fingerprint != planned.fingerprint:
        if fingerprint == planned.dataset.earlier_fingerprint:
            notes.append(EARLIER_FINGERPRINT)
        elif withdrawn := planned.dataset.withdrawn_since(fingerprint):
            count = sum(withdrawal.images for withdrawal in withdrawn)
            dates = ", ".join(withdrawal.date[:10] for withdrawal in withdrawn)
            refused.append(
                f"data: {count:,} images were withdrawn from {planned.config.data.path} since the run began ({dates}). "
                "Its checkpoints have seen them, so it cannot continue without them: start a new run with a new --out, "
                "and delete the old run if the withdrawal requires it"
            )
        else:
            path = planned.config.data.path or planned.dataset.name
            refused.append(
                f"data: expected the images with which the run was started; those in {path} differ (paths, sizes or "
                "pixels): give --data with the earlier images, or a new --out"
            )
    if refused:
        raise ValueError(f"resume: {folder.run} belongs to another run: {'; '.join(refused)}")
    notes += [f"{c.field}: {c.was!r} becomes {c.now!r}{f', {c.reason}' if c.reason else ''}" for c in changes]
    return planned._replace(config=config, notes=tuple(notes), changes=tuple(changes))
