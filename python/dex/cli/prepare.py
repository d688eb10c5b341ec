"""`dex prepare`: raw scans, pictures and videos to shards."""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dex.cli._console import Parser, failed, folder_argument
from dex.common import atomic, exits

HELP = "raw scans, pictures and videos to shards and a data card"
POSITION = 10
NEEDS = "data"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser("--dry-run" not in arguments).parse_args(arguments)

    from dex.prepare import left_out, summary
    from dex.prepare import run as prepare
    from dex.prepare.discover import Undetermined

    if options.dry_run:
        return dry_run("dex prepare", arguments, options)
    wanted = dataclasses.replace(
        _looked_at(options),
        out=folder_argument("out", options.out),
        shard=_shard(options.shard),
        max_unreadable=options.max_unreadable,
    )
    sources = _sources(options)
    prepare.check(sources, wanted)
    again = f"{wanted.out}: what is done is kept; the same command goes on"
    try:
        with prepare.stop_signals():
            preparation = prepare.prepare(sources, wanted)
    except Undetermined as error:
        lines = [f"dex prepare: {error}", *_commands(["dex", "prepare"], arguments, options, error)]
        return lambda: _wrong(lines)
    except prepare.Stopped as error:
        stopped = f"dex prepare: stopped by {error}"
        return lambda: _stopped(stopped, again)
    except prepare.Failed as error:
        message = str(error)
        return lambda: failed("dex prepare", message)

    def carry_out() -> int:
        try:
            with prepare.stop_signals():
                facts = preparation.run(summary.Progress())
        except prepare.Stopped as error:
            return _stopped(f"dex prepare: stopped by {error}", again)
        except prepare.Failed as error:
            return failed("dex prepare", error)
        if facts is not None:
            print(f"\n{summary.table(facts)}\n")
            print(*summary.counts(facts), "", sep="\n")
            for note in summary.notes(facts):
                print(f"note: {note}")
            if any(source["refused"] for source in facts["sources"]):
                print(f"refused: `dex data refused {shlex.quote(str(wanted.out))}` says which files, and why")
                page = prepare.private_folder(wanted.out) / left_out.PAGE
                if page.exists():  # a withdrawal removes it
                    print(f"         {shlex.quote(str(page))} shows some of them")
            out = shlex.quote(str(wanted.out))
            print(f"shards: {out}\ncard:   {out}/card.html\nnext:   dex pretrain --preset demo --data {out}")
        return exits.DONE

    return carry_out


def dry_run(command: str, arguments: list[str], options: argparse.Namespace, page: Path | None = None) -> Callable:
    """What a run with these options would find and keep: printed, and written to ``page``, a folder."""
    from dex.prepare import inventory, inventory_page
    from dex.prepare import run as prepare

    wanted, sources = _looked_at(options), _sources(options)
    if page is None and options.out is not None:
        prepare.check(sources, dataclasses.replace(wanted, out=folder_argument("out", options.out)))
    prepare.check_settings(sources, wanted)
    try:
        with prepare.stop_signals():
            taken = inventory.take(
                sources,
                wanted.settings,
                processes=wanted.workers,
                cache=wanted.cache,
                limits=wanted.limits,
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
        undetermined = [one.undetermined for one in taken if one.undetermined is not None]
        if undetermined:
            words = ["dex", *command.split()[1:]]
            return _wrong([f"{command}: {undetermined[0]}", *_commands(words, arguments, options, undetermined[0])])
        return exits.DONE

    return carry_out


def _looked_at(options: argparse.Namespace) -> Any:
    """The options of a run that say how files are looked at; without a folder for the set."""
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
        workers=options.workers if options.workers is not None else len(os.sched_getaffinity(0)),
        cache=folder_argument("cache", options.cache) if options.cache is not None else prepare.CACHE,
        limits=readers.Limits.within(options.memory),
    )


def _parser(needs_out: bool) -> Parser:
    parser = Parser(
        prog="dex prepare",
        description="Raw scans, pictures and videos to normalised images in shards, with a data card. Killed or "
        "stopped, the same command goes on where it was and ends in the same bytes.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by SIGTERM or SIGINT and resumable.",
    )
    add_source_options(parser)
    parser.add_argument(
        "--out", required=needs_out, metavar="DIR", help="the set; DIR.private beside it holds what is not"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="look at headers and a few pixels, and say what would be kept and left out, how long it would take and "
        "how large the set would be; nothing is written (packages and files elsewhere go into the cache)",
    )
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="part I of N, 0 <= I < N, for N machines")
    parser.add_argument(
        "--max-unreadable", type=int, metavar="N", help="stop above N broken files; 10 or 0.1 %% of all without it"
    )
    return parser


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """What is looked at, and how."""
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="a folder, a table of files (CSV, JSON lines, Parquet, or a list of paths), a zip or a URL of either, a "
        "description (YAML), a shipped source's name, or 'packages': all sources that come with public packages; "
        "'embedded': the images that come with dex",
    )
    parser.add_argument(
        "--modality",
        metavar="M",
        help="of a folder's files: auto (without it), as the header of each says; from-folders, of those without one, "
        "as a folder above them is called; CT, MR, PET, X-ray, ultrasound, fundus, ... for all; or a name of your own",
    )
    parser.add_argument(
        "--pattern",
        action="append",
        metavar="M=GLOB",
        help="the modality of files without such a header, by their paths, such as 'X-ray=chest/**'; may be repeated",
    )
    parser.add_argument(
        "--normalisation", metavar="RULE", help="ct, mr, pet, suv or display; of the modality without it"
    )
    parser.add_argument(
        "--volumes",
        metavar="WHICH",
        help="of files with several volumes: first (without it), all, mean, or N: every N-th",
    )
    parser.add_argument("--slope", type=float, metavar="A", help="with --intercept B: numbers are A * stored + B, of")
    parser.add_argument(
        "--intercept", type=float, metavar="B", help="files other than DICOM, such as PNG of HU + 32768"
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="with --modality: take all files as that, whatever their headers say, label maps included",
    )
    parser.add_argument(
        "--root", metavar="DIR", help="where the files of a table, a shipped source or a description lie"
    )
    parser.add_argument("--files", nargs="+", metavar="GLOB", help="which files below it, such as '**/*.nii.gz'")
    parser.add_argument("--size", type=int, default=256, help="pixels a side (256)")
    parser.add_argument("--bits", type=int, default=8, choices=(8, 16), help="of grey images (8)")
    parser.add_argument("--encoding", choices=("jpg", "png"), help="jpg for 8 bits, png for 16 without it")
    parser.add_argument(
        "--planes",
        nargs="+",
        choices=("axial", "coronal", "sagittal", "stored", "auto"),
        help="of volumes; auto, of a folder without it: axial, but as stored of thick slices that are not",
    )
    parser.add_argument("--frame-stride", type=int, metavar="N", help="one frame in N of videos and multi-frame files")
    parser.add_argument("--slice-stride", type=int, metavar="N", help="one slice in N of each plane of a volume")
    parser.add_argument(
        "--val-share", type=float, metavar="S", help="part of the images to be held out, by whole patients (0.05)"
    )
    parser.add_argument(
        "--patient",
        metavar="WHO",
        help="who a file's patient is: a regular expression over paths, whose group names it; 'folder', the first that "
        "the paths do not share; or a column of the table. Without it the header's patient, else the folder",
    )
    parser.add_argument(
        "--split",
        metavar="FILE",
        help="a table of paths or patients, each train or val; what it does not name is train",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; one for each processor without it")
    parser.add_argument(
        "--memory",
        type=int,
        default=512,
        metavar="MB",
        help="of each process, for one file (512); files up to 4 times as large are read piece by piece, and pictures "
        "may have 40 million pixels for each 512",
    )
    parser.add_argument("--cache", metavar="DIR", help="where packages are kept (~/.cache/dex)")
    parser.add_argument("--allow-burned-in", action="store_true", help="take images that declare burned-in annotation")


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
        raise ValueError(f"pattern: expected --modality {AUTO} or {FROM_FOLDERS} beside it; got {options.modality!r}")
    if len(options.source) > 1 and (options.root or options.files):
        raise ValueError(f"root, files: expected one SOURCE beside them; got {len(options.source)}")
    sources: list[Any] = []
    folders = 0
    for argument in options.source:
        given = {name: value for name, value in overrides.items() if value is not None}
        if is_place(argument):
            folders += 1
            given |= {"name": f"folder-{folders}"} if folders > 1 else {}
        elif folders or len(options.source) > 1:
            for name in (
                "modality",
                "normalisation",
                "routes",
                "trusted",
                "slope",
                "intercept",
                "val_share",
                "patient",
                "split_file",
            ):  # of the folders beside it
                given.pop(name, None)
        sources += resolve(argument, **given)
    return sources


def _route(text: str) -> Any:
    from dex.prepare.sources import Route

    modality, _, pattern = text.partition("=")
    if not modality or not pattern:
        raise ValueError(f"pattern: expected MODALITY=GLOB, such as 'X-ray=chest/**'; got {text!r}")
    return Route(modality, (pattern,))


def _commands(command: list[str], arguments: list[str], options: argparse.Namespace, error: Any) -> list[str]:
    """The commands that say what some files' modality is, to be copied."""
    from dex.prepare.modalities import AUTO, FROM_FOLDERS

    kept = [word for word in arguments if not word.startswith("--modality=")]
    if options.modality in kept and "--modality" in kept:
        place = kept.index("--modality")
        del kept[place : place + 2]
    command = shlex.join([*command, *kept])
    if error.by_folders:
        return ["their folders are called after modalities, so give:", f"{command} --modality {FROM_FOLDERS}"]
    lines = []
    if error.patterns:
        patterns = " ".join(f"--pattern {shlex.quote(f'MODALITY={pattern}')}" for pattern in error.patterns)
        lines += [
            "say what they are, with CT, MR, PET, X-ray, ... in the place of MODALITY:",
            f"{command} --modality {options.modality or AUTO} {patterns}",
        ]
    if error.unnamed:
        lines.append(f"no pattern tells those with {', '.join(error.unnamed)} from files whose folders say a modality")
    moved = "move each into a folder that is called after its modality, and give the same command"
    if options.modality == FROM_FOLDERS:
        return [*lines, f"or {moved}" if lines else moved]
    return [
        *lines,
        "or, where each lies below a folder that is called after its modality:",
        f"{command} --modality {FROM_FOLDERS}",
    ]


def _wrong(lines: list[str]) -> int:
    print("\n".join(lines), file=sys.stderr)
    return exits.USAGE


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal()):
        raise ValueError(f"shard: expected I/N, such as 0/4; got {text!r}")
    return int(part), int(parts)


def _stopped(*lines: str) -> int:
    print("\n".join(lines), file=sys.stderr)
    return exits.PREEMPTED
