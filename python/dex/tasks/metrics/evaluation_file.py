"""An evaluation as a JSON file: every case, and the metrics for readers without this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dex.common import atomic
from dex.tasks.metrics import classification
from dex.tasks.metrics.estimate import Estimate
from dex.tasks.metrics.evaluation import METRICS, ClassifiedCase, Evaluation, SegmentedCase, checked
from dex.tasks.metrics.segmentation import ClassScores

FORMAT, VERSION = "dex-evaluation", 1


def write(evaluation: Evaluation, path: Path) -> None:
    """Write ``path``, whole or not at all. ``read`` returns the same evaluation; the summary is for other readers."""
    atomic.write(path, json.dumps(_plain(evaluation), ensure_ascii=False, allow_nan=False) + "\n", sync=True)


def read(path: Path) -> Evaluation:
    """Read an evaluation. ValueError naming the file if it is missing, damaged or of another version."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"evaluation: expected the file that an evaluation wrote, got {path}, which does not exist"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"evaluation: expected a readable file, got {path} ({type(error).__name__})") from None
    try:
        plain = json.loads(text)
        header = {name: plain[name] for name in ("format", "version")}
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(
            f"evaluation: expected the file that an evaluation wrote, got {path}, which is another file or truncated"
        ) from None
    if header != {"format": FORMAT, "version": VERSION}:
        raise ValueError(
            f"evaluation: expected {FORMAT} version {VERSION}, got {header['format']} {header['version']} in {path}; "
            "evaluate again"
        )
    try:
        return checked(_evaluation(plain))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"evaluation: expected a complete evaluation, got one that was changed in {path} ({reason}); evaluate again"
        ) from None


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    by_class = {
        name: {c: _estimate(e) for c, e in zip(evaluation.classes, evaluation.by_class(name), strict=True)}
        for name, metric in METRICS.items()
        if metric.kind == evaluation.kind and metric.of_classes
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": evaluation.task,
        "kind": evaluation.kind,
        "classes": list(evaluation.classes),
        "metric": evaluation.metric,
        "unit": evaluation.unit,
        "tolerance": evaluation.tolerance,
        "about": dict(evaluation.about),
        "summary": {name: _estimate(e) for name, e in evaluation.summary().items()},
        "by_class": by_class,
        "confusion": [list(row) for row in evaluation.confusion],
        "cases": [_case(case) for case in evaluation.cases],
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {name: value for name, value in estimate._asdict().items() if name != "why" or value}


def _case(case: SegmentedCase | ClassifiedCase) -> dict[str, Any]:
    if isinstance(case, SegmentedCase):
        return case._asdict() | {"classes": [c._asdict() | {"state": c.state, "dice": c.dice} for c in case.classes]}
    return case._asdict() | {"probabilities": list(case.probabilities)}


def _evaluation(plain: dict[str, Any]) -> Evaluation:
    classes, kind = tuple(plain["classes"]), plain["kind"]
    side = len(classes) + (kind == "segmentation")
    confusion = tuple(tuple(map(int, row)) for row in plain["confusion"])
    if [len(row) for row in confusion] != [side] * side:
        raise ValueError(f"confusion: expected {side} rows of {side}")
    read_case = _segmented if kind == "segmentation" else _classified
    cases = tuple(read_case(case, len(classes)) for case in plain["cases"])
    if kind == "classification":
        probabilities = np.array([case.probabilities for case in cases])
        classification.check(probabilities, np.array([case.label for case in cases]))
    return Evaluation(
        plain["task"], kind, classes, plain["metric"], cases, confusion, plain["tolerance"], plain["about"]
    )


def _segmented(plain: dict[str, Any], classes: int) -> SegmentedCase:
    scores = tuple(ClassScores(*(c[name] for name in ClassScores._fields)) for c in plain["classes"])
    if len(scores) != classes:
        raise ValueError(f"cases: expected {classes} classes, got {len(scores)} of {plain['id']}")
    return SegmentedCase(plain["id"], plain["patient"], plain["unit"], scores)


def _classified(plain: dict[str, Any], classes: int) -> ClassifiedCase:
    return ClassifiedCase(plain["id"], plain["patient"], plain["label"], tuple(map(float, plain["probabilities"])))
