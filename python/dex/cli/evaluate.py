"""``dex evaluate``: evaluate fine-tuned models on a split of their task."""

import sys
from collections.abc import Callable
from pathlib import Path

from dex.cli import _progress, _task_data
from dex.cli._console import Parser, failed, folder_argument, require_one_process
from dex.common import exits
from dex.common.folders import TUNED, check_folder, require

HELP = "evaluate fine-tuned models on a split, with a report"
POSITION = 47
NEEDS = "train,data,adapt"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    if options.out is not None and len(options.folder) > 1:
        raise ValueError(
            f"out: expected none with {len(options.folder)} folders, since each gets its own report, got {options.out}"
        )
    out = None if options.out is None else folder_argument("out", options.out)
    if out is not None:
        check_folder(out)
    for folder in options.folder:
        require(folder, TUNED)
    _task_data.check_data(options)
    require_one_process("dex evaluate")

    from dex.cli._features import workers
    from dex.tasks import evaluate as job
    from dex.tasks.load import load_task_model
    from dex.train.plan import resolve_device

    settings = job.Options(
        options.evaluate, options.batch_size, options.precision, options.window, options.tolerance, workers(options)
    )
    sheet = _task_data.sheet_argument(options.sheet)
    jobs = []
    for folder in dict.fromkeys(options.folder):
        loaded = load_task_model(folder, options.checkpoint)
        data = _task_data.open_data(options.task or loaded.task, options, loaded.data)
        job.check(loaded, data, settings)
        if out is None:
            check_folder(Path(folder))
        jobs.append((loaded, data, out or Path(folder), resolve_device(options.device)))

    def carry_out() -> int:
        try:
            for loaded, data, place, device in jobs:
                loaded.model.to(device)
                with exits.stopping(exits.STOP_SIGNALS), _progress.shown("dex evaluate") as say:
                    leak = _task_data.leak_sentence(data, options.run, settings.split, say)
                    where = _task_data.Where(place, sheet)
                    evaluation = _task_data.write_evaluation(loaded, data, settings, where, leak, say)
                loaded.model.to("cpu")
                print(f"{place}: {_task_data.words(evaluation)}")
                print(place / _task_data.REPORT)
        except exits.Stopped:
            print("dex evaluate: stopped; finished reports stay, and the same command starts over", file=sys.stderr)
            return exits.PREEMPTED
        except (ValueError, OSError) as error:
            return failed("dex evaluate", error)
        return exits.DONE

    return carry_out


def _parser() -> Parser:
    parser = Parser(
        prog="dex evaluate",
        description="Evaluate fine-tuned models on a split of their task, at the images' own size: Dice, HD95 and NSD, "
        "or accuracy, AUC, F1 and calibration, by class, with BCa intervals over patients. Writes evaluation.json and "
        "report.html into each folder. Test-time augmentation is not used.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by a signal.",
    )
    parser.add_argument(
        "folder", nargs="+", metavar="FOLDER", help="folders written by dex finetune, or their checkpoints"
    )
    parser.add_argument(
        "--task", metavar="TASK", help="task name, YAML file or folder of labels (default: that of the training)"
    )
    parser.add_argument("--evaluate", default="test", choices=("train", "val", "test"), help="split to evaluate")
    parser.add_argument("--out", metavar="DIR", help="folder for evaluation.json and report.html (default: FOLDER)")
    parser.add_argument("--sheet", metavar="CSV", help="table of results to which each folder adds a row")
    parser.add_argument("--run", metavar="RUN", help="check for leaks from the data of this pretrained run")
    _task_data.add_model_options(parser)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=2.0,
        metavar="MM",
        help="tolerance of NSD in millimetres; the paper states none",
    )
    _task_data.add_options(parser)
    return parser
