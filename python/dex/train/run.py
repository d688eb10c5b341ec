"""One pretraining run from start to end: run folder, pictures, checkpoints, signals, exit code."""

import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dex.analysis.instruments import is_due
from dex.common import exits
from dex.common.ranks import announced, decided, everywhere, from_first, gather, start, stop
from dex.config import Config, RunConfig
from dex.data import CorruptDataError
from dex.model.weights import DECODER_PREFIXES, LoadReport
from dex.sizing.estimate import mfu
from dex.train import advice, checkpoint, kernels
from dex.train.continuation import Override
from dex.train.evaluating import Evaluations
from dex.train.loop import NONFINITE_IN_A_ROW, RunLoop
from dex.train.plan import FolderState, Placement, Plan, fingerprint_of, inspect_folder, open_data, place, with_folder
from dex.train.runlog import Progress, RunLog, describe_machine, now
from dex.train.schedules import stable_steps, warmup_steps
from dex.train.trainer import Trainer
from dex.train.verdict import NonFinite
from dex.train.watch import Watch


def pretrain(
    config: Config,
    out: Path,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
    override: Override | None = None,
) -> int:
    """Run to the end, to ``run.stop_at`` or to a signal, and return the exit code of the process.

    out: the run folder. resume: None starts a new run in a new or empty folder; "auto" continues from the newest good
    checkpoint in ``out``, or starts a new run if there is none; a path is a checkpoint folder in ``out``.
    overwrite: start a new run in a folder with a run, whose files are removed after the first step of the new run.
    override: fields that may change in a resumed run, and the reason; both are recorded.
    Raises: ValueError or FileNotFoundError if an argument is wrong or another process writes to the folder; nothing is
    then created or removed. CorruptDataError, after saving, if too many images cannot be read.
    """
    try:
        run = prepare(config, out, resume=resume, overwrite=overwrite, command=command, override=override)
    except exits.Stopped:
        return exits.PREEMPTED
    return run.run()


def prepare(
    config: Config,
    out: Path,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
    override: Override | None = None,
) -> "PretrainRun":
    """``pretrain`` up to its first step, with the run folder open. Later failures are not caused by the arguments.

    Also raises ``dex.common.exits.Stopped`` after SIGTERM or SIGUSR1; nothing is then created or removed.
    """
    if override is not None:
        override.check(resume)
    placement = place(config, announced())
    ranks = start(placement.ranks, placement.device, config.parallel.timeout)
    placement = placement._replace(ranks=ranks)
    watch = Watch(ranks, config.parallel.timeout)
    log = None
    try:
        with exits.stopping():
            log = RunLog(Path(from_first(ranks, str(out))), active=ranks.first)
            planned = _plan(placement, log, watch, resume, overwrite, override)
            planned = _with_kernels(planned, log, watch)
            return _open(planned, log, overwrite, command, watch)
    except BaseException as error:
        # A scheduler may signal twice; the first signal already ends the process.
        with exits.handled(lambda number: None, exits.SCHEDULER_SIGNALS):
            if isinstance(error, exits.Stopped) and ranks.first:
                print(f"dex pretrain: {error} before the first step: start the same command again", file=sys.stderr)
            try:
                if log is not None:
                    log.discard()
            finally:
                watch.close(error)
                stop(ranks)
        raise


def _plan(
    placement: Placement,
    log: RunLog,
    watch: Watch,
    resume: str | Path | None,
    overwrite: bool,
    override: Override | None,
) -> Plan:
    """Rank 0 locks and inspects the folder; every rank checks the rest."""
    watch.at(0, "reading checkpoint and data")
    ranks = placement.ranks
    state = FolderState(*decided(ranks, lambda: inspect_folder(log, resume, overwrite, hold=True)))
    dataset = everywhere(ranks, lambda: open_data(placement.config, log.folder))
    fingerprint = fingerprint_of(dataset, ranks, lambda: watch.at(0, "reading the data for its fingerprint"))
    return everywhere(ranks, lambda: with_folder(placement, dataset, fingerprint, state, override))


def _with_kernels(planned: Plan, log: RunLog, watch: Watch) -> Plan:
    """``planned`` with notes on the kernels, which are verified first where they were not."""
    ranks, device = planned.ranks, planned.device
    notes = kernels.prove(
        planned.config, ranks, device, planned.micro_batch, lambda: watch.at(0, "verifying the kernels")
    )
    if ranks.first and planned.saved:
        notes += kernels.changed(log.last_start(), device)
    return planned._replace(notes=(*planned.notes, *notes))


def _open(planned: Plan, log: RunLog, overwrite: bool, command: Sequence[str], watch: Watch) -> "PretrainRun":
    """Build the model, load the checkpoint, and open the run folder for writing."""
    saved = planned.saved
    watch.at(saved.state["step"] if saved else 0, "building the model")
    trainer = Trainer(planned)
    if saved:
        watch.at(saved.state["step"], "loading the checkpoint")
        trainer.restore(saved)

    def begin() -> list[Path]:
        log.open(planned.config, _start_entry(planned, command), overwrite=overwrite)
        return checkpoint.set_aside_after(log.checkpoints, trainer.step) if saved and planned.ranks.first else []

    started = [] if trainer.initial is None else [_initial_note(planned.config.model.init, trainer.initial)]
    notes = [*planned.notes, *started, *(f"set aside {path.name}" for path in everywhere(planned.ranks, begin))]
    return PretrainRun(trainer, log, notes, watch)


class _Best(NamedTuple):
    """The lowest held-out loss among saved steps."""

    step: int
    loss: float


class PretrainRun(RunLoop):
    """A pretraining run that is ready to start: its steps, and everything between them."""

    def __init__(self, trainer: Trainer, log: RunLog, notes: list[str], watch: Watch):
        progress = Progress(trainer.steps, trainer.step, active=trainer.ranks.first)
        super().__init__(trainer, log, watch, progress, trainer.config.run.keep_checkpoints)
        self.trainer: Trainer = trainer
        self.notes: list[str] = notes
        self.run_config: RunConfig = trainer.config.run
        self.saved: checkpoint.Checkpoint | None = trainer.plan.saved
        stable = stable_steps(trainer.config, trainer.steps) if trainer.config.schedule.lr_shape == "wsd" else None
        self._milestones = {*(self.run_config.milestones or ()), *([stable] if stable else [])}
        """With warm-up-stable-decay, includes the last step before the decay, from which the run can be extended."""
        self._evaluations = Evaluations(trainer, log, progress)
        self._best = self._best_so_far()
        self._saved_step = self.saved.state["step"] if self.saved else None
        self._unreadable = 0
        on_gpu = trainer.device.type == "cuda"
        self._device_name = torch.cuda.get_device_name(trainer.device) if on_gpu else ""

    def _greet(self) -> None:
        for note in self.notes:
            self.progress.say(note)
        self.progress.say(f"run folder {self.log.folder}")
        if self.saved:
            self.progress.say(f"resumed from {self.saved.folder.name}, {self.trainer.step} steps done")
            self.log.event(self.trainer.step, "resumed", notes=self.notes)
        for change in self.trainer.plan.changes:
            kind = "extended" if change.reason is None else "overridden"
            self.log.event(self.trainer.step, kind, **change._asdict())

    def _steps(self) -> int:
        trainer, run = self.trainer, self.run_config
        last = min(trainer.steps, run.stop_at or trainer.steps)
        trainer.at = lambda phase: self.watch.at(trainer.step, phase)
        if is_due(trainer.config, trainer.step, trainer.steps) and not self._evaluated():
            self._evaluate()
        self._restart_clock()
        while trainer.step < last:
            trainer.stop_requested = bool(self.signals)
            try:
                bad = trainer.train_step()
            except CorruptDataError:
                self._save_unreadable()
                raise
            done = trainer.step
            if done == 1:
                self.log.settle()
            # Read only once, since a signal may arrive at any moment below. A single rank reacts at once; several ranks
            # all stop after the step in which one of them announced its signal.
            stopping = trainer.stopping or (self.ranks.world_size == 1 and bool(self.signals))
            saving = stopping or done == last or done % run.checkpoint_every == 0 or done in self._milestones
            evaluating = self._is_evaluated(done, last, stopping)
            if saving or (evaluating and run.keep_best):
                bad += trainer.flush()
                self._spikes()
            self.progress.step(done)
            self._report(bad)
            if trainer.nonfinite_in_a_row >= NONFINITE_IN_A_ROW:
                return self._stop_nonfinite(bad)
            if done % run.log_every == 0 or done == trainer.steps:
                self._row()
            if stopping:  # Save first, since a kill may follow soon
                self._save(wait=True)
            if evaluating:
                self._paused(self._evaluate)
            if saving or (self._best and self._best.step == done):
                self._paused(self._save)
            if stopping and done < last:
                name = signal.Signals(self.signals[0]).name if self.signals else "a signal to another rank"
                self.log.event(done, "preempted", signal=name)
                self.progress.say(f"{name}: saved at step {done}; --resume auto continues")
                return exits.PREEMPTED
        if self._best:
            folder = f"checkpoints/step-{self._best.step:08d}"
            self.progress.say(f"lowest held-out loss {self._best.loss:.4f} at step {self._best.step}: {folder}")
        if share := self._evaluations.share():
            self.progress.say(share)
        outcome = "done" if trainer.step == trainer.steps else "stopped at run.stop_at"
        self.progress.say(f"{outcome}: {trainer.step} of {trainer.steps} steps, {self.log.folder}")
        return exits.DONE

    def _is_evaluated(self, done: int, last: int, stopping: bool) -> bool:
        """Whether the held-out images are evaluated after step ``done``: if it is due, and where the run ends or stops.

        Not after SIGTERM, which a scheduler sends just before it kills; the resumed run then begins with the
        evaluation.
        """
        every = self.run_config.evaluate_every
        if every and stopping and done < last:
            return signal.SIGTERM not in {number for signals in gather(self.ranks, self.signals) for number in signals}
        return is_due(self.trainer.config, done, self.trainer.steps) or (bool(every) and done == last)

    def _row(self) -> None:
        trainer = self.trainer
        row = trainer.row()
        steps, seconds = trainer.step - self._clock_step, time.perf_counter() - self._clock
        images = steps * trainer.config.data.batch_size
        row |= {"images_per_s": images / seconds, **trainer.pace(steps)}
        self._name_slow_rank(row, seconds / steps)
        if (share := mfu(trainer.config, images / seconds, self._device_name, self.ranks.world_size)) is not None:
            row["mfu"] = share
        self._restart_clock()
        self._show(row)
        self._spikes()
        warming_up = trainer.step < warmup_steps(trainer.config, trainer.steps)
        for layer, experts in trainer.window.newly_unused(warming_up=warming_up):
            self.log.event(trainer.step, "unused experts", layer=layer, dead=list(experts), nearly_dead=[])
            text = advice.unused(trainer.config, layer, experts, row["balance_weight"])
            self.progress.say(f"warning: step {trainer.step}: {text}")

    def _evaluate(self) -> None:
        self.watch.at(self.trainer.step, "evaluation")
        trainer, step, log = self.trainer, self.trainer.step, self.log
        if (agree := trainer.ranks_agree()) is not None:
            log.row({"step": step, "ranks_agree": agree})
            if not agree:
                log.event(step, "ranks differ")
                self.progress.say(f"warning: step {step}: weights or directors differ between ranks")
        evaluation = self._evaluations.look()
        if evaluation is not None:
            is_better = self._best is None or evaluation.loss < self._best.loss
            if self.run_config.keep_best and step > 0 and math.isfinite(evaluation.loss) and is_better:
                self._best = _Best(step, evaluation.loss)

    def _best_so_far(self) -> "_Best | None":
        """The lowest held-out loss among the steps with a checkpoint; None unless ``run.keep_best``."""
        if not self.run_config.keep_best:
            return None
        best = None
        if self.ranks.first:
            saved = {step for step, _ in checkpoint.list_checkpoints(self.log.checkpoints)}
            rows = [row for row in self.log.rows() if row.get("val_loss") is not None and row["step"] in saved]
            best = min(((row["val_loss"], row["step"]) for row in rows), default=None)
        best = from_first(self.ranks, best)
        return best and _Best(best[1], best[0])

    def _evaluated(self) -> bool:
        """Whether this step was evaluated before the run was stopped."""
        step, rows = self.trainer.step, self.log.rows() if self.ranks.first else []
        return from_first(self.ranks, any(row["step"] == step and "val_loss" in row for row in rows))

    def _save(self, wait: bool = False) -> None:
        """Save this step unless it is saved. wait: until it is on disk."""
        trainer = self.trainer
        self.watch.at(trainer.step, "checkpoint")
        self.log.check_there()
        if trainer.step != self._saved_step:
            state = trainer.state() | ({checkpoint.MILESTONE: True} if trainer.step in self._milestones else {})
            stay = {*self._milestones, *([self._best.step] if self._best else [])}
            self.saver.save(trainer.step, trainer.tensors(), state, stay)
            self._saved_step = trainer.step
        if wait:
            self.saver.wait()

    def _report(self, bad: Sequence[NonFinite]) -> None:
        unreadable = list(self.trainer.loader.corrupt.items())
        for sample, reason in unreadable[self._unreadable :]:
            self.log.event(self.trainer.step, "unreadable sample", sample=sample, reason=reason)
        self._unreadable = len(unreadable)
        super()._report(bad)

    def _save_unreadable(self) -> None:
        # This step was not computed, so a resumed run reads the batch again, from repaired files.
        trainer = self.trainer
        self._report(trainer.flush())
        self.log.event(trainer.step, "stopped", reason="too many samples cannot be read")
        if trainer.step:
            self._save(wait=True)


def _start_entry(planned: Plan, command: Sequence[str]) -> dict[str, Any]:
    saved, dataset = planned.saved, planned.dataset
    step = saved.state["step"] if saved else 0
    changes = [change._asdict() | {"step": step} for change in planned.changes]
    return {
        "started": now(),
        "step": step,
        "resumed_from": saved.folder.name if saved else None,
        "command": list(command),
        "ranks": planned.ranks.world_size,
        "steps": planned.steps,
        "precision": planned.precision,
        "data": {"name": dataset.name, "fingerprint": planned.fingerprint, "images": dataset.modality_counts()},
        **describe_machine(planned.device),
        **({"kernels": kernels.described(planned.device)} if planned.device.type == "cuda" else {}),
        **({"changes": changes} if changes else {}),
    }


def _initial_note(path: str, report: LoadReport) -> str:
    kind = f"{report.naming}{', upcycled' if report.upcycled else ''}"
    random = ["the routers"] * report.upcycled
    random += ["the decoder"] * any(name.startswith(DECODER_PREFIXES) for name in report.kept)
    return f"weights of {path}: {kind}" + (f"; randomly initialised: {' and '.join(random)}" if random else "")
