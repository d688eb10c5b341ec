"""``dex finetune``: fine-tune a pretrained model on a task."""

import argparse
import sys
import typing
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dex.cli import _features, _progress, _task_data
from dex.cli._console import Parser, failed, folder_argument
from dex.common import exits
from dex.common.folders import RUN, check_folder, require

if TYPE_CHECKING:
    from dex.tasks.recipe import Settings
    from dex.tasks.task import TaskData

HELP = "fine-tune a model on a task, or on your own labelled images"
POSITION = 46
NEEDS = "train,data,adapt"


def run(arguments: list[str]) -> Callable[[], int]:
    from dex.tasks import recipe
    from dex.tasks.task import find

    options = _parser().parse_args(arguments)
    settings = _settings(options)
    recipe.check(settings)
    resume = _resume(options.resume)
    out = folder_argument("out", options.out)
    check_folder(out)
    require(options.run, RUN)
    task = find(options.task)
    _task_data.check_data(options)

    from dex.common.ranks import announced
    from dex.tasks.finetune import prepare

    data = _task_data.open_data(task, options)
    if options.dry_run:
        print(_described(options.run, data, settings))
        return lambda: exits.DONE
    sheet = _task_data.sheet_argument(options.sheet)
    try:
        with _progress.shown("dex finetune") as say:
            training = prepare(
                options.run,
                data,
                settings,
                out,
                resume=resume,
                overwrite=options.overwrite,
                command=["dex", "finetune", *arguments],
                split=_task_data.remembered(options),
                say=say,
            )
    except exits.Stopped as stopped:
        print(f"dex finetune: {stopped} before the first step: start the same command again", file=sys.stderr)
        return lambda: exits.PREEMPTED

    def carry_out() -> int:
        try:
            code = training.run()
            if code == exits.DONE and announced().rank == 0 and not options.no_evaluation and data.of("test"):
                leak = None if options.no_leak_check else options.run
                _evaluate(_task_data.Where(out, sheet), data, settings, leak)
        except (OSError, ValueError) as error:
            return failed("dex finetune", error)
        except exits.Stopped:
            print("dex finetune: stopped during the evaluation; dex evaluate repeats it", file=sys.stderr)
            return exits.PREEMPTED
        return code

    return carry_out


def _evaluate(where: _task_data.Where, data: "TaskData", settings: "Settings", run: str | None) -> None:
    """Evaluate the best checkpoint on the test split, which is checked for leaks from the data of ``run`` if given."""
    from dex.tasks.evaluate import Options
    from dex.tasks.load import load_task_model
    from dex.train.plan import resolve_device

    loaded = load_task_model(where.out)
    loaded.model.to(resolve_device(settings.device))
    with exits.stopping(), _progress.shown("dex finetune") as say:
        options = Options("test", settings.batch_size, workers=settings.processes)
        leak = _task_data.leak_sentence(data, run, "test", say)
        evaluation = _task_data.write_evaluation(loaded, data, options, where, leak, say)
    print(_task_data.words(evaluation))
    print(f"leak check against pretraining: {leak}")
    print(where.out / _task_data.REPORT)


def _resume(text: str | None) -> bool:
    if text not in (None, "auto"):
        raise ValueError(f"resume: expected auto, got {text!r}")
    return text is not None


def _settings(options: argparse.Namespace) -> "Settings":
    from dex.tasks import recipe

    given = {field.name: getattr(options, field.name) for field in recipe.fields()}
    return replace(recipe.preset(options.preset), **{name: value for name, value in given.items() if value is not None})


def _described(run: str, data: "TaskData", settings: "Settings") -> str:
    """Text of ``--dry-run``: the data, the model and every setting. Reads every target."""
    from dex.common.units import format_bytes
    from dex.tasks import recipe
    from dex.tasks.cases import check_targets
    from dex.tasks.finetune import plan

    planned, model = plan(run, data, settings)
    task = data.task
    lines = [f"{task.name}: {task.kind} of {', '.join(task.classes)}; metric {task.metric}"]
    for side, count in check_targets(data).items():
        patients = len({case.patient for case in data.of(side)})
        of_class = ", ".join(f"{name} {n:,}" for name, n in zip(task.classes, count.present, strict=True))
        lines.append(
            f"{side}: {count.cases:,} cases of {patients:,} patients, {count.frames:,} images; with {of_class}"
        )
        if side == "train":
            steps = -(-count.frames // settings.batch_size)
            lines.append(f"  {steps:,} steps per epoch, {steps * settings.epochs:,} steps")
    trained, total = model.trained_parameters(), sum(p.numel() for p in model.parameters())
    size = 4 * (total + 3 * trained)  # float32 weights; a gradient and two moments of each trained one
    lines.append(f"{trained:,} of {total:,} parameters trained ({settings.mode}, {settings.path})")
    lines.append(f"{format_bytes(size)} for weights, gradients and moments; activations and time are not estimated")
    lines.append(f"{planned.device.type}, {planned.precision}, images of {planned.config.model.img_size} pixels")
    lines += planned.notes
    lines += [f"{name}: {value}" for name, value in recipe.to_dict(settings).items()]
    return "\n".join(lines)


def _parser() -> Parser:
    from dex.tasks import recipe

    parser = Parser(
        prog="dex finetune",
        essentials=(
            *("resume", "overwrite", "dry_run", "preset", "data", "labels", "classes", "modality", "split"),
            *("mode", "epochs", "lr", "batch_size", "img_size", "seed", "device"),
        ),
        description="Fine-tune a pretrained model on a task: segmentation with a UNETR decoder, classification with a "
        "head. At the end, the best checkpoint by the validation metric is evaluated on the test split. Several ranks "
        "(torchrun -m dex finetune ...) share every batch.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 stopped by three non-finite steps in a row, 75 "
        "stopped by a signal, saved and resumable, 130 interrupted at once.",
    )
    _features.add_run(parser)
    parser.add_argument("task", metavar="TASK", help="name from dex tasks, YAML file, or your own folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the fine-tuned model; new or empty")
    parser.add_argument("--resume", metavar="AUTO", help="auto resumes from the newest good checkpoint in --out")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier training in --out after the first step"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and print what would run, but write nothing"
    )
    parser.add_argument("--no-evaluation", action="store_true", help="do not evaluate the test split at the end")
    parser.add_argument(
        "--no-leak-check", action="store_true", help="do not compare the test split with the data of RUN"
    )
    parser.add_argument("--sheet", metavar="CSV", help="table of results to which the test split adds a row")
    parser.add_argument(
        "--preset",
        choices=tuple(recipe.PRESETS),
        default="paper",
        help="defaults of the settings below: paper (the values shown), or cpu for minutes on a CPU",
    )
    _task_data.add_options(parser)
    group = parser.add_argument_group("settings")
    for field in recipe.fields():
        _add_setting(group, field, recipe.kind_of(field.name), recipe.describe(field))
    return parser


def _add_setting(group: Any, field: Any, kind: Any, text: str) -> None:
    option, help_text = "--" + field.name.replace("_", "-"), text.replace("%", "%%")
    if typing.get_origin(kind) is typing.Literal:
        group.add_argument(option, choices=typing.get_args(kind), help=help_text)
    elif kind is bool:
        group.add_argument(option, action="store_true", default=None, help=help_text)
    else:
        number = next(k for k in (*typing.get_args(kind), kind) if k in (int, float))
        group.add_argument(option, type=number, metavar="NUMBER", help=help_text)
