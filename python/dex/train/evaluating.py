"""Evaluations on held-out images during a run: a row of metrics, pictures, warnings, and the time they took."""

import time
from typing import Any

from dex.analysis import plots
from dex.analysis.conclusion import format_interval
from dex.analysis.evaluation import Evaluation
from dex.analysis.instruments import columns
from dex.common.units import duration
from dex.train.advice import Adviser
from dex.train.runlog import Progress, RunLog
from dex.train.schedules import schedule_at, warmup_steps
from dex.train.trainer import Trainer


class Evaluations:
    """Evaluates the held-out images of one run. All ranks call the same methods."""

    def __init__(self, trainer: Trainer, log: RunLog, progress: Progress):
        self._trainer, self._log, self._progress = trainer, log, progress
        warmup = warmup_steps(trainer.config, trainer.steps)
        self._adviser = Adviser(trainer.config, trainer.experts, warmup)
        self._began, self._seconds = time.perf_counter(), 0.0

    def look(self) -> Evaluation | None:
        """Evaluate and write the results; None without held-out images."""
        began = time.perf_counter()
        trainer, step, log = self._trainer, self._trainer.step, self._log
        evaluation = trainer.evaluate()
        row: dict[str, Any] | None = None
        if evaluation is not None:
            row = self._row(evaluation, trainer.evaluate_average())
            self._say(row, evaluation)
            self._pictures(evaluation)
            self._warn(evaluation)
        elif step == 0:
            self._progress.say("no held-out images: no held-out loss and no pictures of reconstructions and experts")
        if log.active:
            rows = log.rows() if row is None else [*log.rows(), row]
            if any("loss" in row for row in rows):
                log.picture("losses.png", "losses", plots.loss_curves(rows, f"step {step} of {trainer.steps}"), step)
        seconds = time.perf_counter() - began
        self._seconds += seconds
        if row is not None:
            log.row(row | {"evaluation_s": seconds})
        return evaluation

    def share(self) -> str:
        """Time of all evaluations and their share of the run, in words; empty if there were none."""
        if not self._seconds:
            return ""
        total = time.perf_counter() - self._began
        return f"evaluations took {duration(self._seconds)}, {self._seconds / total:.1%} of the run"

    def _row(self, evaluation: Evaluation, averaged: Evaluation | None) -> dict[str, Any]:
        """averaged: the evaluation of the averaged weights, if the run keeps them."""
        row = {"step": self._trainer.step, "val_loss": evaluation.loss, "val_modality_loss": evaluation.modality_loss}
        row |= {"val_images": evaluation.images}
        if averaged is not None:
            row |= {"ema_val_loss": averaged.loss, "ema_val_modality_loss": averaged.modality_loss}
        row |= {"probe_knn": evaluation.probe, "director_distance": evaluation.director_distance}
        if evaluation.mass:
            row["val_gate_entropy"] = evaluation.gate_entropy
            row["val_expert_mass"] = {
                name: [[round(v, 4) for v in layer[m].tolist()] for layer in evaluation.mass]
                for m, name in enumerate(self._trainer.modalities)
                if name in evaluation.modality_loss
            }
        return row | (columns(evaluation.instruments) if evaluation.instruments else {})

    def _say(self, row: dict[str, Any], evaluation: Evaluation) -> None:
        parts = [f"held-out loss {evaluation.loss:.4f}"]
        if "ema_val_loss" in row:
            parts.append(f"of averaged weights {row['ema_val_loss']:.4f}")
        instruments = evaluation.instruments
        if instruments is not None:
            gaps = [gap for gap in instruments.gaps if gap.kind != "same modality"]
            parts += [f"swap gap {format_interval(gap.gap, signed=True)}" for gap in gaps[:1]]
            if instruments.probe is not None:
                pixels = "" if instruments.pixels is None else f" (pixels {instruments.pixels.value:.1%})"
                parts.append(f"modality by linear probe {instruments.probe.value:.1%}{pixels}")
        if evaluation.probe is not None:
            parts.append(f"by kNN {evaluation.probe:.1%}")
        self._progress.say(f"step {row['step']}/{self._trainer.steps}  {'  '.join(parts)}")

    def _pictures(self, evaluation: Evaluation) -> None:
        step, log = self._trainer.step, self._log
        if not log.active:
            return
        shown = (evaluation.original, evaluation.masked, evaluation.reconstruction)
        images = [tensor.permute(0, 2, 3, 1).float().numpy() for tensor in shown]
        title = f"step {step}: held-out masked loss {evaluation.loss:.4f}"
        figure = plots.reconstructions(*images, evaluation.labels, title)
        log.picture(f"reconstructions-step-{step:06d}.png", "reconstructions", figure, step)
        if evaluation.mass:
            title = f"step {step}: experts by modality, held-out images"
            figure = plots.expert_heatmap([m.numpy() for m in evaluation.mass], self._trainer.modalities, title)
            log.picture(f"experts-step-{step:06d}.png", "experts", figure, step)

    def _warn(self, evaluation: Evaluation) -> None:
        trainer, step = self._trainer, self._trainer.step
        if evaluation.instruments is None:
            return
        schedule = schedule_at(trainer.config, max(step - 1, 0), trainer.steps)
        for warning in self._adviser.look(evaluation.instruments, evaluation.groups, step, schedule):
            self._log.event(step, warning.kind, text=warning.text)
            self._progress.say(f"warning: step {step}: {warning.text}")
