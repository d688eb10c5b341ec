"""Evaluates a fine-tuned model on a split of its task, at the images' own size.

OUT/evaluation.json    every case's scores and the metrics (``dex.tasks.metrics.evaluation_file``)
OUT/report.html        the page
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from dex.tasks import recipe
from dex.tasks.cases import Case, Frames, Split, TaskData, read
from dex.tasks.load import LoadedTask, trained_patients
from dex.tasks.metrics.evaluation import Evaluation, examples, of_classification, of_segmentation
from dex.tasks.metrics.segmentation import TOLERANCE, segmentation_scores
from dex.tasks.overlay import overlay, telling_frame
from dex.tasks.probabilities import check_window, of_frames
from dex.tasks.reading import frames_of
from dex.tasks.recipe import Settings
from dex.tasks.sheet import Key
from dex.tasks.task import SPLITS
from dex.tasks.task_dataset import Say, check_distances, checked

FILE = "evaluation.json"


class Options(NamedTuple):
    split: Split = "test"
    batch_size: int = 16
    precision: str = "fp32"
    window: float | None = None
    """See ``dex.tasks.probabilities.of_frames``."""
    tolerance: float = TOLERANCE
    """Of NSD."""
    workers: int = 0
    """Processes that read the cases, with limits; 0 reads in this process."""


class Predicted(NamedTuple):
    case: Case
    frames: Frames
    probabilities: np.ndarray | None
    """float32 ``[C]`` for a classification: the mean over the case's frames."""
    masks: np.ndarray | None
    """uint8 ``[n, H, W]`` for a segmentation."""


def check(loaded: LoadedTask, data: TaskData, options: Options) -> tuple[Case, ...]:
    """The cases to evaluate. ValueError naming the argument."""
    if options.split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {options.split!r}")
    trained, task = loaded.task, data.task
    if (trained.kind, trained.classes) != (task.kind, task.classes):
        raise ValueError(
            f"data: expected a {trained.kind} of {', '.join(trained.classes)}, as {loaded.folder.parent.parent.name} "
            f"was trained on, got a {task.kind} of {', '.join(task.classes) or 'no classes'}"
        )
    cases = data.of(options.split)
    if not cases:
        counts = ", ".join(f"{len(data.of(side))} {side}" for side in SPLITS)
        raise ValueError(f"split: expected cases to evaluate; {task.name} has {counts}. Choose another --split")
    check_window(loaded, options.window)
    if isinstance(options.batch_size, bool) or not isinstance(options.batch_size, int) or options.batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {options.batch_size!r}")
    if not 0 <= options.tolerance < math.inf:
        raise ValueError(f"tolerance: expected a distance of at least 0, got {options.tolerance!r}")
    if options.split != "train":
        patients = {case.patient for case in cases}
        shared = patients & trained_patients(loaded.folder.parent.parent)
        if shared:
            raise ValueError(
                f"split: expected patients that the model was not trained on; {len(shared)} of {len(patients)} were: "
                "use the split of the training"
            )
    return cases


def evaluate(
    loaded: LoadedTask, data: TaskData, options: Options, say: Say = lambda done, total, text: None
) -> Evaluation:
    """Score every case of the split at its own size, without test-time augmentation.

    Runs on the model's device. Raises: ValueError naming the argument or the file.
    """
    cases, task = check(loaded, data, options), loaded.task
    scores, ids, rows, labels = [], [], [], []
    fingerprint = hashlib.sha256()
    contents = frames_of(cases, task, options.workers)
    for done, (case, frames) in enumerate(zip(cases, contents, strict=True)):
        say(done, len(cases), "evaluating")
        check_distances(case, frames)
        predicted = _predicted(loaded, case, checked(case, frames, task), options)
        fingerprint.update(_content(predicted))
        if predicted.masks is not None:
            of_case = segmentation_scores(
                predicted.masks, frames.masks, task.classes, frames.spacing_mm, tolerance=options.tolerance
            )
            scores.append((case.id, case.patient, of_case))
        else:
            ids.append((case.id, case.patient))
            rows.append(predicted.probabilities)
            labels.append(frames.label)
    about = facts(loaded, options) | {"data": fingerprint.hexdigest(), "notes": list(data.notes)}
    if task.kind == "segmentation":
        return of_segmentation(task.name, task.classes, scores, metric=task.metric, about=about)
    values = np.stack(rows).astype(np.float64)
    values /= values.sum(1, keepdims=True)
    return of_classification(task.name, task.classes, ids, values, np.array(labels), metric=task.metric, about=about)


def facts(loaded: LoadedTask, options: Options) -> dict[str, Any]:
    """Facts about an evaluation, without paths."""
    settings = loaded.settings
    return {
        "run": loaded.pretrained["run"] if settings.start == "pretrained" else "random start",
        "pretrained_step": loaded.pretrained["step"],
        "pretrained_sha256": loaded.pretrained["sha256"],
        "finetuned": loaded.folder.parent.parent.name,
        "step": loaded.step,
        "checkpoint": loaded.sha256,
        "start": settings.start,
        "mode": settings.mode,
        "path": settings.path,
        "seed": settings.seed,
        "split": options.split,
        "window": options.window,
        "precision": options.precision,
    }


def pictures(
    loaded: LoadedTask, data: TaskData, evaluation: Evaluation, options: Options
) -> Iterator[tuple[str, np.ndarray]]:
    """Id and picture, uint8 ``[h, w, 3]``, of the best, the median and the worst case, with truth and prediction."""
    chosen = examples(evaluation)
    by_id = {case.id: case for case in data.cases}
    for place in () if chosen is None else dict.fromkeys(chosen):
        case = by_id[evaluation.cases[place].id]
        predicted = predict_case(loaded, case, options)
        frames = predicted.frames
        if predicted.masks is None:
            image = frames.images[len(frames.images) // 2]
            yield case.id, image if image.ndim == 3 else np.stack([image] * 3, -1)
            continue
        number = telling_frame(predicted.masks, frames.masks)
        spacing = (1.0, 1.0) if frames.spacing_mm is None else frames.spacing_mm[1:]
        image, mask, truth = frames.images[number], predicted.masks[number], frames.masks[number]
        yield case.id, overlay(image, mask, loaded.task.classes, truth=truth, spacing=spacing)


def key_of(pretrained_sha256: str, data: TaskData, settings: Settings, shots: int | None = None) -> Key:
    """The identity of a result in a sheet, known before training."""
    cases = sorted((case.id, case.patient, case.split) for case in data.cases)
    excluded = recipe.RUNTIME | {"mode", "path", "seed"}
    hashed = {name: value for name, value in recipe.to_dict(settings).items() if name not in excluded}
    return Key(
        data.task.name,
        pretrained_sha256,
        _digest(cases),
        settings.mode,
        settings.path,
        shots,
        settings.seed,
        _digest(hashed),
    )


def versions() -> str:
    """The versions of the packages that compute an evaluation, for a cell of a sheet."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("dexkernels", "torch", "numpy"))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def predict_case(loaded: LoadedTask, case: Case, options: Options) -> Predicted:
    """Read and predict a case. ValueError if it cannot be read or its target does not fit the task."""
    return _predicted(loaded, case, checked(case, read(case, loaded.task), loaded.task), options)


def _predicted(loaded: LoadedTask, case: Case, frames: Frames, options: Options) -> Predicted:
    spacing = None if frames.spacing_mm is None else frames.spacing_mm[1:]
    batches = of_frames(
        loaded,
        frames.images,
        spacing,
        batch_size=options.batch_size,
        precision=options.precision,
        window=options.window,
    )
    if loaded.task.kind == "classification":
        return Predicted(case, frames, torch.cat(list(batches)).mean(0).numpy(), None)
    return Predicted(case, frames, None, np.concatenate(list(_masks(batches))))


def _masks(batches: Iterator[torch.Tensor]) -> Iterator[np.ndarray]:
    for probabilities in batches:  # One batch at a time: probabilities at the images' own size are large
        if not probabilities.isfinite().all():
            raise ValueError("model: expected finite probabilities, got NaN: the checkpoint's weights are not usable")
        yield probabilities.argmax(1).to(torch.uint8).numpy()


def _content(predicted: Predicted) -> bytes:
    frames = predicted.frames
    digest = hashlib.sha256(f"{predicted.case.id} {frames.label} {frames.images.shape}".encode())
    digest.update(np.ascontiguousarray(frames.images).tobytes())
    if frames.masks is not None:
        digest.update(np.ascontiguousarray(frames.masks).tobytes())
    return digest.digest()
