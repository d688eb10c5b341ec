"""`dex compare`: two pretrained runs on tasks, fine-tuned alike and compared by patient and seed."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dex.cli._console import Parser, check_folder, failed, folder_argument, require_one_process
from dex.common import exits

if TYPE_CHECKING:
    from dex.tasks.compare import Compared, Prepared, Side
    from dex.tasks.recipe import Settings

HELP = "two pretrained runs on tasks: fine-tuned alike, paired by patient and seed, with a verdict"
POSITION = 49
NEEDS = "train,data,adapt"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    require_one_process("dex compare")
    out = folder_argument("out", options.out)
    check_folder(out)

    from dex.report import task_verdict_page
    from dex.tasks import cases, compare, recipe

    settings = recipe.preset(options.preset)
    if options.settings is not None:
        settings = _settings(folder_argument("settings", options.settings), settings)
    recipe.check(settings)
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"seeds: expected each once; got {' '.join(map(str, options.seeds))}")
    a, b = compare.sides(folder_argument("A", options.a), folder_argument("B", options.b))
    private = out.with_name(f"{out.name}.private")
    prepared = []
    for name in options.tasks:
        data = cases.open_task(name, _data(options.data, name, len(options.tasks)), private=private)
        prepared.append(compare.prepared(data))
    names = [one.data.task.name for one in prepared]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks: expected each once; got {', '.join(names)}")
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
        for one in results:
            print(f"{one.task}: {one.difference.sentence(a.name, b.name)}")
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
    both = []
    for one in sides:
        made = [compare.settings_of(one, settings, seed) for seed in options.seeds]
        given = {"leak": leaks[one.name], "discard": options.discard, "say": _say}
        both.append([compare.outcome(one, task, of_seed, out, **given) for of_seed in made])
    return compare.compared(task.data.task.name, *both, leaks)


def _say(text: str) -> None:
    print(f"dex compare: {text}", file=sys.stderr, flush=True)


def _stopped(out: Path) -> int:
    _say(f"stopped; {out}: what is written stays; the same command goes on")
    return exits.PREEMPTED


def _settings(path: Path, base: "Settings") -> "Settings":
    import yaml

    from dex.tasks import recipe

    if not path.is_file():
        raise FileNotFoundError(f"settings: expected a YAML file; nothing at {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"settings: expected YAML in {path}; {' '.join(str(error).split())}") from None
    for name in ("seed", "start"):
        if isinstance(values, dict) and name in values:
            raise ValueError(f"settings: expected none of seed and start, which dex compare sets; {path} has {name}")
    return recipe.from_dict({} if values is None else values, base, str(path))


def _data(given: str | None, task: str, count: int) -> Path | None:
    """The folder of a task's data: one folder for one task, or the folder that holds one for each, by its name."""
    if given is None:
        return None
    root = folder_argument("data", given)
    inside = root / Path(task).stem
    if inside.is_dir():
        return inside
    if count > 1:
        raise ValueError(f"data: expected a folder {inside.name} for each of several tasks; nothing at {inside}")
    return root


def _parser() -> Parser:
    parser = Parser(
        prog="dex compare",
        description="Fine-tunes two pretrained runs on every task with the same seeds, splits and settings, and says "
        "on how many tasks one is better: a difference paired by patient and seed, with its interval, and a verdict in "
        "a sentence. Says when the runs are not of equal compute, and when the sample is too small for a verdict. "
        "Killed or stopped, the same command goes on with what is missing.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by a signal and resumable.",
    )
    parser.add_argument("a", metavar="A", help="run folder, checkpoint, or what dex export wrote: a DEX, say")
    parser.add_argument("b", metavar="B", help="the other one: a monolithic control of equal compute, say")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="names of dex tasks, YAML files, or folders of one's own",
    )
    parser.add_argument("--out", required=True, metavar="OUT", help="folder of sheet, fine-tuned models and report")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help=f"data of the task, or a folder that holds one folder per task ({os.sep.join(('$DEX_TASKS', 'TASK'))})",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of fine-tuning (0 1 2)")
    parser.add_argument(
        "--preset", default="paper", metavar="NAME", help="settings to begin with: paper or cpu (paper)"
    )
    parser.add_argument("--settings", metavar="FILE", help="YAML file with settings of dex finetune that differ")
    parser.add_argument(
        "--discard", action="store_true", help="remove the checkpoints of each fine-tuning once it is evaluated"
    )
    return parser
