"""The parts of a run that pretraining and fine-tuning share between steps: signals, warnings, failures, the end."""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dex.common import exits
from dex.common.ranks import Failed, Ranks, gather, stop
from dex.train import checkpoint
from dex.train.engine import Engine
from dex.train.runlog import Progress, RunLog
from dex.train.verdict import NonFinite
from dex.train.watch import Watch

NONFINITE_IN_A_ROW = 3
"""A run stops after this many consecutive non-finite steps."""
SLOW_RANK = 0.1
"""A rank is slow if it takes this share of a step longer than the median rank."""


class RunLoop:
    """A run that is ready to start. ``dex.train.run.PretrainRun`` and ``dex.tasks.finetune.FinetuneRun`` add the steps.

    keep: number of checkpoints to keep, see ``dex.train.checkpoint.Saver``.
    """

    command = "dex pretrain"

    def __init__(self, trainer: Engine, log: RunLog, watch: Watch, progress: Progress, keep: int):
        self.trainer: Engine = trainer
        self.log: RunLog = log
        self.watch: Watch = watch
        self.progress: Progress = progress
        self.ranks: Ranks = trainer.ranks
        self.saved: checkpoint.Checkpoint | None = None
        """The checkpoint from which the run resumes."""
        self.signals: list[int] = []
        self.saver: checkpoint.Saver = checkpoint.Saver(log.checkpoints, keep, self.ranks)
        self._output_lost = False
        self._slow_rank: int | None = None
        self._slow_rows = 0
        """Number of consecutive rows in which ``_slow_rank`` was slow."""

    def run(self) -> int:
        """Run all steps, close the folder and return the exit code. May be called once.

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
                own = (Failed, torch.OutOfMemoryError)  # RuntimeErrors that do not come from a collective
                if self.ranks.world_size > 1 and isinstance(error, RuntimeError) and not isinstance(error, own):
                    self.watch.explain(error)  # Does not return if another rank is gone
                if self.ranks.world_size == 1:
                    with contextlib.suppress(Exception):  # The pending save may be the newest good state
                        self.saver.wait()
                if self.saved is None and self.trainer.step == 0:
                    self.log.discard()
                self.watch.close(error)
                raise
            finally:
                self.watch.close()
                # After an error on several ranks a save may still be running: keep other processes out until it ends.
                self.log.close(release=not self.saver.busy)
                self.trainer.close()
                stop(self.ranks)

    def _greet(self) -> None:
        """Print what starts or resumes."""
        raise NotImplementedError

    def _steps(self) -> int:
        """Run the steps and return the exit code."""
        raise NotImplementedError

    def _save(self, wait: bool = False) -> None:
        """Save this step unless it is saved. wait: until it is on disk."""
        raise NotImplementedError

    def _show(self, row: Mapping[str, Any]) -> None:
        """Write and print a row of metrics. Records an event once if printing is no longer possible."""
        self.log.row(row)
        self.progress.row(row)
        if self.progress.lost and not self._output_lost:
            self._output_lost = True
            self.log.event(row["step"], "output lost", reason=self.progress.lost)

    def _name_slow_rank(self, row: Mapping[str, Any], step_seconds: float) -> None:
        """Warn about the rank that the others wait for if it is the same in two consecutive rows."""
        late = row["slowest_rank_s"] - row["median_rank_s"] if "slowest_rank" in row else 0.0
        slow = row["slowest_rank"] if late > SLOW_RANK * step_seconds else None
        self._slow_rows = self._slow_rows + 1 if slow == self._slow_rank else 1
        self._slow_rank = slow
        if slow is not None and self._slow_rows == 2:
            self.log.event(row["step"], "slow rank", rank=slow, late_s=late, step_s=step_seconds)
            self.progress.say(
                f"warning: step {row['step']}: {self.watch.who(slow)} is slow: the others wait {late:.3g} s of each "
                f"{step_seconds:.3g} s step for it"
            )

    def _spikes(self) -> None:
        """Report loss spikes with the worst images of all ranks; the spikes are the same on every rank."""
        spikes = self.trainer.loss_spikes.take()
        if not spikes:
            return
        by_rank = gather(self.ranks, [spike.samples for spike in spikes])
        for spike, samples in zip(spikes, zip(*by_rank, strict=True), strict=True):
            worst = sorted((sample for of_rank in samples for sample in of_rank), key=lambda sample: -sample[1])[:5]
            self.progress.say(
                f"warning: step {spike.step + 1}: loss {spike.loss:.4g}, usually {spike.usual:.4g}; samples "
                + _list([name for name, _ in worst], 5)
            )
            self.log.event(spike.step + 1, "loss spike", loss=spike.loss, usual=spike.usual, samples=worst)

    def _report(self, bad: Sequence[NonFinite]) -> None:
        for step in bad:
            reason = f"loss {step.loss:.4g}, gradient norm {step.grad_norm:.4g}"
            self.progress.say(
                f"warning: step {step.step + 1} changed nothing: {reason}; samples {_list(step.samples, 5)}"
            )
            self.log.event(
                step.step + 1,
                "non-finite step",
                loss=str(step.loss),
                grad_norm=str(step.grad_norm),
                samples=step.samples,
            )

    def _stop_nonfinite(self, bad: Sequence[NonFinite]) -> int:
        # Saved with the count at 0, so that a resumed run continues after these batches instead of stopping again.
        trainer = self.trainer
        self._report(trainer.flush())
        trainer.nonfinite_in_a_row = 0
        self._save(wait=True)
        self.log.event(trainer.step, "stopped", reason=f"{NONFINITE_IN_A_ROW} non-finite steps in a row")
        print(
            f"{self.command}: stopped at step {trainer.step}: {NONFINITE_IN_A_ROW} non-finite steps in a row; "
            f"samples of the last: {_list(bad[-1].samples, 20)}",
            file=sys.stderr,
        )
        return exits.NONFINITE

    def _paused(self, action: Callable[[], None]) -> None:
        """Run ``action`` without counting its time against images per second."""
        began = time.perf_counter()
        action()
        self._clock += time.perf_counter() - began

    def _restart_clock(self) -> None:
        self._clock, self._clock_step = time.perf_counter(), self.trainer.step


def _list(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
