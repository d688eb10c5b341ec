"""One pretraining run from its first step to its end: run folder, pictures, checkpoints, signals, exit code."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dex.analysis import plots
from dex.analysis.evaluation import Evaluation
from dex.common import exits
from dex.common.ranks import Failed, announced, decided, everywhere, from_first, gather, start, stop
from dex.config import Config
from dex.data import CorruptDataError
from dex.model.weights import DECODER_PREFIXES, LoadReport
from dex.sizing.estimate import mfu
from dex.train import checkpoint
from dex.train.continuation import Override
from dex.train.plan import FolderState, Placement, Plan, fingerprint_of, look, open_data, place, with_folder
from dex.train.runlog import Progress, RunLog, describe_machine, now
from dex.train.schedules import stable_steps
from dex.train.trainer import Trainer
from dex.train.verdict import NonFinite
from dex.train.watch import Watch

NONFINITE_IN_A_ROW = 3
"""A run stops after this many consecutive non-finite steps."""
SLOW_RANK = 0.1
"""A rank is slow if it takes this share of a step longer than the median rank."""


def pretrain(
    config: Config,
    out: Path,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    command: Sequence[str] = (),
    override: Override | None = None,
) -> int:
    """Run to the end, to ``run.stop_at`` or to a signal; returns the process's exit code.

    out: the run folder. resume: None starts a run and wants a new or empty folder; "auto" continues from the newest
    good checkpoint in ``out``, or starts a run where there is none; a path is one checkpoint folder of ``out``.
    overwrite: start a run in a folder that holds one, whose files are removed after the new run's first step.
    override: fields in which a resumed run may be another, and why; both are recorded.
    Raises: ValueError or FileNotFoundError for anything wrong with the arguments, with nothing made or removed, and
    when another process writes to the folder; CorruptDataError when too many images cannot be read, after saving.
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
    """`pretrain` up to its first step, with the run folder open. Later failures are not caused by the arguments.

    Raises also: `dex.common.exits.Stopped` after SIGTERM or SIGUSR1, with nothing made or removed.
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
            return _open(planned, log, overwrite, command, watch)
    except BaseException as error:
        # A scheduler may signal twice; the first one is on its way out already.
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
    """Rank 0 takes hold of the folder and looks into it; every rank checks the rest."""
    watch.at(0, "reading checkpoint and data")
    ranks = placement.ranks
    state = FolderState(*decided(ranks, lambda: look(log, resume, overwrite, hold=True)))
    dataset = everywhere(ranks, lambda: open_data(placement.config))
    fingerprint = fingerprint_of(dataset, ranks, lambda: watch.at(0, "reading the data for its fingerprint"))
    return everywhere(ranks, lambda: with_folder(placement, dataset, fingerprint, state, override))


def _open(planned: Plan, log: RunLog, overwrite: bool, command: Sequence[str], watch: Watch) -> "PretrainRun":
    """Build the model, load the checkpoint, and begin to write."""
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
    """The lowest held-out loss of a step that is saved."""

    step: int
    loss: float


class PretrainRun:
    """`pretrain` once everything is ready: steps, and what happens between them."""

    def __init__(self, trainer: Trainer, log: RunLog, notes: list[str], watch: Watch):
        self.trainer, self.log, self.notes, self.watch = trainer, log, notes, watch
        self.saved = trainer.plan.saved
        self.ranks = trainer.ranks
        self.signals: list[int] = []
        self.run_config = trainer.config.run
        self.saver = checkpoint.Saver(log.checkpoints, self.run_config.keep_checkpoints, self.ranks)
        self.progress = Progress(trainer.steps, trainer.step, active=self.ranks.first)
        stable = stable_steps(trainer.config, trainer.steps) if trainer.config.schedule.lr_shape == "wsd" else None
        self._milestones = {*(self.run_config.milestones or ()), *([stable] if stable else [])}
        """Of warm-up-stable-decay also the last step before the decay, from which a longer run can go on."""
        self._best = self._best_so_far()
        self._saved_step = self.saved.state["step"] if self.saved else None
        self._unreadable = 0
        self._slow_rank: int | None = None
        self._slow_rows = 0
        """In how many rows in succession it was that rank."""
        on_gpu = trainer.device.type == "cuda"
        self._device_name = torch.cuda.get_device_name(trainer.device) if on_gpu else ""

    def run(self) -> int:
        """Take the steps, once; the exit code. Closes the folder.

        A new run that fails before its first step leaves the folder as it was.
        """
        with exits.collected() as self.signals:
            try:
                with self.progress.shown():
                    self._greet()
                    code = self._steps()
                    self.watch.at(self.trainer.step, "checkpoint")
                    self.saver.wait()
                    return code
            except BaseException as error:
                own = (Failed, torch.OutOfMemoryError)  # no RuntimeErrors of a collective
                if self.ranks.world_size > 1 and isinstance(error, RuntimeError) and not isinstance(error, own):
                    self.watch.explain(error)  # does not come back when another rank is gone
                if self.ranks.world_size == 1:
                    with contextlib.suppress(Exception):  # what is being written may still be the newest good state
                        self.saver.wait()
                if self.saved is None and self.trainer.step == 0:
                    self.log.discard()
                self.watch.close(error)
                raise
            finally:
                self.watch.close()
                # After an error on several ranks a save may still be on its way: nobody else may write there meanwhile.
                self.log.close(release=not self.saver.busy)
                self.trainer.close()
                stop(self.ranks)

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
        if run.evaluate_every and trainer.step % run.evaluate_every == 0 and not self._evaluated():
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
            # Alone, a signal counts at once; read once, since one may come at any moment below. Among several ranks
            # all stop after the step in which one of them said so.
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
            if stopping:  # at once: whoever stops a run kills it soon
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
            where = f"checkpoints/step-{self._best.step:08d}"
            self.progress.say(f"lowest held-out loss {self._best.loss:.4f} at step {self._best.step}: {where}")
        word = "done" if trainer.step == trainer.steps else "stopped as asked"
        self.progress.say(f"{word}: {trainer.step} of {trainer.steps} steps, {self.log.folder}")
        return exits.DONE

    def _is_evaluated(self, done: int, last: int, stopping: bool) -> bool:
        """Whether held-out images are looked at after step ``done``: when it is time, and where the run ends or stops.

        Not after SIGTERM, which a scheduler sends moments before it kills: what is due comes first after the resume.
        """
        every = self.run_config.evaluate_every
        if every and stopping and done < last:
            return signal.SIGTERM not in {number for of_rank in gather(self.ranks, self.signals) for number in of_rank}
        return bool(every) and (done % every == 0 or done == last)

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
        self.log.row(row)
        self.progress.row(row)
        self._spikes()
        for layer, unused in trainer.window.newly_unused():
            self.log.event(trainer.step, "unused experts", layer=layer, **unused._asdict())
            for word, experts in (("no image", unused.dead), ("almost no image", unused.nearly_dead)):
                if experts:
                    listed = ", ".join(map(str, experts))
                    self.progress.say(f"warning: step {trainer.step}: layer {layer}: {word} goes to expert {listed}")

    def _name_slow_rank(self, row: Mapping[str, Any], step_seconds: float) -> None:
        """Say which rank the others wait for, once it was the same in two rows in succession."""
        late = row["slowest_rank_s"] - row["median_rank_s"] if "slowest_rank" in row else 0.0
        slow = row["slowest_rank"] if late > SLOW_RANK * step_seconds else None
        self._slow_rows = self._slow_rows + 1 if slow == self._slow_rank else 1
        self._slow_rank = slow
        if slow is not None and self._slow_rows == 2:
            self.log.event(row["step"], "slow rank", rank=slow, late_s=late, step_s=step_seconds)
            self.progress.say(
                f"warning: step {row['step']}: {self.watch.who(slow)} is slow: of a step's {step_seconds:.3g} s the "
                f"others wait {late:.3g} s for it"
            )

    def _spikes(self) -> None:
        """Loss spikes with the worst images of all ranks; every rank found the same steps."""
        spikes = self.trainer.loss_spikes.take()
        if not spikes:
            return
        of_ranks = gather(self.ranks, [spike.samples for spike in spikes])
        for spike, samples in zip(spikes, zip(*of_ranks, strict=True), strict=True):
            worst = sorted((sample for of_rank in samples for sample in of_rank), key=lambda sample: -sample[1])[:5]
            self.progress.say(
                f"warning: step {spike.step + 1}: loss {spike.loss:.4g}, usually {spike.usual:.4g}; samples "
                + _list([name for name, _ in worst], 5)
            )
            self.log.event(spike.step + 1, "loss spike", loss=spike.loss, usual=spike.usual, samples=worst)

    def _evaluate(self) -> None:
        self.watch.at(self.trainer.step, "evaluation")
        trainer, step, log = self.trainer, self.trainer.step, self.log
        if (agree := trainer.ranks_agree()) is not None:
            log.row({"step": step, "ranks_agree": agree})
            if not agree:
                log.event(step, "ranks differ")
                self.progress.say(f"warning: step {step}: weights or directors differ between ranks")
        evaluation = trainer.evaluate()
        if evaluation is not None:
            self._log_evaluation(evaluation, trainer.evaluate_average())
            is_better = self._best is None or evaluation.loss < self._best.loss
            if self.run_config.keep_best and step > 0 and math.isfinite(evaluation.loss) and is_better:
                self._best = _Best(step, evaluation.loss)
        elif step == 0:
            self.progress.say("no held-out images: no held-out loss and no pictures of reconstructions and experts")
        rows = log.rows() if log.active else []
        if any("loss" in row for row in rows):
            log.picture("losses.png", "losses", plots.loss_curves(rows, f"step {step} of {trainer.steps}"), step)

    def _log_evaluation(self, evaluation: Evaluation, averaged: Evaluation | None) -> None:
        """averaged: the same of the averaged weights, where the run keeps them."""
        trainer, step, log = self.trainer, self.trainer.step, self.log
        row = {"step": step, "val_loss": evaluation.loss, "val_modality_loss": evaluation.modality_loss}
        row |= {"val_images": evaluation.images}
        if averaged is not None:
            row |= {"ema_val_loss": averaged.loss, "ema_val_modality_loss": averaged.modality_loss}
        row |= {"probe_knn": evaluation.probe, "director_distance": evaluation.director_distance}
        if evaluation.mass:
            row["val_gate_entropy"] = evaluation.gate_entropy
            row["val_expert_mass"] = {
                name: [[round(v, 4) for v in layer[m].tolist()] for layer in evaluation.mass]
                for m, name in enumerate(trainer.modalities)
                if name in evaluation.modality_loss
            }
        log.row(row)
        probe = "" if evaluation.probe is None else f"  modality by kNN {evaluation.probe:.1%}"
        average = "" if averaged is None else f"  of averaged weights {averaged.loss:.4f}"
        self.progress.say(f"step {step}/{trainer.steps}  held-out loss {evaluation.loss:.4f}{average}{probe}")
        if not log.active:
            return
        shown = (evaluation.original, evaluation.masked, evaluation.reconstruction)
        images = [tensor.permute(0, 2, 3, 1).float().numpy() for tensor in shown]
        title = f"step {step}: held-out masked loss {evaluation.loss:.4f}"
        figure = plots.reconstructions(*images, evaluation.labels, title)
        log.picture(f"reconstructions-step-{step:06d}.png", "reconstructions", figure, step)
        if evaluation.mass:
            title = f"step {step}: experts by modality, held-out images"
            figure = plots.expert_heatmap([m.numpy() for m in evaluation.mass], trainer.modalities, title)
            log.picture(f"experts-step-{step:06d}.png", "experts", figure, step)

    def _best_so_far(self) -> "_Best | None":
        """The lowest held-out loss among the steps whose checkpoints are there; None unless ``run.keep_best``."""
        if not self.run_config.keep_best:
            return None
        best = None
        if self.ranks.first:
            there = {step for step, _ in checkpoint.found(self.log.checkpoints)}
            rows = [row for row in self.log.rows() if row.get("val_loss") is not None and row["step"] in there]
            best = min(((row["val_loss"], row["step"]) for row in rows), default=None)
        best = from_first(self.ranks, best)
        return best and _Best(best[1], best[0])

    def _evaluated(self) -> bool:
        """Whether this step's held-out images were looked at before the run was stopped."""
        step, rows = self.trainer.step, self.log.rows() if self.ranks.first else []
        return from_first(self.ranks, any(row["step"] == step and "val_loss" in row for row in rows))

    def _save(self, wait: bool = False) -> None:
        """Save this step unless it is saved; wait: until it is on the disk."""
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
        for step in bad:
            what = f"loss {step.loss:.4g}, gradient norm {step.grad_norm:.4g}"
            self.progress.say(
                f"warning: step {step.step + 1} changed nothing: {what}; samples {_list(step.samples, 5)}"
            )
            self.log.event(
                step.step + 1,
                "non-finite step",
                loss=str(step.loss),
                grad_norm=str(step.grad_norm),
                samples=step.samples,
            )

    def _stop_nonfinite(self, bad: Sequence[NonFinite]) -> int:
        # Saved with the count at 0, so that resuming goes on behind these batches instead of into them again.
        trainer = self.trainer
        self._report(trainer.flush())
        trainer.nonfinite_in_a_row = 0
        self._save(wait=True)
        self.log.event(trainer.step, "stopped", reason=f"{NONFINITE_IN_A_ROW} non-finite steps in a row")
        print(
            f"dex pretrain: stopped at step {trainer.step}: {NONFINITE_IN_A_ROW} non-finite steps in a row; "
            f"samples of the last: {_list(bad[-1].samples, 20)}",
            file=sys.stderr,
        )
        return exits.NONFINITE

    def _save_unreadable(self) -> None:
        # The batch was not given, so nothing of this step is done: a resume reads it again, from mended files.
        trainer = self.trainer
        self._report(trainer.flush())
        self.log.event(trainer.step, "stopped", reason="too many samples cannot be read")
        if trainer.step:
            self._save(wait=True)

    def _paused(self, action: Callable[[], None]) -> None:
        """Run ``action`` without counting its time against images per second."""
        began = time.perf_counter()
        action()
        self._clock += time.perf_counter() - began

    def _restart_clock(self) -> None:
        self._clock, self._clock_step = time.perf_counter(), self.trainer.step


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
        **({"changes": changes} if changes else {}),
    }


def _initial_note(place: str, report: LoadReport) -> str:
    what = f"{report.naming}{', upcycled' if report.upcycled else ''}"
    drawn = ["the routers"] * report.upcycled
    drawn += ["the decoder"] * any(name.startswith(DECODER_PREFIXES) for name in report.kept)
    return f"weights of {place}: {what}" + (f"; drawn anew: {' and '.join(drawn)}" if drawn else "")


def _list(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
