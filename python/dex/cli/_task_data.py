"""What the commands about tasks share: options that say where the labelled data are, and what an evaluation leaves."""

import argparse
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dex.cli import _features
from dex.cli._console import folder_argument

if TYPE_CHECKING:
    from dex.tasks.evaluate import Options
    from dex.tasks.load import LoadedTask
    from dex.tasks.metrics.evaluation import Evaluation
    from dex.tasks.task import Task, TaskData
    from dex.tasks.task_dataset import Say

REPORT = "report.html"
REMEMBERED = ("split", "patient", "split_seed", "shots")
"""Options that a fine-tuned folder keeps, so that an evaluation splits as the training did."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Of a fine-tuned model in use."""
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="of FOLDER, by the validation metric (best)"
    )
    parser.add_argument(
        "--window",
        type=float,
        metavar="X",
        help="enlarge frames to X times the model's image size and average over overlapping windows (as a whole)",
    )
    _features.add_computing(parser, 16, "frames")


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("labelled data")
    group.add_argument("--data", metavar="DIR", help="folder of the data; that of the task in $DEX_TASKS without it")
    group.add_argument(
        "--labels", metavar="CSV", help="columns file and label (or mask), perhaps patient and split; of one's own data"
    )
    group.add_argument(
        "--classes", nargs="+", default=[], metavar="C", help="of one's own data: NAME, or NAME=VALUE as masks say it"
    )
    group.add_argument("--modality", metavar="M", help="of one's own data: CT, MR, fundus, ...; decides normalisation")
    group.add_argument(
        "--patient", metavar="REGEX", help="searched in the path; group 1 is the patient, who is on one side alone"
    )
    group.add_argument(
        "--split",
        choices=("draw", "train", "val", "test"),
        help="draw: by patient, whatever the files say; a side: everything is on it. Without it as the files say, else "
        "drawn",
    )
    group.add_argument("--split-seed", type=int, metavar="N", help="of a split that is drawn, and of shots (0)")
    group.add_argument("--shots", type=int, metavar="N", help="training images per class that are used (all)")
    group.add_argument("--private", metavar="DIR", help="folder of the salt of ids (DATA.private)")


def open_data(
    task: "str | Task", options: argparse.Namespace, remembered: Mapping[str, Any] | None = None
) -> "TaskData":
    """remembered: of `REMEMBERED`, for what the options do not say. ValueError, FileNotFoundError."""
    from dex.tasks.cases import open_task

    said = {name: getattr(options, name) for name in REMEMBERED}
    said |= {name: value for name, value in (remembered or {}).items() if said.get(name) is None and name in said}
    return open_task(
        task,
        None if options.data is None else folder_argument("data", options.data),
        labels=options.labels,
        split=said["split"],
        patient=said["patient"],
        seed=said["split_seed"] or 0,
        classes=options.classes,
        modality=options.modality,
        private=options.private,
        shots=said["shots"],
    )


def remembered(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in REMEMBERED}


def sheet_argument(text: str | None) -> Path | None:
    """The sheet that is named. ValueError: what is there is none, or none can be written."""
    if text is None:
        return None
    from dex.tasks.sheet import Sheet

    sheet = folder_argument("sheet", text)
    Sheet(sheet).rows()
    there = next(place for place in sheet.absolute().parents if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"sheet: expected a CSV file in a folder that can be written; {there} cannot")
    return sheet


def leak_sentence(data: "TaskData", run: str | None, side: str, say: "Say") -> str:
    """What the comparison of a side with the data of the pretrained run says; run: None leaves it out."""
    from dex.tasks import leakage

    if run is None:
        return "not checked"
    total, done = len(data.of(side)), itertools.count()
    return leakage.of_run(
        data, Path(run), sides=(side,), beat=lambda: say(next(done), total, "comparing with the pretraining set")
    ).sentence


class Where(NamedTuple):
    """Of what an evaluation leaves."""

    out: Path
    sheet: Path | None


def write_evaluation(
    loaded: "LoadedTask", data: "TaskData", settings: "Options", where: Where, leak: str, say: "Say"
) -> "Evaluation":
    """Evaluate; write ``evaluation.json`` and ``report.html``, and a row to the sheet if one is named."""
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
            print(f"{sheet}: has a row of this result already; nothing added")
    return evaluation


def words(evaluation: "Evaluation") -> str:
    """The metrics in a line."""
    texts = []
    for name, estimate in evaluation.summary().items():
        value = "-" if estimate.value is None else f"{estimate.value:.4f}"
        low, high = estimate.low, estimate.high
        texts.append(
            f"{name} {value}" + (f" ({low:.4f} to {high:.4f})" if low is not None and high is not None else "")
        )
    return f"{len(evaluation.cases):,} cases of {len(evaluation.patients):,} patients: {', '.join(texts)}"
