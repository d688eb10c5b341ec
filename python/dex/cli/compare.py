"""``dex compare``: fine-tune two pretrained runs on tasks and compare the results by patient and seed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dex.cli._console import Parser, failed, folder_argument, require_one_process
from dex.common import exits
from dex.common.folders import RUN, check_folder, require

if TYPE_CHECKING:
    from dex.tasks.compare import Compared, Prepared, Side
    from dex.tasks.recipe import Settings

HELP = "fine-tune two runs on tasks and say which is better"
POSITION = 49
NEEDS = "train,data,adapt"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    out = folder_argument("out", options.out)
    check_folder(out)
    a, b = (require(folder_argument(name, run), RUN) for name, run in (("A", options.a), ("B", options.b)))
    require_one_process("dex compare")

    from dex.report import task_verdict_page
    from dex.tasks import cases, compare, recipe

    settings = recipe.preset(options.preset)
    if options.settings is not None:
        settings = _settings(folder_argument("settings", options.settings), settings)
    recipe.check(settings)
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"seeds: expected each once, got {' '.join(map(str, options.seeds))}")
    a, b = compare.sides(a, b)
    private = out.with_name(f"{out.name}.private")
    prepared = []
    for name in options.tasks:
        data = cases.open_task(name, _data(options.data, name, len(options.tasks)), private=private)
        prepared.append(compare.prepared(data))
    names = [task.data.task.name for task in prepared]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks: expected each once, got {', '.join(names)}")
    compare.open_sheet(out)
    out.mkdir(parents=True, exist_ok=True)

    def carry_out() -> int:
        try:
            results = []
            for task in prepared:
                results.append(_compared(task, (a, b), settings, out, options))
                compare.write_result(out / compare.RESULT, a, b, results)
        except exits.Stopped:
            return _stopped(out)
        except compare.Failed as error:
            return _stopped(out) if error.code == exits.PREEMPTED else failed("dex compare", error)
        except (OSError, ValueError) as error:
            return failed("dex compare", error)
        task_verdict_page.write(out / "report.html", a, b, results)
        for result in results:
            print(f"{result.task}: {result.difference.sentence(a.name, b.name)}")
        print(compare.verdict(a, b, results))
        print(f"{out / 'report.html'}, {out / compare.SHEET}")
        return exits.DONE

    return carry_out


def _compared(
    task: "Prepared", sides: "tuple[Side, Side]", settings: "Settings", out: Path, options: Any
) -> "Compared":
    """Both sides of one task with all seeds."""
    from dex.tasks import compare

    leaks = compare.leaks(task, sides)
    outcomes = []
    for side in sides:
        by_seed = [compare.settings_of(side, settings, seed) for seed in options.seeds]
        given = {"leak": leaks[side.name], "discard": options.discard, "say": _say}
        outcomes.append([compare.outcome(side, task, of_seed, out, **given) for of_seed in by_seed])
    return compare.compared(task.data.task.name, *outcomes, leaks)


def _say(text: str) -> None:
    print(f"dex compare: {text}", file=sys.stderr, flush=True)


def _stopped(out: Path) -> int:
    _say(f"stopped; what is written to {out} stays, and the same command resumes")
    return exits.PREEMPTED


def _settings(path: Path, base: "Settings") -> "Settings":
    import yaml

    from dex.tasks import recipe

    if not path.is_file():
        raise FileNotFoundError(f"settings: expected a YAML file; there is none at {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"settings: expected YAML in {path}, got: {' '.join(str(error).split())}") from None
    for name in ("seed", "start"):
        if isinstance(values, dict) and name in values:
            raise ValueError(f"settings: expected neither seed nor start, which dex compare sets, got {name} in {path}")
    return recipe.from_dict({} if values is None else values, base, str(path))


def _data(given: str | None, task: str, count: int) -> Path | None:
    """Data folder of a task: the sub-folder of the task's name if there is one, else ``given`` itself."""
    if given is None:
        return None
    root = folder_argument("data", given)
    inside = root / Path(task).stem
    if inside.is_dir():
        return inside
    if count > 1:
        raise ValueError(f"data: expected a sub-folder for each task; there is no folder {inside}")
    return root


def _parser() -> Parser:
    parser = Parser(
        prog="dex compare",
        description="Fine-tune two pretrained runs on every task with the same seeds, splits and settings, and say on "
        "how many tasks one is better: differences paired by patient and seed, with intervals, and a verdict in one "
        "sentence. Warns if the runs differ in compute or the sample is too small for a verdict. After a kill or a "
        "stop, the same command resumes.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by a signal and resumable.",
    )
    parser.add_argument(
        "a", metavar="A", help="first run folder, checkpoint, or folder written by dex export; for example a DEX"
    )
    parser.add_argument("b", metavar="B", help="second run; for example a monolithic control of equal compute")
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="names from dex tasks, YAML files or your own folders"
    )
    parser.add_argument(
        "--out", required=True, metavar="OUT", help="folder for the sheet, the fine-tuned models and the report"
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="data of the task, or a folder with one sub-folder per task (default: $DEX_TASKS/TASK)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="seeds of fine-tuning")
    parser.add_argument("--preset", default="paper", metavar="NAME", help="base settings: paper or cpu")
    parser.add_argument("--settings", metavar="FILE", help="YAML file with settings of dex finetune that replace them")
    parser.add_argument(
        "--discard", action="store_true", help="remove the checkpoints of each fine-tuned model after its evaluation"
    )
    return parser
