"""Options for labelled data and fine-tuned models, and the files of an evaluation, for all commands about tasks."""

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dex.cli import _features
from dex.cli._console import folder_argument
from dex.common.folders import check_file, require

if TYPE_CHECKING:
    from dex.tasks.evaluate import Options
    from dex.tasks.load import LoadedTask
    from dex.tasks.metrics.evaluation import Evaluation
    from dex.tasks.task import Task, TaskData
    from dex.tasks.task_dataset import Say

REPORT = "report.html"
REMEMBERED = ("split", "patient", "split_seed", "shots")
"""Options stored in the folder of a fine-tuned model, so that an evaluation uses the split of the training."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options for running a fine-tuned model."""
    parser.add_argument(
        "--checkpoint",
        choices=("best", "last"),
        default="best",
        help="checkpoint to use: best by the validation metric, or last",
    )
    parser.add_argument(
        "--window",
        type=float,
        metavar="FACTOR",
        help="resize frames to FACTOR times the model's image size and average overlapping windows (default: resize "
        "each frame to the image size and run it once)",
    )
    _features.add_computing(parser, 16, "frames")


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("labelled data")
    group.add_argument("--data", metavar="DIR", help="folder of the labelled data (default: the task's in $DEX_TASKS)")
    group.add_argument(
        "--labels",
        metavar="CSV",
        help="your own labels: a table with columns file and label (or mask), optionally patient and split",
    )
    group.add_argument(
        "--classes",
        nargs="+",
        default=[],
        metavar="CLASS",
        help="classes of your own data: NAME, or NAME=VALUE with the value of the class in masks",
    )
    group.add_argument(
        "--modality",
        metavar="MODALITY",
        help="modality of your own data, such as CT, MR or fundus; it decides the normalisation",
    )
    group.add_argument(
        "--patient",
        metavar="REGEX",
        help="regular expression searched in each path; group 1 is the patient. A patient is never in two splits",
    )
    group.add_argument(
        "--split",
        choices=("draw", "train", "val", "test"),
        help="draw: draw a split by patient; train, val or test: put all images into it (default: the split that the "
        "files define, else a drawn one)",
    )
    group.add_argument(
        "--split-seed", type=int, metavar="SEED", help="seed of a drawn split and of --shots (default: 0)"
    )
    group.add_argument("--shots", type=int, metavar="IMAGES", help="training images used per class (default: all)")
    group.add_argument("--private", metavar="DIR", help="folder that keeps the salt of the ids (default: DATA.private)")


def check_data(options: argparse.Namespace) -> None:
    """FileNotFoundError or ValueError if ``--data`` is given and nothing is there, before torch is loaded."""
    if options.data is not None:
        require(folder_argument("data", options.data), "data: expected a folder")


def open_data(
    task: "str | Task", options: argparse.Namespace, remembered: Mapping[str, Any] | None = None
) -> "TaskData":
    """The task's cases. ``remembered`` gives the options in ``REMEMBERED`` that are not on the command line.

    ValueError or FileNotFoundError: bad input.
    """
    from dex.tasks.cases import open_task

    chosen = {name: getattr(options, name) for name in REMEMBERED}
    chosen |= {name: value for name, value in (remembered or {}).items() if chosen.get(name) is None and name in chosen}
    return open_task(
        task,
        None if options.data is None else folder_argument("data", options.data),
        labels=options.labels,
        split=chosen["split"],
        patient=chosen["patient"],
        seed=chosen["split_seed"] or 0,
        classes=options.classes,
        modality=options.modality,
        private=options.private,
        shots=chosen["shots"],
    )


def remembered(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in REMEMBERED}


def sheet_argument(text: str | None) -> Path | None:
    """Path of the sheet, None for None. ValueError: the file is not a sheet, or its folder is not writable."""
    if text is None:
        return None
    from dex.tasks.sheet import Sheet

    sheet = folder_argument("sheet", text)
    Sheet(sheet).rows()
    check_file(sheet, "sheet")
    return sheet


def leak_sentence(data: "TaskData", run: str | None, side: str, say: "Say") -> str:
    """Result of comparing the images of split ``side`` with the data of the pretrained ``run``; None skips it."""
    from dex.tasks import leakage

    if run is None:
        return "not checked"
    total, done = len(data.of(side)), itertools.count()
    return leakage.of_run(
        data, Path(run), sides=(side,), beat=lambda: say(next(done), total, "comparing with the pretraining set")
    ).sentence


class Where(NamedTuple):
    """Where an evaluation is written."""

    out: Path
    sheet: Path | None


def write_evaluation(
    loaded: "LoadedTask", data: "TaskData", settings: "Options", where: Where, leak: str, say: "Say"
) -> "Evaluation":
    """Evaluate, write ``evaluation.json`` and ``report.html``, and add a row to the sheet if there is one."""
    import time

    from dex.report import task_page
    from dex.tasks import evaluate as job
    from dex.tasks.metrics import evaluation_file
    from dex.tasks.sheet import Sheet, row_of

    began = time.monotonic()
    evaluation = job.evaluate(loaded, data, settings, say)
    evaluation = evaluation._replace(about={**evaluation.about, "leak": leak})
    out, sheet = where
    out.mkdir(parents=True, exist_ok=True)
    evaluation_file.write(evaluation, out / job.FILE)
    pictures = [task_page.Picture(*picture) for picture in job.pictures(loaded, data, evaluation, settings)]
    task_page.write(
        out / REPORT,
        evaluation,
        settings=loaded.settings,
        pictures=pictures,
        leak=leak,
        notes=evaluation.about["notes"],
    )
    if sheet is not None:
        key = job.key_of(loaded.pretrained["sha256"], data, loaded.settings, loaded.data.get("shots"))
        row = row_of(evaluation, key, leak=leak, seconds=time.monotonic() - began, versions=job.versions())
        if not Sheet(sheet).add(row):
            print(f"{sheet}: already has a row for this result; nothing added")
    return evaluation


def words(evaluation: "Evaluation") -> str:
    """The metrics on one line."""
    texts = []
    for name, estimate in evaluation.summary().items():
        value = "-" if estimate.value is None else f"{estimate.value:.4f}"
        low, high = estimate.low, estimate.high
        texts.append(
            f"{name} {value}" + (f" ({low:.4f} to {high:.4f})" if low is not None and high is not None else "")
        )
    baseline = evaluation.baseline()
    if baseline.value is not None:
        texts.append(f"reference {baseline.value:.4f} ({baseline.name})")
    return f"{len(evaluation.cases):,} cases of {len(evaluation.patients):,} patients: {', '.join(texts)}"
