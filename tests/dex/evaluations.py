"""Evaluations to show and to compare: their numbers are drawn, their records are real."""

import numpy as np
import pytest

from dex.tasks.metrics.evaluation import of_classification, of_segmentation
from dex.tasks.metrics.segmentation import segmentation_scores


def classified(seed=0, strength=1.5, *, n=48, classes=("normal", "drusen", "oedema"), metric="auc", **about):
    """Two cases a patient; the truths are the same for every seed."""
    truths, rng = np.random.default_rng(0), np.random.default_rng(seed + 1)
    labels = truths.integers(0, len(classes), n)
    logits = rng.normal(size=(n, len(classes))) + strength * np.eye(len(classes))[labels]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    cases = [(f"case-{i:03d}", f"patient-{i // 2:02d}") for i in range(n)]
    return of_classification("octdl", classes, cases, p, labels, metric=metric, about={"seed": seed} | about)


def segmented(seed=0, right=0.9, *, n=12, spacing=(1.0, 0.5, 0.5), **about):
    """A disc of "organ" in every picture, "lesion" in every third, which is sometimes missed or seen elsewhere."""
    pytest.importorskip("surface_distance", reason="needs surface-distance, of the extra 'adapt'")
    rng, cases = np.random.default_rng(seed), []
    y, x = np.ogrid[:24, :24]
    for i in range(n):
        truth = np.where((y - 12) ** 2 + (x - 12) ** 2 < 40 + 3 * i, 1, 0)
        if i % 3 == 0:
            truth[10:13, 10:14] = 2
        predicted = np.where(rng.random(truth.shape) < right, truth, 1)
        if i % 6 == 3:
            predicted[predicted == 2] = 1
        elif i % 6 == 4:
            predicted[2:4, 2:4] = 2
        scores = segmentation_scores(predicted, truth, ("organ", "lesion"), spacing)
        cases.append((f"case-{i:03d}", f"patient-{i // 2:02d}", scores))
    return of_segmentation("own", ("organ", "lesion"), cases, about={"seed": seed} | about)
