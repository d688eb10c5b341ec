"""``dex pretrain``: build the configuration from preset, YAML file and command line, then run it."""

import argparse
import dataclasses
import datetime
import errno
import itertools
import re
import types
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dex.cli._console import Parser, either, failed, folder_argument, names_all
from dex.common import exits
from dex.common.folders import INIT, check_folder, require

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
_SHOWN = "demo"
"""The preset whose values the help shows if the command line names none."""
_ESSENTIALS = (
    *("preset", "config", "data", "out", "steps", "init", "resume", "overwrite", "dry_run"),
    *("model.img_size", "model.embed_dim", "model.depth", "model.num_heads", "model.num_experts", "model.top_k"),
    *("data.batch_size", "optim.base_lr"),
    *("parallel.micro_batch", "run.seed", "run.device", "run.precision", "run.checkpoint_every"),
)
"""The options in the short help."""
_METAVARS = {"data.path": "DIR", "model.init": "PATH"}


class _Request(NamedTuple):
    config: "Config"
    overwrite: bool
    dry_run: bool
    override: "Override | None"


def run(arguments: list[str]) -> Callable[[], int]:
    from dex.config import PRESETS, preset

    first = _first_options(arguments)
    _check_contradictions(arguments)
    resume, out = _resume_target(first.resume, first.out)
    base = base_config(first.preset, first.config, out if resume else None)
    if base is None and not {"-h", "--help", "--help-all"} & set(arguments):
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, or --config FILE, got neither")
    whose = " and ".join(str(place) for place in (first.preset, first.config, first.resume) if place)
    request = _parse(arguments, base or preset(_SHOWN), whose or f"--preset {_SHOWN}")
    if out is None:
        name = first.preset or (Path(first.config).stem if first.config else "pretrain")
        out = Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"

    _check_early(request.config, out)

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


def _check_early(config: "Config", out: Path) -> None:
    """Errors of ``dex.train.plan.plan`` that need no torch, so that a wrong value or path is answered at once."""
    from dex.config import check
    from dex.data.opening import locate

    check(config)
    check_folder(out)
    locate(config.data.path, "data.path")
    if config.model.init is not None:
        require(Path(config.model.init).expanduser(), INIT)


def _parse(arguments: list[str], base: "Config", whose: str) -> _Request:
    """``base``, the values of ``whose``, with those of the command line. SystemExit after the help."""
    from dex.common.fields import from_texts
    from dex.config import Config, field_kind

    hyphens = [_with_hyphens(word) for word in arguments]
    options = vars(_parser(base, whose, "--help-all" not in arguments).parse_args(hyphens))
    values: dict[str, dict[str, Any]] = {}
    for name, given in options.items():
        section, dot, last = _SHORT.get(name, name).partition(".")
        if dot and given is not None:
            kind = field_kind(Config, f"{section}.{last}")
            value = given if kind is bool else from_texts(given if isinstance(given, list) else [given], kind, name)
            values.setdefault(section, {})[last] = value
    config = replace(base, **{name: replace(getattr(base, name), **changes) for name, changes in values.items()})
    override = _override(tuple(options["override"]), options["reason"])
    return _Request(config, options["overwrite"], options["dry_run"], override)


def _with_hyphens(word: str) -> str:
    """An option that is written with underscores, as in YAML, with hyphens."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _parser(base: "Config", whose: str, brief: bool) -> Parser:
    length = "" if base.schedule.steps is None else f" (default: {base.schedule.steps})"
    parser = Parser(
        prog="dex pretrain",
        essentials=(*_ESSENTIALS, *(() if length else ("schedule.epochs",))),
        allow_abbrev=False,
        description="Pretrain a DEX vision transformer as a masked autoencoder. The command line overrides the YAML "
        f"file, which overrides the preset. The defaults shown are those of {whose}.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 stopped by three non-finite steps in a row, 75 "
        "stopped by a signal, saved and resumable, 130 interrupted at once.",
    )
    _add_run_options(parser, length)
    group = parser.add_argument_group("fields of the configuration")
    for section in dataclasses.fields(base):
        values = getattr(base, section.name)
        if not brief:
            group = parser.add_argument_group(section.name, " ".join((type(values).__doc__ or "").split()))
        _add_section(group, section.name, values, brief)
    return parser


def _add_run_options(parser: Parser, length: str) -> None:
    """The options that are no fields, and the short names of fields. length: the default of ``--steps``, in words."""
    add = parser.add_argument
    add(
        "--preset",
        metavar="NAME",
        help="base configuration: demo (minutes on a CPU), demo-monolithic, published-code or paper",
    )
    add("--config", metavar="FILE", help="YAML file with some or all fields, as in the config.yaml of a run")
    add(
        "--data",
        metavar="DIR",
        help="folder of images or shard set; by default the small set in the package",
    )
    add("--out", metavar="DIR", help="run folder; by default runs/NAME-DATE")
    add("--steps", metavar="NUMBER", help=f"length of the run in steps{length}")
    add(
        "--init",
        metavar="PATH",
        help="weights to start from: a file of MAE, timm, Hugging Face or published DEX, or a run",
    )
    add(
        "--resume",
        metavar="PATH",
        help="auto resumes from the newest good checkpoint in --out; or give a run folder or one of its checkpoints",
    )
    add(
        "--overwrite",
        action="store_true",
        help="start over in a folder that has a run; the old files are removed after the first step of the new run",
    )
    add(
        "--dry-run",
        action="store_true",
        help="check everything, print the configuration, its memory and its estimated time on GPUs, and write nothing",
    )
    add(
        "--override",
        nargs="*",
        default=[],
        metavar="FIELD",
        help="fields whose values may change when the run is resumed; needs --reason",
    )
    add("--reason", metavar="TEXT", help="why the fields of --override change; stored with the run")


def _add_section(group: argparse._ArgumentGroup, section: str, values: Any, brief: bool) -> None:
    """The options of one section of the configuration. They keep the words of the command line; others are absent.

    brief: the help of each is its first clause.
    """
    from dex.common.fields import docstrings
    from dex.config import field_kind

    for name, text in docstrings(type(values)).items():
        kind, default, written = field_kind(type(values), name), getattr(values, name), name.replace("_", "-")
        notes = [] if default is None else [f"default: {_shown(default)}"]
        text = text.replace("``", "`").removesuffix(".").replace("%", "%%")
        if brief:
            text = re.split("[;:.] ", text)[0]
        form: dict[str, Any] = {"dest": f"{section}.{name}", "default": argparse.SUPPRESS}
        if kind is bool:
            switches = (f"--{section}.{written}", f"--{section}.no-{written}")
            group.add_argument(*switches, action=_Switch, nargs=0, help=f"{text} ({notes[0]})", **form)
            continue
        if typing.get_origin(kind) is typing.Literal:
            form |= {
                "choices": [str(choice) for choice in typing.get_args(kind)],
                "metavar": name.split("_")[-1].upper(),
            }
            notes = notes if names_all(text, form["choices"]) else [either(form["choices"]), *notes]
        else:
            form |= _words(kind) | ({"metavar": _METAVARS[form["dest"]]} if form["dest"] in _METAVARS else {})
        group.add_argument(f"--{section}.{written}", help=text + (f" ({'; '.join(notes)})" if notes else ""), **form)


def _words(kind: Any) -> dict[str, Any]:
    """How the values of a field with this annotation are written: ``metavar`` and, for several words, ``nargs``."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    lists = [k for k in kinds if typing.get_origin(k) is tuple]
    if not lists:
        return {"metavar": "NUMBER" if {int, float} & set(kinds) else "NAME"}
    return {"metavar": "NUMBER NUMBER" if kind is lists[0] else "NUMBER", "nargs": "*"}


class _Switch(argparse.Action):
    """``--section.field`` is True, ``--section.no-field`` False."""

    def __call__(self, parser: Any, options: Any, values: Any, option: str | None = None) -> None:
        setattr(options, self.dest, not (option or "").partition(".")[2].startswith("no-"))


def _shown(value: Any) -> str:
    """A value as one would write it on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return (
        " ".join(map(_shown, value))
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


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


def base_config(preset: str | None, file: str | None, resumed: Path | None) -> "Config | None":
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
