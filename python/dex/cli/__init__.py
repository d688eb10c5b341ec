"""The `dex` command. Each subcommand is one function that checks its input and returns what is then to be done.

Exit codes: 0 done; 1 failed, or `doctor` found that pretraining cannot run; 2 wrong usage or input, one line on stderr;
3 stopped by non-finite steps; 75 preempted by a signal and resumable; 130 interrupted at once.
"""

import argparse
import contextlib
import datetime
import errno
import io
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

if TYPE_CHECKING:
    from dex.train.run import Plan

EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 75, 130

_HELP = """usage: dex COMMAND [options]

Pretraining with Director-Experts networks.

commands:
  prepare    raw scans, pictures and videos to shards and a data card
  data       check a shard set's hashes; find images that two sets share
  pretrain   masked-autoencoder pretraining of a DEX vision transformer
  report     one HTML page about a run, or about several compared
  doctor     what works on this machine, what does not, and why

options:
  -h, --help   this help; `dex COMMAND --help` for a command's own
  --version    version of the installed package
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; wrong usage or input is one line on stderr and exit code 2, never a traceback.

    Whatever goes wrong once the input is accepted is no usage error and is raised, so that the process ends with 1.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"dex, from dexkernels {version('dexkernels')}")
        return 0
    commands = {"prepare": _prepare, "data": _data, "pretrain": _pretrain, "report": _report, "doctor": _doctor}
    name, *rest = arguments
    if name not in commands:
        return _usage("dex", f"command: expected one of {', '.join(commands)}; got {name!r}")
    try:
        try:
            carry_out = commands[name](rest)
        except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            return _usage(f"dex {name}", str(error))
        except ModuleNotFoundError as error:
            extra = "data" if name in ("prepare", "data") else "train"
            needs = f"pip install -e '.[{extra}]' in the clone brings what the command needs"
            return _usage(f"dex {name}", f"{error}; {needs}")
        except OSError as error:
            return _failed(f"dex {name}", error)
        except SystemExit as error:  # argparse's --help
            return int(error.code or 0)
        return carry_out()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _pretrain(arguments: list[str]) -> Callable[[], int]:
    import tyro

    from dex import config as configuration

    first = _start_options(arguments)
    resume, out = _resume_target(first.resume, first.out)
    base = _base_config(first.preset, first.config, out if resume else None)
    if base is None and not {"-h", "--help"} & set(arguments):
        raise ValueError(f"preset: expected one of {', '.join(configuration.PRESETS)}, or --config FILE; got neither")
    base = base or configuration.Config()

    @dataclass(frozen=True)
    class Pretrain:
        """Masked-autoencoder pretraining of a DEX vision transformer.

        The command line overrides the YAML file, and that the preset. Exit codes: 0 done, 1 failed, 2 wrong usage or
        input, 3 stopped by three non-finite steps in a row, 75 stopped by SIGTERM or SIGINT, saved and resumable, 130
        interrupted at once.
        """

        preset: str | None = None
        """demo, demo-monolithic, published-code or paper."""
        config: str | None = None
        """YAML file with some or all of the fields below."""
        data: str | None = None
        """Folder of images or shard set; the small set in the package without it. Same as --data.path."""
        out: str | None = None
        """Run folder; runs/NAME-DATE without it."""
        steps: int | None = None
        """Length of the run. Same as --schedule.steps."""
        resume: str | None = None
        """auto: from the newest good checkpoint in --out. Or a run folder, or one of its checkpoint folders."""
        dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Check everything and print the configuration and what would run; write nothing."""
        fields: Annotated[configuration.Config, tyro.conf.arg(name="")] = field(default_factory=lambda: base)

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(Pretrain, prog="dex pretrain", args=arguments, default=Pretrain())
    except SystemExit as error:
        if not error.code:  # --help
            return lambda: 0
        raise ValueError(_one_line(complaint.getvalue())) from None
    config = parsed.fields
    if parsed.data is not None:
        config = replace(config, data=replace(config.data, path=parsed.data))
    if parsed.steps is not None:
        config = replace(config, schedule=replace(config.schedule, steps=parsed.steps))
    if out is None:
        name = first.preset or (Path(first.config).stem if first.config else "pretrain")
        out = Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"

    from dex.data import CorruptDataError
    from dex.train.run import plan, prepare

    if parsed.dry_run:
        print(_describe(plan(config, out, resume)))
        return lambda: 0
    run = prepare(config, out, resume=resume, command=["dex", "pretrain", *arguments])

    def carry_out() -> int:
        try:
            return run.run()
        except CorruptDataError as error:
            return _failed("dex pretrain", error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return _failed("dex pretrain", error)

    return carry_out


def _start_options(arguments: list[str]) -> argparse.Namespace:
    """The options that decide which configuration the others override."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in ("preset", "config", "out", "resume"):
        parser.add_argument(f"--{name}")
    return parser.parse_known_args(arguments)[0]


def _resume_target(resume: str | None, out: str | None) -> tuple[str | Path | None, Path | None]:
    """What `dex.train.run.pretrain` takes as ``resume`` and ``out``."""
    folder = Path(out) if out is not None else None
    if resume is None:
        return None, folder
    if resume == "auto":
        if folder is None:
            raise ValueError("resume: expected --out with the run folder beside --resume auto")
        return "auto", folder
    path = Path(resume)
    if not path.is_dir():
        raise FileNotFoundError(f"resume: expected auto, a run folder or a checkpoint folder; nothing at {path}")
    is_run = (path / "config.yaml").is_file()
    run = path if is_run else path.resolve().parent.parent
    if not is_run and not (run / "config.yaml").is_file():
        raise ValueError(f"resume: expected auto, a run folder or a checkpoint folder in one; got {path}")
    if folder is not None and folder.resolve() != run.resolve():
        raise ValueError(f"out: expected the run that is resumed, {run}; got {folder}")
    return ("auto" if is_run else path), run


def _base_config(preset: str | None, file: str | None, resumed: Path | None) -> Any:
    from dex import config as configuration

    base = configuration.preset(preset) if preset is not None else None
    if file is not None:
        return configuration.read_yaml(file, base or configuration.preset("published-code"))
    if base is None and resumed is not None and (resumed / "config.yaml").is_file():
        base = configuration.read_yaml(resumed / "config.yaml", configuration.Config())
        return replace(base, run=replace(base.run, stop_at=None))  # where an earlier start was to stop
    return base


def _describe(plan: "Plan") -> str:
    """The configuration as YAML, and what would run as comments below it."""
    from dex.common.ranks import announced
    from dex.config import to_yaml
    from dex.sizing import scaling
    from dex.sizing.estimate import describe, estimate
    from dex.train import cuda_graph

    config, dataset = plan.config, plan.dataset
    found = estimate(config, plan.steps)
    train, held_out = dataset.split("train"), dataset.split("val")
    lines = [
        f"data: {dataset.name}, {len(train):,} training and {len(held_out):,} held-out images",
        *(f"  {name}: {count:,}" for name, count in dataset.modality_counts().items()),
        f"{plan.batches_per_epoch:,} steps per epoch, {plan.steps:,} steps, "
        f"{plan.steps / plan.batches_per_epoch:.1f} epochs",
        f"peak learning rate {config.peak_lr:.3g}; {plan.device.type}, {plan.precision}",
        *describe(found),
    ]
    work = scaling.workload(config, len(dataset.modalities), found)
    for ranks in sorted({1, 8, announced().world_size}):
        lines += scaling.describe(work, ranks)
    if config.parallel.cuda_graph:
        lines.append(f"parallel.cuda_graph: each step is the replay of one graph; {cuda_graph.STATUS}")
    lines += plan.notes
    if plan.saved:
        lines.append(f"resumes from {plan.saved.folder.name}, {plan.saved.state['step']:,} steps done")
    return to_yaml(config) + "\n".join(f"# {line}" for line in lines)


def _prepare(arguments: list[str]) -> Callable[[], int]:
    parser = _Parser(
        prog="dex prepare",
        description="Raw scans, pictures and videos to normalised images in shards, with a data card. Killed or "
        "stopped, the same command goes on where it was and ends in the same bytes.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by SIGTERM or SIGINT and resumable.",
    )
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="a folder (with --modality), a description (YAML), a shipped source's name, or 'packages': all sources "
        "that come with public packages",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the set; DIR.private beside it holds what is not")
    parser.add_argument("--modality", metavar="M", help="of a folder: CT, MR, PET, X-ray, ultrasound, fundus, ...")
    parser.add_argument("--root", metavar="DIR", help="where the files of a shipped source or description lie")
    parser.add_argument("--files", nargs="+", metavar="GLOB", help="which files below it, such as '**/*.nii.gz'")
    parser.add_argument("--size", type=int, default=256, help="pixels a side (256)")
    parser.add_argument("--bits", type=int, default=8, choices=(8, 16), help="of grey images (8)")
    parser.add_argument("--encoding", choices=("jpg", "png"), help="jpg for 8 bits, png for 16 without it")
    parser.add_argument(
        "--planes", nargs="+", choices=("axial", "coronal", "sagittal", "stored"), help="of volumes (axial)"
    )
    parser.add_argument("--frame-stride", type=int, metavar="N", help="one frame in N of videos and multi-frame files")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; one for each processor without it")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="part I of N, 0 <= I < N, for N machines")
    parser.add_argument("--cache", metavar="DIR", help="where packages are kept (~/.cache/dex)")
    parser.add_argument(
        "--max-unreadable", type=int, metavar="N", help="stop above N broken files; 10 or 0.1 %% of all without it"
    )
    parser.add_argument("--allow-burned-in", action="store_true", help="take images that declare burned-in annotation")
    options = parser.parse_args(arguments)

    from dex.prepare import run as prepare
    from dex.prepare import summary
    from dex.prepare.chunks import Settings

    settings = Settings(
        size=options.size,
        bits=options.bits,
        encoding=options.encoding or ("jpg" if options.bits == 8 else "png"),
        allow_burned_in=options.allow_burned_in,
    )
    wanted = prepare.Options(
        out=_folder_argument("out", options.out),
        settings=settings,
        workers=options.workers if options.workers is not None else len(os.sched_getaffinity(0)),
        shard=_shard(options.shard),
        cache=_folder_argument("cache", options.cache) if options.cache is not None else prepare.CACHE,
        max_unreadable=options.max_unreadable,
    )
    sources = _sources(options)
    prepare.check(sources, wanted)
    again = f"{wanted.out}: what is done is kept; the same command goes on"
    try:
        with prepare.stop_signals():
            run = prepare.prepare(sources, wanted)
    except prepare.Stopped as error:
        stopped = f"dex prepare: stopped by {error}"
        return lambda: _stopped(stopped, again)
    except prepare.Failed as error:
        failed = error
        return lambda: _failed("dex prepare", failed)

    def carry_out() -> int:
        try:
            with prepare.stop_signals():
                facts = run.run(summary.Progress())
        except prepare.Stopped as error:
            return _stopped(f"dex prepare: stopped by {error}", again)
        except prepare.Failed as error:
            return _failed("dex prepare", error)
        if facts is not None:
            print(f"\n{summary.table(facts)}\n")
            for note in summary.notes(facts):
                print(f"note: {note}")
            if any(source["refused"] for source in facts["sources"]):
                private = shlex.quote(str(prepare.private_folder(wanted.out)))
                print(f"refused: why in {private}/{prepare.LOG}, which files in {private}/ids")
            out = shlex.quote(str(wanted.out))
            print(f"shards: {out}\ncard:   {out}/card.html\nnext:   dex pretrain --preset demo --data {out}")
        return 0

    return carry_out


def _sources(options: argparse.Namespace) -> list[Any]:
    from dex.prepare.sources import resolve

    overrides = {
        "modality": options.modality,
        "root": options.root,
        "files": tuple(options.files) if options.files else None,
        "planes": tuple(options.planes) if options.planes else None,
        "frame_stride": options.frame_stride,
    }
    if len(options.source) > 1 and (options.root or options.files):
        raise ValueError(f"root, files: expected one SOURCE beside them; got {len(options.source)}")
    sources: list[Any] = []
    folders = 0
    for argument in options.source:
        given = {name: value for name, value in overrides.items() if value is not None}
        if Path(argument).expanduser().is_dir():
            folders += 1
            given |= {"name": f"folder-{folders}"} if folders > 1 else {}
        elif folders or len(options.source) > 1:
            given.pop("modality", None)  # of the folders beside it
        sources += resolve(argument, **given)
    return sources


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal()):
        raise ValueError(f"shard: expected I/N, such as 0/4; got {text!r}")
    return int(part), int(parts)


def _folder_argument(name: str, text: str) -> Path:
    if not text.strip():
        raise ValueError(f"{name}: expected a folder; got {text!r}")
    return Path(text)


def _stopped(*lines: str) -> int:
    print("\n".join(lines), file=sys.stderr)
    return EXIT_PREEMPTED


def _data(arguments: list[str]) -> Callable[[], int]:
    parser = _Parser(prog="dex data", description="Look at data sets that exist.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    check = commands.add_parser(
        "check",
        help="verify every hash of a shard set",
        description="Read every byte of a shard set and name what is not as it was written. Exit code 1 for any.",
    )
    check.add_argument("dir", metavar="DIR")
    leak = commands.add_parser(
        "leak",
        help="images that two sets share",
        description="Exact and near duplicates between two data sets (shard sets or folders), as a batch would get "
        "them. Exit code 1 when there are any.",
    )
    leak.add_argument("a", metavar="A", help="what is trained on")
    leak.add_argument("b", metavar="B", help="what is tested on")
    options = parser.parse_args(arguments)
    if options.command == "check":
        from dex.data.shards import MANIFEST, read_manifest, verify

        folder = _folder_argument("DIR", options.dir)
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"DIR: expected a shard set; {folder} holds no {MANIFEST}")

        def carry_out() -> int:
            problems = verify(folder)
            for problem in problems:
                print(problem)
            if not problems:
                manifest, _ = read_manifest(folder)
                print(f"{manifest['samples']:,} images in {len(manifest['shards']):,} shards: every hash fits")
            return EXIT_FAILED if problems else 0

        return carry_out
    for name in ("a", "b"):
        folder = _folder_argument(name.upper(), getattr(options, name))
        if not folder.is_dir():
            raise ValueError(f"{name.upper()}: expected a shard set or a folder of images; {folder} is no folder")

    def compare() -> int:
        from dex.prepare.leak import leak

        try:
            found = leak(options.a, options.b, workers=len(os.sched_getaffinity(0)))
        except (ValueError, OSError) as error:
            return _failed("dex data leak", error)
        print(found.to_text())
        return EXIT_FAILED if found.overlap else 0

    return compare


def _doctor(arguments: list[str]) -> Callable[[], int]:
    parser = _Parser(
        prog="dex doctor",
        description="Versions, devices, kernel backends, codecs, disk, data. Exit code 1 when pretraining cannot run.",
    )
    parser.add_argument("--data", help="also check and read this data set instead of the one in the package")
    parser.add_argument("--out", default="runs", help="where runs are to be written; the disk under it is measured")
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.strip():
        raise ValueError(f"data: expected a folder; got {options.data!r}")
    from dex.cli.doctor import doctor

    return lambda: EXIT_FAILED if doctor(options.data, Path(options.out)) else 0


def _report(arguments: list[str]) -> Callable[[], int]:
    parser = _Parser(
        prog="dex report",
        description="One self-contained HTML page about run folders: curves, pictures, events, configuration, machine.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; several are compared")
    parser.add_argument("--out", metavar="FILE", help="RUN/report.html without it; report.html here for several runs")
    options = parser.parse_args(arguments)
    if not all(text.strip() for text in [*options.runs, *([] if options.out is None else [options.out])]):
        raise ValueError("runs, --out: expected paths; got an empty one")
    runs = [Path(run) for run in options.runs]
    out = Path(options.out) if options.out else (runs[0] if len(runs) == 1 else Path()) / "report.html"
    from dex.report.page import report

    written = report(runs, out)  # here, not later: everything that can be wrong is the input

    def carry_out() -> int:
        print(f"{written}, {written.stat().st_size / 1e6:.1f} MB")
        return 0

    return carry_out


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _one_line(box: str) -> str:
    """What tyro says in a box of several lines: its first paragraph, and the options that it thinks were meant."""

    def is_rule(line: str) -> bool:
        return set(line) <= set("\u2500\u2570\u256f-+")

    lines = [line.strip("\u2502| ") for line in box.splitlines()]
    # The title is the box's upper edge; without Unicode it stands alone, above a rule.
    title = next((i for i, line in enumerate(lines) if line and not is_rule(line)), 0)
    first = title + 1 if lines[title].startswith("\u256d") else title + 2
    end = next((i for i, line in enumerate(lines) if i >= first and is_rule(line)), len(lines))
    text = " ".join(lines[first:end])
    if "Perhaps you meant" in box:
        meant = [line.split()[0].rstrip(",") for line in lines[end:] if line.startswith("--") and not is_rule(line)]
        text += f"; perhaps {' or '.join(meant)}"
    return text


def _failed(command: str, error: Exception) -> int:
    print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
    return EXIT_FAILED


def _usage(command: str, message: str) -> int:
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USAGE
