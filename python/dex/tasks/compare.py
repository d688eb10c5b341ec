"""``dex compare``: fine-tunes two pretrained runs in the same way on tasks, and compares their scores.

    OUT/sheet.csv                      a row per task, run and seed; existing rows are not computed again
    OUT/TASK/data.sha256               hash of every file of the task; a later start with other files is refused
    OUT/TASK/RUN-seed-0/               a folder as written by ``dex finetune`` and ``dex evaluate``
    OUT/comparison.json                the conclusions
    OUT/report.html                    the page
    OUT.private/                       the salt of ids

Both sides use the same seeds, splits and settings. After a kill at any moment, the same command resumes.
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
"""Test patients needed for a verdict."""
LEAST_SEEDS = 3
"""Seeds needed for a verdict."""
_FILE_BLOCK = 2**22


class Side(NamedTuple):
    """One of the runs."""

    name: str
    run: Path
    checkpoint: str
    """Hash of the checkpoint's manifest, or of the weights."""
    compute: Compute
    start: str = "pretrained"
    """Or "random": the same architecture with random initialisation."""


class Prepared(NamedTuple):
    """A task with checked cases."""

    data: TaskData
    fingerprint: str


class Failed(RuntimeError):
    """A fine-tuning ended early; ``code`` is its exit code."""

    def __init__(self, code: int, folder: Path):
        super().__init__(f"fine-tuning in {folder} ended with exit code {code}")
        self.code = code


def side(name: str, run: str | Path, start: str = "pretrained") -> Side:
    """The record of ``run``. Raises as ``dex.inference.load.load``."""
    loaded = load(run)
    checkpoint = manifest_hash(loaded.folder) or _digest(loaded.folder)
    return Side(name, Path(run), checkpoint, compute.of_run(name, loaded, start == "random"), start)


def open_sheet(out: Path) -> None:
    """ValueError if the sheet in ``out`` is invalid; called before the work."""
    Sheet(out / SHEET).rows()


def _digest(folder: Path) -> str:
    from dex.inference.model_file import WEIGHTS

    path = folder / WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def sides(a: str | Path, b: str | Path) -> tuple[Side, Side]:
    """The records of two different runs, under different names. ValueError naming the argument."""
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
    """The task, after every target was read once. ValueError naming what is wrong, before training."""
    if not data.of("test"):
        raise ValueError(f"data: expected test cases of {data.task.name}; it has none")
    check_targets(data)
    return Prepared(data, _fingerprint(data))


def _fingerprint(data: TaskData) -> str:
    """Hash of the task, the split and every byte of the cases' files."""
    task = task_records.to_dict(task_records.without_texts(data.task))
    digest = hashlib.sha256(json.dumps(task, sort_keys=True).encode())
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
    """By the sides' names, the leak check of the test cases against their pretraining sets; one check per set."""
    by_set: dict[str, str] = {}
    result = {}
    for side in sides:
        pretraining_set = side.compute.data or side.name
        if pretraining_set not in by_set:
            by_set[pretraining_set] = leakage.of_run(task.data, side.run, sides=("test",)).sentence
        result[side.name] = by_set[pretraining_set]
    return result


def settings_of(side: Side, settings: Settings, seed: int) -> Settings:
    """The settings of one fine-tuning, the same for both sides except for the start."""
    return dataclasses.replace(settings, seed=seed, start=side.start)


def outcome(
    side: Side,
    task: Prepared,
    settings: Settings,
    out: Path,
    *,
    leak: str = "not checked",
    discard: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """The evaluation of one fine-tuning, which runs unless it exists. settings: from ``settings_of``. leak: the result
    of the leak check, for the sheet. discard: remove the checkpoints after the evaluation.

    Raises: ``Failed``; ``dex.common.exits.Stopped`` before training; ValueError naming what cannot be trained on, or if
    the data differ from those of an earlier start.
    """
    key, sheet = key_of(side.checkpoint, task.data, settings), Sheet(out / SHEET)
    name = task.data.task.name
    _same_data(out / name / DATA, task)
    folder = out / name / f"{side.name.replace('/', '-')}-seed-{settings.seed}"
    file = folder / FILE
    if file.is_file() and sheet.done(key):
        return evaluation_file.read(file)
    say(f"{name}, {side.name}, seed {settings.seed}")
    began = time.perf_counter()
    if not file.is_file():
        code = finetune(side.run, task.data, settings, folder, resume=True)
        if code != exits.DONE:
            raise Failed(code, folder)
        evaluation = evaluate(load_task_model(folder), task.data, EvaluateOptions())
        evaluation_file.write(evaluation, file)
    evaluation = evaluation_file.read(file)
    sheet.add(row_of(evaluation, key, leak=leak, seconds=time.perf_counter() - began, versions=versions()))
    if discard:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return evaluation


def _same_data(path: Path, task: Prepared) -> None:
    """Store the fingerprint of the data beside their results, or compare it with the stored one."""
    if path.is_file():
        if path.read_text(encoding="utf-8").strip() != task.fingerprint:
            raise ValueError(
                f"data: expected the images, masks and splits of {task.data.task.name} that {path.parent.parent} was "
                "begun with, got different ones. Choose another --out"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, f"{task.fingerprint}\n", sync=True)


class Compared(NamedTuple):
    """The comparison on one task."""

    task: str
    metric: str
    difference: Difference
    first: tuple[Evaluation, ...]
    """One per seed."""
    second: tuple[Evaluation, ...]
    reasons: tuple[str, ...]
    """Why there is no verdict; () if there is one."""
    leaks: Mapping[str, str]
    """By the side's name, the leak check of the test cases against its pretraining set."""

    @property
    def values(self) -> tuple[float | None, float | None]:
        """The metric of both sides, mean over seeds."""
        return _mean(self.first, self.metric), _mean(self.second, self.metric)


def _mean(evaluations: Sequence[Evaluation], metric: str) -> float | None:
    values = [evaluation.estimate(metric).value for evaluation in evaluations]
    return None if any(value is None for value in values) else sum(values) / len(values)


def compared(
    task: str, first: Sequence[Evaluation], second: Sequence[Evaluation], leaks: Mapping[str, str] | None = None
) -> Compared:
    """Compare two sides on a task, paired by patient and seed. ValueError if their cases or seeds differ."""
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
    """A sentence: on how many tasks each side is better, and whether the comparison allows a verdict."""
    judged = [task for task in tasks if not task.reasons]
    if not judged:
        reasons = sorted({reason for task in tasks for reason in task.reasons})
        return f"No verdict: the sample is too small ({'; '.join(reasons)})."
    better, worse = (sum(_better_side(task) == side for task in judged) for side in ("first", "second"))
    text = f"{a.name} is better than {b.name} on {better} of {len(judged)} tasks, worse on {worse}"
    text += f", without a clear difference on {len(judged) - better - worse}"
    rest = len(tasks) - len(judged)
    text += f"; {rest} more {'has' if rest == 1 else 'have'} too small a sample for a verdict" if rest else ""
    if unequal := compute.differences(a.compute, b.compute):
        text += f". Compute is not equal ({'; '.join(unequal)}), so this says nothing about the models themselves"
    return text + "."


def _better_side(task: Compared) -> str:
    if task.difference.verdict not in ("higher", "lower"):
        return ""
    return "first" if (task.difference.verdict == "higher") == METRICS[task.metric].higher_is_better else "second"


def write_result(path: Path, a: Side, b: Side, tasks: Sequence[Compared]) -> None:
    """Write the conclusions as JSON."""
    result = {
        "verdict": verdict(a, b, tasks),
        "compute": [side.compute._asdict() for side in (a, b)],
        "compute_says": compute.sentences(a.compute, b.compute),
        "tasks": [
            {
                "task": task.task,
                "metric": task.metric,
                "values": task.values,
                "difference": task.difference.estimate._asdict(),
                "by_seed": [seed._asdict() for seed in task.difference.by_seed],
                "sentence": task.difference.sentence(a.name, b.name),
                "no_verdict": list(task.reasons),
                "leaks": dict(task.leaks),
            }
            for task in tasks
        ],
    }
    atomic.write(path, json.dumps(result, indent=1) + "\n", sync=True)
