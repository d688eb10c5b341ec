"""Validation metric and loss of a model in training, at the model's image size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from dex.analysis.evaluation import autocast
from dex.data import center
from dex.tasks.metrics.evaluation import Evaluation, of_classification, of_segmentation
from dex.tasks.metrics.segmentation import segmentation_scores
from dex.tasks.trainer import TaskTrainer

_SURFACES = ("hd95", "nsd")


class Judged(NamedTuple):
    value: float | None
    """The task's metric over the cases; None if undefined."""
    loss: float
    """Mean over the frames, without augmentation."""


def value_of(trainer: TaskTrainer) -> Judged:
    """Evaluate ``trainer.plan.val`` on all ranks, which compute the same; then the model is in training mode again."""
    plan, dataset = trainer.plan, trainer.plan.val
    task, scores, probabilities, losses = plan.task, [], [], []
    with trainer.evaluating() as model:
        for number, case in enumerate(dataset.cases):
            outputs, targets = [], []
            indices = dataset.of_case(number)
            for start in range(0, len(indices), plan.settings.batch_size):
                part = indices[start : start + plan.settings.batch_size]
                images = torch.stack([dataset.image(i) for i in part]).to(trainer.device)
                target = torch.stack([dataset.target(i) for i in part]).to(trainer.device)
                with autocast(trainer.device, plan.precision):
                    logits = model(center(images, dataset.size, model.encoder.in_chans))
                losses += trainer.image_loss(logits, target).double().tolist()
                outputs.append(logits.argmax(1).to(torch.uint8) if target.ndim == 3 else logits.float().softmax(1))
                targets.append(target)
            if task.kind == "segmentation":
                predicted, truth = (torch.cat(t).cpu().numpy() for t in (outputs, targets))
                surfaces = task.metric in _SURFACES
                of_case = segmentation_scores(predicted, truth, task.classes, None, surfaces=surfaces)
                scores.append((case.id, case.patient, of_case))
            else:
                probabilities.append(torch.cat(outputs).mean(0).double().cpu().numpy())
    loss = sum(losses) / len(losses)
    if task.kind == "segmentation":
        evaluation = of_segmentation(task.name, task.classes, scores, metric=task.metric)
    elif not np.isfinite(probabilities).all():
        return Judged(None, loss)
    else:
        ids = [(case.id, case.patient) for case in dataset.cases]
        labels = np.array(dataset.labels)
        evaluation = of_classification(
            task.name, task.classes, ids, _normalised(probabilities), labels, metric=task.metric
        )
    return Judged(plain_value(evaluation), loss)


def plain_value(evaluation: Evaluation) -> float | None:
    """The task's metric over all cases, without an interval; None if undefined."""
    measure = evaluation.measure(evaluation.metric)
    value = float(measure.statistic(torch.ones(1, len(evaluation.patients), dtype=torch.float64))[0])
    return value if np.isfinite(value) else None


def _normalised(rows: list[np.ndarray]) -> np.ndarray:
    values = np.stack(rows)
    return values / values.sum(1, keepdims=True)
