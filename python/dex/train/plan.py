"""What a run will be, resolved once: configuration, ranks and data become one record, `Plan`, before a model is built.

Here, too, is what a start makes of the run folder: which run is in it, and whether it may go on or be replaced.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dex.common.ranks import ALONE, Ranks, decided, from_first, gather
from dex.config import FREE_ON_RESUME, Config, check, differences, from_dict, per_layer, resolve_micro_batch, to_dict
from dex.data import open_dataset
from dex.data.dataset import Dataset
from dex.data.loader import batches_per_epoch
from dex.train import checkpoint, cuda_graph
from dex.train.runlog import RunLog
from dex.train.schedules import total_steps

MEET_EVERY = 5.0
"""Seconds between two meetings of ranks that wait for a fingerprint."""
EARLIER_FINGERPRINT = (
    "the run was started when fingerprints of folders did not cover pixels: paths and sizes of the images are those of "
    "then, their pixels were not compared"
)


class Placement(NamedTuple):
    """A configuration that has been checked, and what it comes to on these ranks; no data is needed for it."""

    config: Config
    ranks: Ranks
    device: torch.device
    precision: str
    micro_batch: int
    """Images that a rank computes at once."""


class Plan(NamedTuple):
    """A `Placement` with its data: everything that a run is made of; `dex.train.trainer.Trainer` takes it."""

    config: Config
    ranks: Ranks
    device: torch.device
    precision: str
    micro_batch: int
    dataset: Dataset
    train: Dataset
    held_out: Dataset
    fingerprint: str
    """Of the whole data set, as rank 0 sees it; empty in a dry run of a new run."""
    batches_per_epoch: int
    steps: int
    saved: checkpoint.Checkpoint | None = None
    """Where it goes on; None at step 0."""
    notes: tuple[str, ...] = ()
    """What is to be said about that."""


class FolderState(NamedTuple):
    """What rank 0 found in the run folder. Plain values, for all ranks to read; the defaults are a new run's."""

    checkpoint: str | None = None
    """Folder of the checkpoint to go on from."""
    state: dict[str, Any] | None = None
    """Its state."""
    notes: Sequence[str] = ()
    run: str | None = None
    """The checkpoint or folder that says which run is to go on."""
    config: Mapping[str, Any] | None = None
    """That run's configuration."""
    known: Mapping[str, Any] | None = None
    """Its data, steps and precision, unless it was killed before it wrote them."""


def resolve_device(config: Config, ranks: Ranks = ALONE) -> torch.device:
    """ValueError when CUDA is asked for and absent, or has fewer devices than there are ranks on this machine."""
    wanted = config.run.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: expected a device that is there; got 'cuda', and torch finds no CUDA device")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK: expected one rank per CUDA device, of which there are {torch.cuda.device_count()}; "
            f"got {ranks.local_rank}"
        )
    return torch.device("cuda", ranks.local_rank) if ranks.world_size > 1 else torch.device("cuda")


def resolve_precision(config: Config, device: torch.device) -> str:
    """``auto`` becomes bf16 where the device multiplies bf16 in hardware: elsewhere it is slower than fp32."""
    if config.run.precision != "auto":
        return config.run.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"


def check_cuda_graph(config: Config, device: torch.device, world_size: int) -> None:
    """ValueError when ``parallel.cuda_graph`` is asked for and a step cannot be captured here."""
    m = config.model
    if config.parallel.cuda_graph and (
        reason := cuda_graph.why_not(device, world_size, m.backend, any(per_layer(m.num_experts, m.depth)))
    ):
        raise ValueError(f"parallel.cuda_graph: {reason}")


def place(config: Config, ranks: Ranks = ALONE) -> Placement:
    """Check ``config`` and resolve what needs no data. The ranks need not have started. ValueError names the field."""
    check(config)
    micro_batch = resolve_micro_batch(config, ranks.world_size)
    device = resolve_device(config, ranks)
    check_cuda_graph(config, device, ranks.world_size)
    return Placement(config, ranks, device, resolve_precision(config, device), micro_batch)


def resolve(config: Config, dataset: Dataset, ranks: Ranks = ALONE) -> Plan:
    """The plan of a run from its first step that writes no folder: training takes the split "train" of ``dataset``.

    The ranks have started, and all of them ask. ValueError names what cannot work.
    """
    placement = place(config, ranks)
    return _with_data(placement, dataset, fingerprint_of(dataset, ranks))


def fingerprint_of(dataset: Dataset, ranks: Ranks = ALONE, waiting: Callable[[], None] = lambda: None) -> str:
    """Rank 0's fingerprint, on every rank. For a folder rank 0 alone reads every image, which may take long.

    Meanwhile the ranks meet every few seconds, so that none waits for longer than it may; each time they call
    ``waiting``. ValueError when a rank has other data, as far as paths and sizes tell.
    """
    if ranks.world_size == 1:
        return dataset.fingerprint
    listings = gather(ranks, dataset.earlier_fingerprint or dataset.fingerprint)
    others = [str(rank) for rank, listing in enumerate(listings) if listing != listings[0]]
    if others:
        raise ValueError(
            f"data.path: expected the same files on every rank; those of rank {', '.join(others)} are not rank 0's"
        )
    if not ranks.first:
        while not from_first(ranks):
            waiting()
        return decided(ranks, lambda: None)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(lambda: dataset.fingerprint)
        while not from_first(ranks, bool(wait([result], timeout=MEET_EVERY).done)):
            waiting()
        return decided(ranks, result.result)


def _with_data(placement: Placement, dataset: Dataset, fingerprint: str) -> Plan:
    config = placement.config
    train = dataset.split("train")
    if len(train) == 0:
        raise ValueError(f"data: expected images to train on; the training split of {dataset.name!r} is empty")
    batches = batches_per_epoch(train, config.data.batch_size)
    return Plan(
        **placement._asdict(),
        dataset=dataset,
        train=train,
        held_out=dataset.split("val"),
        fingerprint=fingerprint,
        batches_per_epoch=batches,
        steps=total_steps(config, batches),
    )


def plan(config: Config, out: Path, resume: str | Path | None = None, *, overwrite: bool = False) -> Plan:
    """What `dex.train.run.pretrain` would run, with its arguments and errors; nothing is written or locked."""
    placement = place(config)
    state = look(RunLog(out), resume, overwrite)
    dataset = open_data(config)
    fingerprint = fingerprint_of(dataset) if state.run else ""  # without a run there is nothing to compare it with
    return with_folder(placement, dataset, fingerprint, state)


def look(log: RunLog, resume: str | Path | None, overwrite: bool, *, hold: bool = False) -> FolderState:
    """What is to go on in the run folder, as rank 0 sees it. ValueError when a run may not start there.

    hold: first keep other processes' runs out of it, for whoever will write there.
    """
    out = log.folder
    if resume is not None and overwrite:
        raise ValueError("overwrite: expected a new run, without resume; got both")
    _check_folder(out)
    if hold:
        log.hold(wait=resume is not None)
    if resume is None or (resume == "auto" and not log.holds_run()):
        if log.holds_run():
            if not overwrite:
                raise ValueError(
                    f"out: expected a new or empty folder; {out} holds a run, --resume auto continues it, --overwrite "
                    "replaces it"
                )
        elif not log.is_empty():
            raise ValueError(f"out: expected a new or empty folder; {out} holds other files")
        return FolderState()
    if resume == "auto":
        saved, passed_over = checkpoint.newest_good(log.checkpoints)
        notes = [f"passed over {reason}" for reason in passed_over]
        if saved is None:
            notes = ["no checkpoint yet in this run folder: starting at step 0"]
    else:
        saved, notes = checkpoint.load(Path(resume)), []
    if saved:
        state = saved.state
        known = {"data": state["data_fingerprint"], "steps": state["steps"], "precision": state["precision"]}
        return FolderState(str(saved.folder), state, notes, str(saved.folder), state["config"], known)
    known = {}
    if start := log.last_start():
        known = {"data": start["data"]["fingerprint"], "steps": start["steps"], "precision": start["precision"]}
    return FolderState(notes=notes, run=str(out), config=to_dict(log.config()), known=known)


def _check_folder(out: Path) -> None:
    """ValueError unless ``out`` is, or can become, a folder that can be written."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"out: expected a folder; {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"out: expected a folder that can be written; {there} cannot")


def open_data(config: Config) -> Dataset:
    try:
        return open_dataset(config.data.path)
    except (ValueError, FileNotFoundError) as error:
        if not str(error).startswith("path: "):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"data.{error}") from error


def with_folder(placement: Placement, dataset: Dataset, fingerprint: str, state: FolderState) -> Plan:
    """The plan of a run in a folder whose state is known.

    ValueError names what cannot work, or every field in which the run in the folder is not the configuration's.
    """
    planned = _with_data(placement, dataset, fingerprint)
    notes = [*state.notes, *_refuse_other_run(state, planned)]
    saved = None if state.checkpoint is None else checkpoint.Checkpoint(Path(state.checkpoint), state.state)
    return planned._replace(saved=saved, notes=tuple(notes))


def _refuse_other_run(state: FolderState, planned: Plan) -> list[str]:
    """ValueError naming every field in which the run that is to go on is not the planned one; returns notes."""
    if state.run is None:
        return []
    old = from_dict(state.config, Config(), f"{state.run}/state.json" if state.checkpoint else state.run)
    changed = {k: v for k, v in differences(old, planned.config).items() if k not in FREE_ON_RESUME}
    now = {"data": planned.fingerprint, "steps": planned.steps, "precision": planned.precision}
    notes = []
    for name, value in (state.known or {}).items():
        if name == "data" and value != now[name] and value == planned.dataset.earlier_fingerprint:
            notes.append(EARLIER_FINGERPRINT)
        elif value != now[name]:
            changed.setdefault(name, (value, now[name]))
    if changed:
        listed = "; ".join(f"{name}: expected {was!r}, got {came!r}" for name, (was, came) in changed.items())
        raise ValueError(f"resume: {state.run} belongs to another run: {listed}")
    return notes
