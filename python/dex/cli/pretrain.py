"""``dex pretrain``: build the configuration from preset, YAML file and command line, then run it."""

import argparse
import contextlib
import datetime
import errno
import io
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from dex.cli._console import Parser, failed, folder_argument
from dex.common import exits

if TYPE_CHECKING:
    from dex.config import Config
    from dex.train.continuation import Override
    from dex.train.plan import Plan

HELP = "pretrain a DEX vision transformer as a masked autoencoder"
POSITION = 30
NEEDS = "train"
_SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EMFILE, errno.ENFILE)
"""Errors of disks and file servers: reported on one line, since a traceback adds nothing."""
_SHORT = {"data": "data.path", "init": "model.init", "steps": "schedule.steps"}
"""Short options and the fields they set."""


class _Request(NamedTuple):
    config: "Config"
    overwrite: bool
    dry_run: bool
    override: "Override | None"


def run(arguments: list[str]) -> Callable[[], int]:
    from dex.config import PRESETS, Config

    first = _first_options(arguments)
    _check_contradictions(arguments)
    resume, out = _resume_target(first.resume, first.out)
    base = _base_config(first.preset, first.config, out if resume else None)
    if base is None and not {"-h", "--help"} & set(arguments):
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, or --config FILE, got neither")
    request = _parse(arguments, base or Config())
    if request is None:
        return lambda: exits.DONE
    if out is None:
        name = first.preset or (Path(first.config).stem if first.config else "pretrain")
        out = Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"

    from dex.data import CorruptDataError
    from dex.train.plan import plan
    from dex.train.run import prepare
    from dex.train.runlog import FolderGone

    if request.dry_run:
        print(_describe(plan(request.config, out, resume, overwrite=request.overwrite, override=request.override)))
        return lambda: exits.DONE
    command = ["dex", "pretrain", *arguments]
    try:
        training = prepare(
            request.config, out, resume=resume, overwrite=request.overwrite, command=command, override=request.override
        )
    except exits.Stopped:
        return lambda: exits.PREEMPTED

    def carry_out() -> int:
        try:
            return training.run()
        except (CorruptDataError, FolderGone) as error:
            return failed("dex pretrain", error)
        except OSError as error:
            if error.errno not in _SYSTEM_ERRORS:
                raise
            return failed("dex pretrain", error)

    return carry_out


def _parse(arguments: list[str], base: "Config") -> _Request | None:
    """``base`` with the values of the command line; None after --help."""
    import tyro

    from dex.config import Config

    def named(metavar: str) -> Any:
        return tyro.conf.arg(metavar=metavar)

    @dataclass(frozen=True)
    class Pretrain:
        """Pretrain a DEX vision transformer as a masked autoencoder.

        The command line overrides the YAML file, which overrides the preset. Exit codes: 0 done, 1 failed, 2 wrong
        usage or input, 3 stopped by three non-finite steps in a row, 75 stopped by a signal, saved and resumable, 130
        interrupted at once.
        """

        preset: Annotated[str | None, named("NAME")] = None
        """Base configuration: demo, demo-monolithic, published-code or paper."""
        config: Annotated[str | None, named("FILE")] = None
        """YAML file with some or all of the fields below."""
        data: Annotated[str | None, named("DIR")] = None
        """Folder of images or shard set; by default the small set in the package. Same as --data.path."""
        out: Annotated[str | None, named("DIR")] = None
        """Run folder; by default runs/NAME-DATE."""
        init: Annotated[str | None, named("PATH")] = None
        """Weights to start from: a file of MAE, timm, Hugging Face or published DEX, or a run. Same as --model.init."""
        steps: Annotated[int | None, named("NUMBER")] = None
        """Length of the run in steps. Same as --schedule.steps."""
        resume: Annotated[str | None, named("auto|DIR")] = None
        """auto resumes from the newest good checkpoint in --out; or give a run folder or one of its checkpoints."""
        overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Start over in a folder that has a run; the old files are removed after the first step of the new run."""
        override: Annotated[tuple[str, ...], named("FIELD ...")] = ()
        """Fields whose values may change when the run is resumed; needs --reason."""
        reason: Annotated[str | None, named("TEXT")] = None
        """Why the fields of --override change; stored with the run."""
        dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Check everything, print the configuration and what would run, and write nothing."""
        fields: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=lambda: base)

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(Pretrain, prog="dex pretrain", args=arguments, default=Pretrain())
    except SystemExit as error:
        if not error.code:  # --help
            return None
        raise ValueError(_complaint(_one_line(complaint.getvalue()), arguments, Pretrain)) from None
    config = parsed.fields
    for short, full in _SHORT.items():
        value = getattr(parsed, short)
        if value is not None:
            section, name = full.split(".")
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return _Request(config, parsed.overwrite, parsed.dry_run, _override(parsed.override, parsed.reason))


def _override(fields: tuple[str, ...], reason: str | None) -> "Override | None":
    from dex.train.continuation import Override

    if reason is not None and not fields:
        raise ValueError("override: expected the fields to which --reason applies, got none")
    return Override(tuple(name.strip("-").replace("-", "_") for name in fields), reason or "") if fields else None


def _first_options(arguments: list[str]) -> argparse.Namespace:
    """The options that select the configuration which all other options override."""
    parser = Parser(add_help=False, allow_abbrev=False)
    for name in ("preset", "config", "out", "resume"):
        parser.add_argument(f"--{name}")
    return parser.parse_known_args(arguments)[0]


class _Given(NamedTuple):
    option: str
    value: str
    text: str
    """As written on the command line."""


def _check_contradictions(arguments: list[str]) -> None:
    """ValueError: an option, or an option and its short name, has two different values."""
    seen: dict[str, _Given] = {}
    for place, word in enumerate(arguments):
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        values = itertools.takewhile(lambda word: not word.startswith("--"), arguments[place + 1 :])
        given = _Given(name.replace("-", "_"), value if equals else " ".join(values), word)
        if not equals:
            given = given._replace(text=f"{word} {given.value}".strip())
        section, dot, last = given.option.rpartition(".")
        if last.startswith("no_"):  # A switch that is turned off
            given = given._replace(option=f"{section}{dot}{last[3:]}", value="no")
        before = seen.setdefault(_SHORT.get(given.option, given.option), given)
        if given.value == before.value:
            continue
        if given.option == before.option:
            raise ValueError(f"{given.option}: expected one value, got {before.text} and {given.text}")
        short, full = sorted((given, before), key=lambda g: len(g.option))
        raise ValueError(
            f"{short.option}: expected one value for --{short.option} and --{full.option}, which are the same, "
            f"got {short.value} and {full.value}"
        )


def _resume_target(resume: str | None, out: str | None) -> tuple[str | Path | None, Path | None]:
    """Arguments ``resume`` and ``out`` of ``dex.train.run.pretrain``."""
    folder = folder_argument("out", out) if out is not None else None
    if resume is None:
        return None, folder
    if resume == "auto":
        if folder is None:
            raise ValueError("resume: expected the run folder as --out with --resume auto, got none")
        return "auto", folder
    path = folder_argument("resume", resume)
    if not path.is_dir():
        raise FileNotFoundError(f"resume: expected auto, a run folder or a checkpoint folder; there is none at {path}")
    is_run = (path / "config.yaml").is_file()
    run = path if is_run else path.resolve().parent.parent
    if not is_run and not (run / "config.yaml").is_file():
        raise ValueError(f"resume: expected auto, a run folder or a checkpoint folder in one, got {path}")
    if folder is not None and folder.resolve() != run.resolve():
        raise ValueError(f"out: expected the resumed run, {run}, got {folder}")
    return ("auto" if is_run else path), run


def _base_config(preset: str | None, file: str | None, resumed: Path | None) -> "Config | None":
    from dex import config as configuration

    base = configuration.preset(preset) if preset is not None else None
    if file is not None:
        return configuration.read_yaml(file, base or configuration.preset("published-code"))
    if base is not None or resumed is None:
        return base
    from dex.train.runlog import RunLog

    log = RunLog(resumed)
    if log.holds_run():
        base = log.config()
        return replace(base, run=replace(base.run, stop_at=None))  # It applied to an earlier start
    return base


def _describe(plan: "Plan") -> str:
    """The configuration as YAML, followed by what would run as comments."""
    from dex.common.ranks import announced
    from dex.config import to_yaml
    from dex.sizing import scaling
    from dex.sizing.estimate import describe, estimate
    from dex.train import cuda_graph

    config, dataset = plan.config, plan.dataset
    estimated = estimate(config, plan.steps)
    lines = [
        f"data: {dataset.name}, {len(plan.train):,} training and {len(plan.held_out):,} held-out images",
        *(f"  {name}: {count:,}" for name, count in dataset.modality_counts().items()),
        f"{plan.batches_per_epoch:,} steps per epoch, {plan.steps:,} steps, "
        f"{plan.steps / plan.batches_per_epoch:.1f} epochs",
        f"peak learning rate {config.peak_lr:.3g}; {plan.device.type}, {plan.precision}",
        *describe(estimated),
    ]
    work = scaling.workload(config, len(dataset.modalities), estimated)
    for ranks in sorted({1, 8, announced().world_size}):
        lines += scaling.describe(work, ranks)
    if config.parallel.cuda_graph:
        lines.append(f"parallel.cuda_graph: each step replays one graph; {cuda_graph.STATUS}")
    lines += plan.notes
    if plan.saved:
        lines.append(f"resumes from {plan.saved.folder.name} after {plan.saved.state['step']:,} steps")
    return to_yaml(config) + "\n".join(f"# {line}" for line in lines)


def _complaint(text: str, arguments: list[str], kind: type) -> str:
    """tyro's error ``text``, reworded like the errors of ``dex.config.check`` if it concerns a field of ``kind``."""
    from dex.common.fields import words
    from dex.config import field_kind

    arguments = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    options = [word for word in arguments if word.startswith("--")]
    if text.startswith("Unrecognized options:"):
        for before, word in itertools.pairwise(arguments):
            is_switch = before in options and field_kind(kind, before.strip("-")) is bool
            if is_switch and word.lower() in ("true", "false", "yes", "no", "on", "off", "0", "1"):
                return f"{before.strip('-').replace('-', '_')}: expected a switch without a value, got {word}"
        return text
    option = next((word for word in options if re.search(rf"{re.escape(word)}(?![\w.-])", text)), None)
    expected = None if option is None else field_kind(kind, option.strip("-"))
    if expected is None:
        return text
    values = itertools.takewhile(lambda word: not word.startswith("--"), arguments[arguments.index(option) + 1 :])
    return f"{option.strip('-').replace('-', '_')}: expected {words(expected)}, got {' '.join(values) or 'nothing'}"


def _one_line(box: str) -> str:
    """First paragraph of the error box that tyro prints, and the options it suggests."""

    def is_rule(line: str) -> bool:
        return set(line) <= set("\u2500\u2570\u256f-+")

    lines = [line.strip("\u2502| ") for line in box.splitlines()]
    # The title is in the upper edge of the box; without Unicode it is a line above a rule.
    title = next((i for i, line in enumerate(lines) if line and not is_rule(line)), 0)
    first = title + 1 if lines[title].startswith("\u256d") else title + 2
    end = next((i for i, line in enumerate(lines) if i >= first and is_rule(line)), len(lines))
    text = " ".join(lines[first:end])
    if "Perhaps you meant" in box:
        options = [line.split()[0].rstrip(",") for line in lines[end:] if line.startswith("--") and not is_rule(line)]
        text += f"; did you mean {' or '.join(options)}?"
    return text
