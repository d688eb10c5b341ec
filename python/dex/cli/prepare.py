"""``dex prepare``: turn raw scans, pictures and videos into shards."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dex.cli import _features
from dex.cli._console import Parser, failed, folder_argument
from dex.common import atomic, exits
from dex.common.cores import cores
from dex.common.folders import check_folder

HELP = "turn raw scans, pictures and videos into shards with a card"
POSITION = 10
NEEDS = "data"

_OF_FOLDERS = frozenset(
    ("modality", "normalisation", "routes", "trusted", "slope", "intercept", "val_share", "patient", "split_file")
)
"""Options that apply to folders, but not to catalogue sources given beside them."""

ESSENTIALS = (
    "modality",
    "pattern",
    "normalisation",
    "root",
    "size",
    "planes",
    "val_share",
    "patient",
    "split",
    "workers",
)
"""The options about the files that a short help shows."""


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser("--dry-run" not in arguments).parse_args(arguments)

    from dex.prepare import left_out, summary
    from dex.prepare import run as prepare
    from dex.prepare.discover import Undetermined

    if options.dry_run:
        return dry_run("dex prepare", arguments, options)
    job = dataclasses.replace(
        _reading_options(options),
        out=folder_argument("out", options.out),
        shard=_shard(options.shard),
        max_unreadable=options.max_unreadable,
    )
    sources = _sources(options)
    prepare.check(sources, job)
    resumable = f"finished work stays in {job.out}, and the same command resumes"
    try:
        with prepare.stop_signals():
            preparation = prepare.prepare(sources, job)
    except Undetermined as error:
        lines = [f"dex prepare: {error}", *_commands(["dex", "prepare"], arguments, options, error)]
        return lambda: _wrong(lines)
    except prepare.Stopped as error:
        stopped = f"dex prepare: stopped by {error}"
        return lambda: _stopped(stopped, resumable)
    except prepare.Failed as error:
        message = str(error)
        return lambda: failed("dex prepare", message)

    def carry_out() -> int:
        try:
            with prepare.stop_signals():
                facts = preparation.run(summary.Progress())
        except prepare.Stopped as error:
            return _stopped(f"dex prepare: stopped by {error}", resumable)
        except prepare.Failed as error:
            return failed("dex prepare", error)
        if facts is not None:
            print(f"\n{summary.table(facts)}\n")
            print(*summary.counts(facts), "", sep="\n")
            for note in summary.notes(facts):
                print(f"note: {note}")
            if any(source["refused"] or source["dropped"] for source in facts["sources"]):
                print(f"unused: `dex data refused {shlex.quote(str(job.out))}` lists the files without images, and why")
                page = prepare.private_folder(job.out) / left_out.PAGE
                if page.exists():  # A withdrawal removes it
                    print(f"        {shlex.quote(str(page))} shows some of them")
            out = shlex.quote(str(job.out))
            print(f"shards: {out}\ncard:   {out}/card.html\nnext:   dex pretrain --preset demo --data {out}")
        return exits.DONE

    return carry_out


def dry_run(command: str, arguments: list[str], options: argparse.Namespace, page: Path | None = None) -> Callable:
    """Print what a run with these options would find and keep, and write it to the folder ``page`` if given."""
    from dex.prepare import inventory, inventory_page
    from dex.prepare import run as prepare

    job, sources = _reading_options(options), _sources(options)
    if page is not None:
        check_folder(page)
    elif options.out is not None:
        prepare.check(sources, dataclasses.replace(job, out=folder_argument("out", options.out)))
    prepare.check_settings(sources, job)
    try:
        with prepare.stop_signals():
            taken = inventory.take(
                sources,
                job.settings,
                processes=job.workers,
                cache=job.cache,
                limits=job.limits,
                say=lambda text: print(text, file=sys.stderr),
            )
    except prepare.Stopped as error:
        stopped = f"{command}: stopped by {error}; nothing was written"
        return lambda: _stopped(stopped)
    except prepare.Failed as error:
        message = str(error)
        return lambda: failed(command, message)

    def carry_out() -> int:
        print(inventory_page.to_text(taken))
        if page is not None:
            page.mkdir(parents=True, exist_ok=True)
            html, data = inventory_page.build(taken)
            for name, content in (("inventory.html", html), ("inventory.json", data)):
                atomic.write(page / name, content)
            print(f"page: {page}/inventory.html\njson: {page}/inventory.json")
        undetermined = next((source.undetermined for source in taken if source.undetermined is not None), None)
        if undetermined is not None:
            return _wrong([f"{command}: {undetermined}", *_commands(command.split(), arguments, options, undetermined)])
        return exits.DONE

    return carry_out


def _reading_options(options: argparse.Namespace) -> Any:
    """The ``Options`` of a run as far as they concern reading; ``out`` is not set."""
    from dex.prepare import readers
    from dex.prepare import run as prepare
    from dex.prepare.chunks import Settings

    return prepare.Options(
        out=Path(),
        settings=Settings(
            size=options.size,
            bits=options.bits,
            encoding=options.encoding or ("jpg" if options.bits == 8 else "png"),
            allow_burned_in=options.allow_burned_in,
        ),
        workers=options.workers if options.workers is not None else cores(),
        cache=folder_argument("cache", options.cache) if options.cache is not None else prepare.CACHE,
        limits=readers.Limits.within(options.memory),
    )


def _parser(needs_out: bool) -> Parser:
    parser = Parser(
        prog="dex prepare",
        essentials=("dry_run", *ESSENTIALS),
        description="Turn raw scans, pictures and videos into normalised images in shards, with a data card. After a "
        "kill or a stop, the same command resumes and produces the same bytes.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by SIGTERM or SIGINT and resumable.",
    )
    add_source_options(parser)
    parser.add_argument(
        "--out",
        required=needs_out,
        metavar="DIR",
        help="folder for the set; DIR.private beside it holds paths and other private tables",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read headers and a few pixels, and print what would be kept and left out, how long it would take and how "
        "large the set would be; write nothing (downloads still go into the cache)",
    )
    parser.add_argument(
        "--shard", default="0/1", metavar="I/N", help="prepare part I of N, 0 <= I < N, on one of N machines"
    )
    parser.add_argument(
        "--max-unreadable",
        type=int,
        metavar="FILES",
        help="stop after more broken files than this (default: 10, or 0.1 %% of all files if that is more)",
    )
    return parser


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Options that select the files and say how they are read."""
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="folder, table of files (CSV, JSON lines, Parquet or a list of paths), zip or URL of either, description "
        "(YAML), name of a shipped source, or 'packages' for all sources in public packages, 'embedded' for the "
        "images that come with dex",
    )
    parser.add_argument(
        "--modality",
        metavar="MODALITY",
        help="modality of the files of a folder: auto reads it from each header; from-folders also takes it from the "
        "name of a parent folder if there is no header; CT, MR, PET, X-ray, ultrasound, fundus, ... or your own name "
        "sets it for all files (default: auto)",
    )
    parser.add_argument(
        "--pattern",
        action="append",
        metavar="MODALITY=GLOB",
        help="modality of files without a header, by their paths, such as 'X-ray=chest/**'; may be repeated",
    )
    _features.add_reading(parser)
    parser.add_argument(
        "--trust",
        action="store_true",
        help="treat all files as --modality, whatever their headers say, even label maps",
    )
    parser.add_argument(
        "--root", metavar="DIR", help="folder with the files of a table, a shipped source or a description"
    )
    parser.add_argument(
        "--files", nargs="+", metavar="GLOB", help="take only these files of the folder, such as '**/*.nii.gz'"
    )
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="side of the prepared images")
    parser.add_argument("--bits", type=int, default=8, choices=(8, 16), help="bit depth of grey images")
    parser.add_argument(
        "--encoding", choices=("jpg", "png"), help="encoding of the images (default: jpg for 8 bits, png for 16)"
    )
    parser.add_argument(
        "--planes",
        nargs="+",
        choices=("axial", "coronal", "sagittal", "stored", "auto"),
        help="planes cut from volumes; auto is axial, but stored for thick slices in another plane (default for a "
        "folder: auto)",
    )

    parser.add_argument(
        "--slice-stride", type=int, metavar="SLICES", help="take one of every SLICES slices of each plane of a volume"
    )
    parser.add_argument(
        "--val-share",
        type=float,
        metavar="SHARE",
        help="share of images to hold out, by whole patients (default: 0.05)",
    )
    parser.add_argument(
        "--patient",
        metavar="RULE",
        help="how to find the patient of a file: a regular expression for paths, whose group is the patient; 'folder' "
        "for the first folder in which the paths differ; or a column of the table (default: the patient in the "
        "header, else the folder)",
    )
    parser.add_argument(
        "--split", metavar="FILE", help="table that assigns paths or patients to train or val; all others are train"
    )
    parser.add_argument(
        "--workers", type=int, metavar="PROCESSES", help="processes that read files (default: one per processor)"
    )
    parser.add_argument(
        "--memory",
        type=int,
        default=512,
        metavar="MB",
        help="memory of each process for one file (default: 512). Files up to 4 times as large are read in pieces; a "
        "picture may have 40 million pixels per 512 MB",
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="folder for downloaded packages and files (default: ~/.cache/dex)"
    )
    parser.add_argument(
        "--allow-burned-in", action="store_true", help="keep images whose header declares burned-in annotation"
    )


def _sources(options: argparse.Namespace) -> list[Any]:
    from dex.prepare import modalities
    from dex.prepare.modalities import AUTO, FROM_FOLDERS
    from dex.prepare.sources import is_place, resolve

    overrides = {
        "modality": options.modality,
        "normalisation": options.normalisation,
        "routes": tuple(map(_route, options.pattern)) if options.pattern else None,
        "trusted": options.trust or None,
        "volumes": options.volumes,
        "slope": options.slope,
        "intercept": options.intercept,
        "root": options.root,
        "files": tuple(options.files) if options.files else None,
        "planes": tuple(options.planes) if options.planes else None,
        "frame_stride": options.frame_stride,
        "slice_stride": options.slice_stride,
        "val_share": options.val_share,
        "patient": options.patient,
        "split_file": options.split,
    }
    if options.pattern and modalities.key(options.modality or AUTO) not in map(modalities.key, (AUTO, FROM_FOLDERS)):
        raise ValueError(f"pattern: expected --modality {AUTO} or {FROM_FOLDERS} with it, got {options.modality!r}")
    if len(options.source) > 1 and (options.root or options.files):
        raise ValueError(f"root, files: expected a single SOURCE with them, got {len(options.source)}")
    sources: list[Any] = []
    folders = 0
    for argument in options.source:
        given = {name: value for name, value in overrides.items() if value is not None}
        if is_place(argument):
            folders += 1
            given |= {"name": f"folder-{folders}"} if folders > 1 else {}
        elif len(options.source) > 1:  # A catalogue source beside a folder: these options describe the folder
            given = {name: value for name, value in given.items() if name not in _OF_FOLDERS}
        sources += resolve(argument, **given)
    return sources


def _route(text: str) -> Any:
    from dex.prepare.sources import Route

    modality, _, pattern = text.partition("=")
    if not modality or not pattern:
        raise ValueError(f"pattern: expected MODALITY=GLOB, such as 'X-ray=chest/**', got {text!r}")
    return Route(modality, (pattern,))


def _commands(command: list[str], arguments: list[str], options: argparse.Namespace, error: Any) -> list[str]:
    """Instructions and commands to copy that state the modality of the undetermined files."""
    from dex.prepare.modalities import AUTO, FROM_FOLDERS

    kept = [word for word in arguments if not word.startswith("--modality=")]
    if options.modality in kept and "--modality" in kept:
        place = kept.index("--modality")
        del kept[place : place + 2]
    command = shlex.join([*command, *kept])
    if error.by_folders:
        return ["their folders are named after modalities, so run:", f"{command} --modality {FROM_FOLDERS}"]
    lines = []
    if error.patterns:
        patterns = " ".join(f"--pattern {shlex.quote(f'MODALITY={pattern}')}" for pattern in error.patterns)
        lines += [
            "state what they are, with CT, MR, PET, X-ray, ... in place of MODALITY:",
            f"{command} --modality {options.modality or AUTO} {patterns}",
        ]
    if error.unnamed:
        names = ", ".join(error.unnamed)
        lines += [
            f"a suffix and a depth do not separate those with {names} from files whose folders are named after a "
            "modality,",
            "so name the folder of each: --pattern 'MODALITY=FOLDER/*'",
        ]
    remedy = "move each into a folder named after its modality, and run the same command"
    if options.modality == FROM_FOLDERS:
        return [*lines, f"or {remedy}" if lines else remedy]
    return [
        *lines,
        "or, if each is below a folder named after its modality:",
        f"{command} --modality {FROM_FOLDERS}",
    ]


def _wrong(lines: list[str]) -> int:
    print("\n".join(lines), file=sys.stderr)
    return exits.USAGE


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal()):
        raise ValueError(f"shard: expected I/N, such as 0/4, got {text!r}")
    return int(part), int(parts)


def _stopped(*lines: str) -> int:
    print("\n".join(lines), file=sys.stderr)
    return exits.PREEMPTED
