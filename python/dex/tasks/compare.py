"""`dex compare`: two pretrained runs fine-tuned alike on tasks, and what one scores above the other.

    OUT/sheet.csv                      a row per task, run and seed; rows that are there are not made again
    OUT/TASK/data.sha256               of every file of the task: others are refused by a later start
    OUT/TASK/RUN-seed-0/               a fine-tuned folder, as `dex finetune` and `dex evaluate` leave it
    OUT/comparison.json                what follows from the rows
    OUT/report.html                    the page
    OUT.private/                       the salt of ids

Both sides take the same seeds, splits and settings. Killed at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dex.common import atomic, exits
from dex.inference.load import load
from dex.tasks import compute, leakage
from dex.tasks import task as task_records
from dex.tasks.cases import Parts, TaskData, check_targets
from dex.tasks.compute import Compute
from dex.tasks.evaluate import FILE, evaluate, key_of, versions
from dex.tasks.evaluate import Options as EvaluateOptions
from dex.tasks.finetune import finetune
from dex.tasks.load import load_task_model, manifest_hash
from dex.tasks.metrics import evaluation_file
from dex.tasks.metrics.difference import Difference, paired_difference
from dex.tasks.metrics.evaluation import METRICS, Evaluation
from dex.tasks.recipe import Settings
from dex.tasks.sheet import Sheet, row_of

SHEET, RESULT, DATA = "sheet.csv", "comparison.json", "data.sha256"
LEAST_PATIENTS = 10
"""With fewer test patients no verdict is given."""
LEAST_SEEDS = 3
"""Nor with fewer seeds."""
_FILE_BLOCK = 2**22


class Side(NamedTuple):
    """One of the runs."""

    name: str
    run: Path
    checkpoint: str
    """Hash of its weights' manifest, or of its weights."""
    compute: Compute
    start: str = "pretrained"
    """Or "random": its architecture, drawn anew."""


class Prepared(NamedTuple):
    """A task with its cases, checked."""

    data: TaskData
    fingerprint: str


class Failed(RuntimeError):
    """A fine-tuning ended before its time; ``code`` is its exit code."""

    def __init__(self, code: int, folder: Path):
        super().__init__(f"fine-tuning in {folder} ended with exit code {code}")
        self.code = code


def side(name: str, run: str | Path, start: str = "pretrained") -> Side:
    """What ``run`` is. Raises as `dex.inference.load.load`."""
    loaded = load(run)
    checkpoint = manifest_hash(loaded.folder) or _digest(loaded.folder)
    return Side(name, Path(run), checkpoint, compute.of_run(name, loaded, start == "random"), start)


def open_sheet(out: Path) -> None:
    """ValueError where the sheet in ``out`` is none of these columns: before the work."""
    Sheet(out / SHEET).rows()


def _digest(folder: Path) -> str:
    from dex.inference.model_file import WEIGHTS

    path = folder / WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def sides(a: str | Path, b: str | Path) -> tuple[Side, Side]:
    """Of two different runs, under different names. ValueError naming the argument."""
    names = [Path(run).resolve().name for run in (a, b)]
    if names[0] == names[1]:
        names = [f"{Path(run).resolve().parent.name}/{name}" for run, name in zip((a, b), names, strict=True)]
    if names[0] == names[1]:
        names = ["A", "B"]
    first, second = side(names[0], a), side(names[1], b)
    if first.checkpoint == second.checkpoint:
        raise ValueError(f"B: expected another run than A; {b} has the same weights as {a}")
    return first, second


def prepared(data: TaskData) -> Prepared:
    """The task with every target read once. ValueError naming what is wrong, before anything trains."""
    if not data.of("test"):
        raise ValueError(f"data: expected test cases of {data.task.name}; it has none")
    check_targets(data)
    return Prepared(data, _fingerprint(data))


def _fingerprint(data: TaskData) -> str:
    """Of the task, the split and every byte of the cases' files."""
    digest = hashlib.sha256(json.dumps(task_records.to_dict(data.task), sort_keys=True).encode())
    for case in data.cases:
        label = case.target if isinstance(case.target, int) else ""
        digest.update(f"\0{case.id}\0{case.patient}\0{case.split}\0{label}\0".encode())
        targets = case.target.files if isinstance(case.target, Parts) else (case.target,)
        for path in (case.image, *(target for target in targets if isinstance(target, Path))):
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                with open(file, "rb") as stream:
                    while block := stream.read(_FILE_BLOCK):
                        digest.update(block)
    return digest.hexdigest()


def leaks(task: Prepared, sides: Sequence[Side]) -> dict[str, str]:
    """By the sides' names, what the check of the test cases against their pretraining sets says; once for a set."""
    of_set: dict[str, str] = {}
    said = {}
    for one in sides:
        known = one.compute.data or one.name
        if known not in of_set:
            of_set[known] = leakage.of_run(task.data, one.run, sides=("test",)).sentence
        said[one.name] = of_set[known]
    return said


def settings_of(one: Side, settings: Settings, seed: int) -> Settings:
    """Those of one fine-tuning: the same for both sides but for the start."""
    return dataclasses.replace(settings, seed=seed, start=one.start)


def outcome(
    one: Side,
    task: Prepared,
    settings: Settings,
    out: Path,
    *,
    leak: str = "not checked",
    discard: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """The evaluation of one fine-tuning, made unless it is there. settings: of `settings_of`. leak: what the
    check against the pretraining set said, for the sheet. discard: remove the checkpoints once it is evaluated.

    Raises: `Failed`; `dex.common.exits.Stopped` before training; ValueError naming what cannot be trained on, or data
    that are not those of an earlier start.
    """
    key, sheet = key_of(one.checkpoint, task.data, settings), Sheet(out / SHEET)
    name = task.data.task.name
    _same_data(out / name / DATA, task)
    folder = out / name / f"{one.name.replace('/', '-')}-seed-{settings.seed}"
    known = folder / FILE
    if known.is_file() and sheet.done(key):
        return evaluation_file.read(known)
    say(f"{name}, {one.name}, seed {settings.seed}")
    began = time.perf_counter()
    if not known.is_file():
        code = finetune(one.run, task.data, settings, folder, resume=True)
        if code != exits.DONE:
            raise Failed(code, folder)
        evaluation = evaluate(load_task_model(folder), task.data, EvaluateOptions())
        evaluation_file.write(evaluation, known)
    evaluation = evaluation_file.read(known)
    sheet.add(row_of(evaluation, key, leak=leak, seconds=time.perf_counter() - began, versions=versions()))
    if discard:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return evaluation


def _same_data(path: Path, task: Prepared) -> None:
    """Keep the fingerprint of the data beside what is made of them, or compare it."""
    if path.is_file():
        if path.read_text(encoding="utf-8").strip() != task.fingerprint:
            raise ValueError(
                f"data: expected the images, masks and splits of {task.data.task.name} that {path.parent.parent} was "
                "begun with; these are others. Give another --out"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, f"{task.fingerprint}\n", sync=True)


class Compared(NamedTuple):
    """One task."""

    task: str
    metric: str
    difference: Difference
    first: tuple[Evaluation, ...]
    """One per seed."""
    second: tuple[Evaluation, ...]
    reasons: tuple[str, ...]
    """Why no verdict is given; () where one is."""
    leaks: Mapping[str, str]
    """By the side's name, what the check of the test cases against its pretraining set said."""

    @property
    def values(self) -> tuple[float | None, float | None]:
        """Of the metric: the mean over seeds of the two sides."""
        return _mean(self.first, self.metric), _mean(self.second, self.metric)


def _mean(evaluations: Sequence[Evaluation], metric: str) -> float | None:
    values = [evaluation.estimate(metric).value for evaluation in evaluations]
    return None if any(value is None for value in values) else sum(values) / len(values)


def compared(
    task: str, first: Sequence[Evaluation], second: Sequence[Evaluation], leaks: Mapping[str, str] | None = None
) -> Compared:
    """Paired by patient and seed. ValueError where the two sides were not evaluated on the same cases and seeds."""
    metric = first[0].metric
    difference = paired_difference(first, second, metric)
    patients = len(first[0].patients)
    reasons = []
    if patients < LEAST_PATIENTS:
        reasons.append(f"{patients} test patient{'s' if patients != 1 else ''}, fewer than {LEAST_PATIENTS}")
    if len(first) < LEAST_SEEDS:
        reasons.append(f"{len(first)} seed{'s' if len(first) != 1 else ''}, fewer than {LEAST_SEEDS}")
    return Compared(task, metric, difference, tuple(first), tuple(second), tuple(reasons), leaks or {})


def verdict(a: Side, b: Side, tasks: Sequence[Compared]) -> str:
    """In a sentence: on how many tasks which side is better, and whether that may be said at all."""
    judged = [one for one in tasks if not one.reasons]
    if not judged:
        why = sorted({reason for one in tasks for reason in one.reasons})
        return f"No verdict: the sample is too small ({'; '.join(why)})."
    better, worse = (sum(_side_of(one) == which for one in judged) for which in ("first", "second"))
    said = f"{a.name} is better than {b.name} on {better} of {len(judged)} tasks, worse on {worse}"
    said += f", not told apart on {len(judged) - better - worse}"
    left = len(tasks) - len(judged)
    said += f"; {left} more {'has' if left == 1 else 'have'} too small a sample for any verdict" if left else ""
    if unequal := compute.differences(a.compute, b.compute):
        said += f". The two are not of equal compute ({'; '.join(unequal)}), so this is no statement about the models"
    return said + "."


def _side_of(one: Compared) -> str:
    if one.difference.verdict not in ("higher", "lower"):
        return ""
    return "first" if (one.difference.verdict == "higher") == METRICS[one.metric].higher_is_better else "second"


def write_result(path: Path, a: Side, b: Side, tasks: Sequence[Compared]) -> None:
    """Plain values of everything that was concluded."""
    result = {
        "verdict": verdict(a, b, tasks),
        "compute": [one.compute._asdict() for one in (a, b)],
        "compute_says": compute.sentences(a.compute, b.compute),
        "tasks": [
            {
                "task": one.task,
                "metric": one.metric,
                "values": one.values,
                "difference": one.difference.estimate._asdict(),
                "by_seed": [seed._asdict() for seed in one.difference.by_seed],
                "sentence": one.difference.sentence(a.name, b.name),
                "no_verdict": list(one.reasons),
                "leaks": dict(one.leaks),
            }
            for one in tasks
        ],
    }
    atomic.write(path, json.dumps(result, indent=1) + "\n", sync=True)
