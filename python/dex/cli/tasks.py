"""``dex tasks``: list the downstream tasks, describe one, and check its data."""

import json
import os
import textwrap
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dex.cli import _task_data
from dex.cli._console import Parser, failed
from dex.common import exits

if TYPE_CHECKING:
    from dex.tasks.task import Task, TaskData

HELP = "list downstream tasks, describe one, or check its data"
POSITION = 45
NEEDS = "train,data"
_STATES = {
    "verified": "verified on files",
    "loader": "taken from a public loader or description; not verified on files",
    "unknown": "unknown",
    "own": "your own",
}
_WIDTH = 100


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    from dex.tasks.task import find

    task = None if options.task is None else find(options.task)
    if task is not None:
        _task_data.check_data(options)

    from dex.tasks import cases

    root = options.data or os.environ.get(cases.ROOT)
    if task is None:
        _require_none(
            options, "labels", "classes", "patient", "split", "modality", "shots", "pretraining", "run", "private"
        )
        if options.data is not None and not Path(options.data).is_dir():
            raise NotADirectoryError(f"data: expected a folder with a folder for each task, got {options.data}")
        return lambda: _list(Path(root) if root else None, options.json)
    if not task.root and options.data is None and options.labels is None and not _is_there(task, root):
        _require_none(options, "classes", "patient", "split", "modality", "shots", "pretraining", "run", "private")
        if options.check:
            raise ValueError("data: expected the folder of the data for --check, got none")
        return lambda: _show(task, None, options)
    data = _task_data.open_data(task, options)
    return lambda: _show(data.task, data, options)


def _require_none(options: Namespace, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value not in (None, []):
            raise ValueError(f"{name}: expected a task and its data folder with it, got {value!r} alone")


def _is_there(task: "Task", root: str | None) -> bool:
    return root is not None and (Path(root) / task.name).is_dir()


def _list(root: Path | None, as_json: bool) -> int:
    from dex.tasks.task import find, names

    rows = []
    for name in names():
        task = find(name)
        count = len(task.classes) or task.published.classes
        rows.append(
            {
                "task": name,
                "kind": task.kind,
                "modality": task.modality,
                "classes": count or "?",
                "layout": task.layout.state,
                "overlap": "declared" if task.overlap else "",
                "data": _present(task, root),
            }
        )
    if as_json:
        print(json.dumps(rows, indent=1))
        return exits.DONE
    print(_table(rows))
    where = (
        f"data below {root}"
        if root
        else "no data folder: give --data DIR or $DEX_TASKS, with a sub-folder for each task"
    )
    print(f"\n{len(rows)} tasks; {where}. `dex tasks NAME` describes one.")
    print("Your own folder can be a task too: dex tasks FOLDER.")
    return exits.DONE


def _present(task: "Task", root: Path | None) -> str:
    """Whether the data of a task are below ``root``, in words."""
    from dex.tasks import patterns

    if root is None or not _is_there(task, str(root)):
        return "no"
    files = patterns.listed(root / task.name)
    if not task.layout.rules:
        return f"{len(files.files):,} files of unknown layout" if files.files else "no"
    try:
        images = patterns.matches(task.layout, files, task.classes)
    except ValueError:
        return "several copies"
    return f"{len(images):,} images" if images else "other files"


def _table(rows: list[dict]) -> str:
    columns = list(rows[0])
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in columns}
    lines = [{name: name for name in columns}, *rows]
    return "\n".join("  ".join(f"{row[name]!s:<{widths[name]}}" for name in columns).rstrip() for row in lines)


def _show(task: "Task", data: "TaskData | None", options: Namespace) -> int:
    from dex.tasks import leakage
    from dex.tasks.cases import check_targets
    from dex.tasks.task import to_dict

    facts: dict = {"task": to_dict(task)}
    if data is not None:
        facts["data"] = _counts(data)
        facts["notes"] = list(data.notes)
    try:
        if data is not None and options.check:
            facts["targets"] = {side: count._asdict() for side, count in check_targets(data).items()}
        if data is not None and options.pretraining is not None:
            pretraining = None if options.pretraining == "embedded" else Path(options.pretraining)
            facts["leak"] = leakage.check(data, pretraining).sentence
        elif data is not None and options.run is not None:
            facts["leak"] = leakage.of_run(data, Path(options.run)).sentence
    except (ValueError, OSError) as error:
        return failed("dex tasks", error)
    if options.json:
        print(json.dumps(facts, indent=1))
        return exits.DONE
    print("\n".join(_description(task)))
    if data is not None:
        print("\n".join(_contents(task, facts)))
    print("\n".join(_commands(task, data, options)))
    return exits.DONE


def _description(task: "Task") -> list[str]:
    lines = [f"{task.name}: {task.title or 'a task of your own'}"]
    facts = {
        "kind": f"{task.kind}, {task.metric}",
        "modality": f"{task.modality or 'read from the files'}{f', {task.anatomy}' if task.anatomy else ''}",
        "classes": ", ".join(task.classes) or "read from the data",
    }
    if task.published.row:
        counts = task.published
        facts["in the paper"] = (
            f"{counts.row}: {counts.targets}; {counts.train:,} images train, {counts.val:,} val, {counts.test:,} test"
        )
        if counts.difference:
            facts["but"] = counts.difference
    if task.layout.state != "own":
        facts |= {"licence": task.licence, "citation": task.citation}
        if task.url:
            facts["from"] = task.url
        facts["overlap"] = task.overlap or "none known with the pretraining corpus"
        source = f" ({task.layout.source})" if task.layout.source else ""
        facts["layout"] = f"{_STATES[task.layout.state]}{source}"
    if task.layout.note:
        facts["note"] = task.layout.note
    for name, text in facts.items():
        lines += textwrap.wrap(f"  {name:<13} {text}", _WIDTH, subsequent_indent=" " * 16)
    for rule in task.layout.rules:
        target = rule.mask or rule.polygons or "; ".join(pattern for _, pattern in rule.masks) or f"class {rule.label}"
        lines.append(f"  files         {rule.image}  ->  {target}")
    if task.layout.table:
        lines.append(f"  table         {task.layout.table}")
    return lines


def _counts(data: "TaskData") -> dict[str, dict[str, int]]:
    from dex.tasks.task import SPLITS

    sides = {side: data.of(side) for side in SPLITS}
    return {
        side: {"cases": len(cases), "patients": len({case.patient for case in cases})}
        | {
            name: sum(case.target == number for case in cases)
            for number, name in enumerate(data.task.classes)
            if data.task.kind == "classification"
        }
        for side, cases in sides.items()
    }


def _contents(task: "Task", facts: dict) -> list[str]:
    lines = [""]
    for side, counts in facts["data"].items():
        named = ", ".join(f"{value:,} {name}" for name, value in counts.items())
        lines.append(f"  {side:<6}{named}")
    for side, counts in facts.get("targets", {}).items():
        of_class = ", ".join(f"{name} {n:,}" for name, n in zip(task.classes, counts["present"], strict=True))
        lines.append(f"  {side:<6}targets read; cases with each class: {of_class}")
    lines += [line for note in facts["notes"] for line in textwrap.wrap(f"- {note}", _WIDTH, subsequent_indent="  ")]
    if "leak" in facts:
        lines.append(f"leak check against pretraining: {facts['leak']}")
    return lines


def _commands(task: "Task", data: "TaskData | None", options: Namespace) -> list[str]:
    name = task.name if task.layout.state != "own" else _quoted(options.task)
    place = "" if task.root else f" --data {_quoted(options.data or 'DIR')}"
    given = "".join(
        f" --{option} {_quoted(str(value))}"
        for option in ("labels", "split", "patient", "modality", "split-seed", "shots", "private")
        if (value := getattr(options, option.replace("-", "_"))) is not None
    )
    classes = f" --classes {' '.join(map(_quoted, options.classes))}" if options.classes else ""
    if task.layout.state == "unknown" and data is None and not classes:
        place += " --classes NAME=VALUE ..." if task.kind == "segmentation" else " --labels labels.csv"
    rest = f"{name}{place}{given}{classes}"
    return [
        "",
        f"  dex tasks {rest} --check",
        f"  dex finetune RUN {rest} --out DIR",
        "  dex evaluate DIR",
        "  dex predict DIR FILE ...",
    ]


def _quoted(text: str) -> str:
    import shlex

    return text if text == "DIR" else shlex.quote(str(text))


def _parser() -> Parser:
    parser = Parser(
        prog="dex tasks",
        description="Without TASK, list the 26 tasks of the paper and whether their data are present; --data is then a "
        "folder with a sub-folder for each task. With TASK, describe the task, its data and the commands to use it. "
        "TASK may be your own folder: a sub-folder for each class, images with masks beside them, or any folder with "
        "--labels.",
    )
    parser.add_argument("task", nargs="?", metavar="TASK", help="name, YAML file, or your own folder")
    _task_data.add_options(parser)
    parser.add_argument(
        "--check", action="store_true", help="read every mask and check sizes, values and the classes of each split"
    )
    parser.add_argument(
        "--pretraining",
        metavar="PATH",
        help="check for leaks from this shard set or folder, or 'embedded' for the one in the package",
    )
    parser.add_argument("--run", metavar="RUN", help="check for leaks from the data of this run, if they are available")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    return parser
