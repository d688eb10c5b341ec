"""One fine-tuning from start to end: folder, epochs, best checkpoint, signals, exit code."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from dex.common import atomic, exits
from dex.common.csv_lines import csv_lines
from dex.common.random import step_seed
from dex.common.ranks import announced, decided, everywhere, from_first, start, stop
from dex.config import to_dict as config_dict
from dex.inference.load import load, resize_
from dex.model.build import build_model
from dex.tasks import recipe, task
from dex.tasks.judge import value_of
from dex.tasks.load import CASES, CONFIG, manifest_hash
from dex.tasks.metrics.evaluation import METRICS
from dex.tasks.model import TaskModel
from dex.tasks.recipe import Settings
from dex.tasks.task import TaskData
from dex.tasks.task_dataset import Say, TaskDataset, read_splits
from dex.tasks.trainer import TaskPlan, TaskTrainer
from dex.train import checkpoint
from dex.train.loop import NONFINITE_IN_A_ROW, RunLoop
from dex.train.plan import resolve_device, resolve_precision
from dex.train.runlog import Progress, RunLog, describe_machine, now
from dex.train.watch import Watch

LOG_EVERY = 50
"""Steps between two rows of metrics within an epoch; the end of an epoch always has one."""
_DRAWN = -1
"""The 'step' whose seed initialises parameters that are not pretrained."""


class TaskLog(RunLog):
    """The folder of a fine-tuning: a run folder whose configuration is ``finetune.yaml``."""

    config_name: str = CONFIG
    command: str = "dex finetune"

    def config_text(self, config: Any) -> str:
        return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)

    @property
    def _files_of_run(self) -> tuple[str, ...]:
        return (*super()._files_of_run, CASES)

    def wandb_project(self, config: Any) -> str | None:
        return None


class _Earlier(NamedTuple):
    """The contents of the folder to resume; the defaults are those of a new run."""

    checkpoint: str | None = None
    state: dict[str, Any] | None = None
    description: dict[str, Any] | None = None
    """``finetune.yaml``."""
    notes: Sequence[str] = ()


def finetune(
    run: str | Path,
    data: TaskData,
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Fine-tune until the end or a signal; return the exit code of the process (``dex.common.exits``).

    run: as for ``dex.inference.load.load``. resume: continue from the newest good checkpoint in ``out``, or start a new
    run if there is none. overwrite: replace the fine-tuning in ``out``; its files are removed after the first step.
    Raises: ValueError or FileNotFoundError for invalid arguments, before anything is written or removed.
    """
    try:
        return prepare(run, data, settings, out, resume=resume, overwrite=overwrite).run()
    except exits.Stopped:
        return exits.PREEMPTED


def prepare(
    run: str | Path,
    data: TaskData,
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: Sequence[str] = (),
    split: Mapping[str, Any] | None = None,
    say: Say = lambda done, total, text: None,
) -> FinetuneRun:
    """``finetune`` up to its first step. Also raises ``dex.common.exits.Stopped``, with nothing written or removed."""
    recipe.check(settings)
    if resume and overwrite:
        raise ValueError("overwrite: expected a new fine-tuning, without --resume auto, got both")
    _check_apart(out, data)
    planned, model = plan(run, data, settings)
    ranks = start(planned.ranks, planned.device, settings.timeout)
    planned = planned._replace(ranks=ranks)
    watch = Watch(ranks, settings.timeout, TaskLog.command)
    log = None
    try:
        with exits.stopping():
            log = TaskLog(Path(from_first(ranks, str(out))), active=ranks.first)
            watch.at(0, "reading checkpoint and data")
            earlier = _Earlier(*decided(ranks, lambda: _look(log, resume, overwrite)))
            planned = everywhere(ranks, lambda: _with_data(planned, data, earlier, say))
            record = _description(planned) | {"data": dict(split or {})}
            entry = _start_entry(planned, command)
            return _open(planned, model, log, _Record(record, entry, data, overwrite), watch)
    except BaseException as error:
        with exits.handled(lambda number: None, exits.SCHEDULER_SIGNALS):
            try:
                if log is not None:
                    log.discard()
            finally:
                watch.close(error)
                stop(ranks)
        raise


def _check_apart(out: Path, data: TaskData) -> None:
    """ValueError for a new folder inside the data folder, where the next start would take its files for data."""
    files = [path for case in data.cases for path in (case.image, case.target) if isinstance(path, Path)]
    if not files or (out / CONFIG).is_file():
        return
    folder = Path(os.path.commonpath([path.resolve().parent for path in files]))
    if out.resolve().is_relative_to(folder):
        raise ValueError(f"out: expected a folder apart from the data; {out} is in {folder}")


def plan(run: str | Path, data: TaskData, settings: Settings) -> tuple[TaskPlan, TaskModel]:
    """The plan without data, and the model at step 0. Only the run is read, and nothing is written.

    ValueError for arguments that do not fit together.
    """
    recipe.check(settings)
    ranks = announced()
    if settings.batch_size % ranks.world_size:
        raise ValueError(f"batch_size: expected a multiple of the {ranks.world_size} ranks, got {settings.batch_size}")
    part = settings.batch_size // ranks.world_size
    if settings.micro_batch is not None and part % settings.micro_batch:
        raise ValueError(f"micro_batch: expected a divisor of the {part} images per rank, got {settings.micro_batch}")
    if not data.task.classes:
        raise ValueError(f"task: expected classes; {data.task.name} has none, give them with --classes")
    if data.task.metric not in METRICS or METRICS[data.task.metric].kind != data.task.kind:
        names = ", ".join(name for name, metric in METRICS.items() if metric.kind == data.task.kind)
        raise ValueError(f"task.metric: expected one of {names} for a {data.task.kind}, got {data.task.metric!r}")
    loaded = load(run, path="experts")
    notes = list(data.notes)
    if data.task.modality and loaded.modalities and data.task.modality not in loaded.modalities:
        notes.append(
            f"the run was pretrained on {', '.join(loaded.modalities)}, not on {data.task.modality}, the modality of "
            "this task: pretraining may help little"
        )
    torch.manual_seed(step_seed(settings.seed, _DRAWN))
    config, autoencoder = loaded.config, loaded.model
    if settings.start == "random":
        autoencoder = build_model(replace(config, model=replace(config.model, backend=None)))
    if settings.img_size is not None:
        resize_(autoencoder, settings.img_size)
        config = replace(config, model=replace(config.model, img_size=settings.img_size))
    model = TaskModel(autoencoder.encoder, data.task, settings)
    config = replace(config, run=replace(config.run, device=settings.device, precision=settings.precision))
    device = resolve_device(config.run.device, ranks)
    pretrained = {
        "run": Path(run).resolve().name,
        "step": loaded.step,
        "sha256": manifest_hash(loaded.folder),
        "modalities": list(loaded.modalities),
    }
    precision = resolve_precision(config, device)
    empty = TaskDataset(data.task, config.model.img_size)
    planned = TaskPlan(
        settings, data.task, config, pretrained, ranks, device, precision, empty, empty, "", 0, notes=tuple(notes)
    )
    return planned, model


def _with_data(planned: TaskPlan, data: TaskData, earlier: _Earlier, say: Say) -> TaskPlan:
    settings = planned.settings
    splits = read_splits(data, planned.config.model.img_size, settings, say)
    planned = planned._replace(
        train=splits.train,
        val=splits.val,
        fingerprint=splits.fingerprint,
        steps_per_epoch=-(-len(splits.train) // settings.batch_size),
        notes=(*planned.notes, *splits.notes, *earlier.notes),
    )
    if earlier.description is not None:
        _check_same(planned, earlier)
    if earlier.checkpoint is None:
        return planned
    return planned._replace(saved=checkpoint.Checkpoint(Path(earlier.checkpoint), earlier.state))


def _look(log: TaskLog, resume: bool, overwrite: bool) -> _Earlier:
    """Lock the folder and read what is to be resumed, on rank 0. ValueError if no run may start in the folder."""
    out = log.folder
    log.hold(wait=resume)
    if not resume or not log.holds_run():
        if log.holds_run():
            if not overwrite:
                raise ValueError(
                    f"out: expected a new or empty folder; {out} holds a fine-tuning, --resume auto continues it, "
                    "--overwrite replaces it"
                )
        elif not log.is_empty():
            raise ValueError(f"out: expected a new or empty folder; {out} holds other files")
        return _Earlier()
    description = yaml.safe_load((out / CONFIG).read_text(encoding="utf-8"))
    saved, passed_over = checkpoint.newest_good(log.checkpoints)
    notes = [f"passed over {reason}" for reason in passed_over]
    if saved is None:
        return _Earlier(description=description, notes=["this folder has no checkpoint yet: starting at step 0"])
    return _Earlier(str(saved.folder), saved.state, description, notes)


def _check_same(planned: TaskPlan, earlier: _Earlier) -> None:
    """ValueError naming every difference from the fine-tuning in the folder."""
    begun, state = earlier.description, earlier.state
    wrong = []
    if task.without_texts(task.from_dict(begun["task"], CONFIG)) != task.without_texts(planned.task):
        wrong.append(f"task: expected {begun['task'].get('name')!r} as described there, got {planned.task.name!r}")
    changed = recipe.differences(recipe.from_dict(begun["settings"], Settings(), CONFIG), planned.settings)
    wrong += [f"{name}: expected {old!r}, got {new!r}" for name, (old, new) in changed.items()]
    if begun["pretrained"]["sha256"] != planned.pretrained["sha256"]:
        wrong.append(f"run: expected the checkpoint it began from, of {begun['pretrained']['run']}, got other weights")
    if state is not None:
        if state["precision"] != planned.precision:
            wrong.append(f"precision: expected {state['precision']}, got {planned.precision}")
        if state["data_fingerprint"] != planned.fingerprint:
            wrong.append("data: expected the images, masks and splits that it began with, got different ones")
    if wrong:
        raise ValueError(f"resume: the folder belongs to another fine-tuning: {'; '.join(wrong)}")


class _Record(NamedTuple):
    """What a start writes to the folder."""

    description: dict[str, Any]
    start: dict[str, Any]
    data: TaskData
    overwrite: bool


def _open(planned: TaskPlan, model: TaskModel, log: TaskLog, record: _Record, watch: Watch) -> FinetuneRun:
    watch.at(0, "building the model")
    trainer = TaskTrainer(planned, model)
    if planned.saved:
        trainer.restore(planned.saved)

    def begin() -> list[Path]:
        log.open(record.description, record.start, overwrite=record.overwrite)
        if log.active:
            atomic.write(log.folder / CASES, _cases_text(record.data), locked=True)
        resumes = planned.saved and planned.ranks.first
        return checkpoint.set_aside_after(log.checkpoints, trainer.step) if resumes else []

    set_aside = everywhere(planned.ranks, begin)
    notes = [*planned.notes, *(f"set aside {path.name}" for path in set_aside)]
    return FinetuneRun(trainer, log, notes, watch)


def _cases_text(data: TaskData) -> str:
    return csv_lines([("id", "patient", "split"), *((case.id, case.patient, case.split) for case in data.cases)])


def _description(planned: TaskPlan) -> dict[str, Any]:
    """The contents of ``finetune.yaml``."""
    config = replace(planned.config, data=replace(planned.config.data, path=None))
    config = replace(config, model=replace(config.model, init=None))
    return {
        "task": task.to_dict(planned.task),
        "settings": recipe.to_dict(planned.settings),
        "pretrained": {**planned.pretrained, "config": config_dict(config)},
    }


def _start_entry(planned: TaskPlan, command: Sequence[str]) -> dict[str, Any]:
    return {
        "started": now(),
        "step": planned.saved.state["step"] if planned.saved else 0,
        "resumed_from": planned.saved.folder.name if planned.saved else None,
        "command": list(command),
        "ranks": planned.ranks.world_size,
        "steps": planned.steps,
        "precision": planned.precision,
        "data": {
            "task": planned.task.name,
            "fingerprint": planned.fingerprint,
            "frames": {"train": len(planned.train), "val": len(planned.val)},
            "cases": {"train": len(planned.train.cases), "val": len(planned.val.cases)},
        },
        **describe_machine(planned.device),
    }


class _Best(NamedTuple):
    """The best validation metric so far, and its step."""

    step: int
    value: float


class FinetuneRun(RunLoop):
    """A fine-tuning that is ready to run: epochs, and what happens between them."""

    command: str = TaskLog.command

    def __init__(self, trainer: TaskTrainer, log: TaskLog, notes: Sequence[str], watch: Watch):
        progress = Progress(trainer.steps, trainer.step, trainer.ranks.first, _summary)
        super().__init__(trainer, log, watch, progress, trainer.settings.keep_checkpoints)
        self.trainer: TaskTrainer = trainer
        self.notes: list[str] = list(notes)
        self.settings: Settings = trainer.settings
        self.saved: checkpoint.Checkpoint | None = trainer.plan.saved
        state = self.saved.state if self.saved else {}
        self._saved_step = state.get("step")
        self._judged = state.get("judged", 0)
        """The step after which the validation cases were last evaluated."""
        self.best = _Best(**state["best"]) if state.get("best") else None
        self._higher = METRICS[trainer.plan.task.metric].higher_is_better

    def _greet(self) -> None:
        plan = self.trainer.plan
        for note in self.notes:
            self.progress.say(note)
        trained = self.trainer.model.trained_parameters()
        self.progress.say(
            f"{plan.task.name}: {len(plan.train):,} training images of {len(plan.train.cases):,} cases, "
            f"{len(plan.val.cases):,} validation cases; {trained:,} parameters trained ({self.settings.mode}, "
            f"{self.settings.path})"
        )
        self.progress.say(f"folder {self.log.folder}")
        if self.saved:
            self.progress.say(f"resumed from {self.saved.folder.name}, {self.trainer.step} steps done")
            self.log.event(self.trainer.step, "resumed", notes=self.notes)

    def _steps(self) -> int:
        trainer, per_epoch = self.trainer, self.trainer.plan.steps_per_epoch
        trainer.at = lambda phase: self.watch.at(trainer.step, phase)
        if trainer.step and trainer.step % per_epoch == 0 and self._judged != trainer.step:
            self._judge()  # The earlier start stopped before its validation
        self._restart_clock()
        while trainer.step < trainer.steps and not self._is_exhausted():
            trainer.stop_requested = bool(self.signals)
            bad = trainer.train_step()
            done = trainer.step
            if done == 1:
                self.log.settle()
            stopping = trainer.stopping or (self.ranks.world_size == 1 and bool(self.signals))
            ends_epoch = done % per_epoch == 0
            if stopping or ends_epoch:
                bad += trainer.flush()
                self._spikes()
            self.progress.step(done)
            self._report(bad)
            if trainer.nonfinite_in_a_row >= NONFINITE_IN_A_ROW:
                return self._stop_nonfinite(bad)
            if done % per_epoch % LOG_EVERY == 0:  # Includes the end of an epoch
                self._row()
            if stopping:  # At once, since a kill often follows soon
                self._save(wait=True)
                name = signal.Signals(self.signals[0]).name if self.signals else "a signal to another rank"
                self.log.event(done, "preempted", signal=name)
                self.progress.say(f"{name}: saved at step {done}; --resume auto continues")
                return exits.PREEMPTED
            if ends_epoch:
                self._paused(self._end_epoch)
        self._finish()
        return exits.DONE

    def _end_epoch(self) -> None:
        trainer = self.trainer
        is_better = self._judge()
        epochs = trainer.step // trainer.plan.steps_per_epoch
        last = trainer.step == trainer.steps or self._is_exhausted()
        if last or is_better or epochs % self.settings.checkpoint_every == 0:
            self._save()

    def _finish(self) -> None:
        trainer, metric = self.trainer, self.trainer.plan.task.metric
        self._save(wait=True)
        if self.best is not None:
            folder = f"checkpoints/step-{self.best.step:08d}"
            self.progress.say(f"best validation {metric} {self.best.value:.4f} at step {self.best.step}: {folder}")
        if trainer.step < trainer.steps:
            if self.saved is None or trainer.step > self.saved.state["step"]:
                self.log.event(trainer.step, "ended early", patience=self.settings.patience)
            self.progress.say(f"ended early: {self.settings.patience} epochs without a better {metric}")
        self.progress.say(f"done: {trainer.step} of {trainer.steps} steps, {self.log.folder}")

    def _is_exhausted(self) -> bool:
        """Whether the metric has not improved for ``patience`` epochs."""
        if self.settings.patience is None or self.best is None:
            return False
        return self._judged - self.best.step >= self.settings.patience * self.trainer.plan.steps_per_epoch

    def _judge(self) -> bool:
        """Evaluate the validation cases; return whether the metric is the best so far."""
        trainer = self.trainer
        self.watch.at(trainer.step, "validation")
        self._judged = trainer.step
        if len(trainer.plan.val) == 0:
            return False
        began = time.perf_counter()
        judged = value_of(trainer)
        value, loss = from_first(self.ranks, [judged.value, judged.loss])  # Other ranks may round differently
        metric = trainer.plan.task.metric
        row = {"step": trainer.step, "epoch": trainer.epoch, "val_loss": loss, f"val_{metric}": value}
        self.log.row(row | {"val_seconds": time.perf_counter() - began})
        self.progress.say(
            f"epoch {trainer.step // trainer.plan.steps_per_epoch}/{self.settings.epochs}  validation loss {loss:.4f}  "
            f"{metric} {'-' if value is None else format(value, '.4f')}"
        )
        if value is None or not math.isfinite(value):
            return False
        better = self.best is None or (value > self.best.value) == self._higher and value != self.best.value
        if better:
            self.best = _Best(trainer.step, value)
        return better

    def _row(self) -> None:
        trainer = self.trainer
        row = trainer.row()
        steps, seconds = max(trainer.step - self._clock_step, 1), time.perf_counter() - self._clock
        row |= {"images_per_s": steps * self.settings.batch_size / seconds, **trainer.pace(steps)}
        self._name_slow_rank(row, seconds / steps)
        self._restart_clock()
        self._show(row)

    def _save(self, wait: bool = False) -> None:
        trainer = self.trainer
        self.watch.at(trainer.step, "checkpoint")
        self.log.check_there()
        if trainer.step != self._saved_step:
            best = None if self.best is None else self.best._asdict()
            state = trainer.state() | {"best": best, "judged": self._judged}
            self.saver.save(trainer.step, trainer.tensors(), state, {self.best.step} if self.best else ())
            self._saved_step = trainer.step
        if wait:
            self.saver.wait()


def _summary(row: Mapping[str, Any]) -> str:
    def number(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    text = (
        f"epoch {row['epoch']:.1f}  loss {number('loss', '.4f')}  grad {number('grad_norm', '.3f')}  "
        f"lr {row['lr']:.2e}  {row['images_per_s']:.1f} images/s"
    )
    return text + (f"  skipped {row['skipped']}" if row["skipped"] else "")
