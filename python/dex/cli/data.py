"""``dex data``: inspect data sets, and withdraw patients from them."""

import errno
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dex.cli import prepare
from dex.cli._console import Parser, failed, folder_argument, print_line
from dex.common import exits
from dex.common.cores import cores
from dex.common.csv_lines import csv_lines
from dex.common.folders import check_file

if TYPE_CHECKING:
    from dex.prepare.lookup import Found, Image, Place
    from dex.prepare.withdraw import Outcome

HELP = "check a shard set, find files behind images, withdraw a patient"
POSITION = 20
NEEDS = "data"

_PRIVATE = "private: the lines below name files and may name patients; do not distribute them with the set"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    if options.command == "check":
        return _check(options.dir)
    if options.command == "leak":
        return _leak(options.a, options.b, options.out)
    if options.command == "inventory":
        return prepare.dry_run("dex data inventory", arguments[1:], options, folder_argument("out", options.out))
    folder = _set(options.dir)
    if options.command == "where":
        return _where(folder, options.id)
    if options.command == "refused":
        return _refused(folder, options.reason, options.csv)
    return _withdraw(folder, options.id)


def _parser() -> Parser:
    parser = Parser(prog="dex data", description="Inspect data sets, and withdraw patients from them.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    check = commands.add_parser(
        "check",
        help="verify every hash of a shard set",
        description="Read every byte of a shard set and report whatever differs from what was written. Exit code 1 if "
        "anything does.",
    )
    check.add_argument("dir", metavar="DIR", help="folder of the shard set")
    inventory = commands.add_parser(
        "inventory",
        essentials=("out", *prepare.ESSENTIALS),
        help="show what a folder of scans holds, and what `dex prepare` would make of it",
        description="Read headers and a few pixels. Print modalities, sizes, planes, spacing and patients, what would "
        "be left out and why, and how many images, how much time and how much space the set would take; also write "
        "them as a page and JSON, which hold no name, path or date. If the modality of some files is unknown, exit "
        "with code 2 and print the command that states it.",
    )
    inventory.add_argument(
        "--out", default="inventory", metavar="DIR", help="folder for inventory.html and inventory.json"
    )
    prepare.add_source_options(inventory)
    where = commands.add_parser(
        "where",
        help="find the files behind images, and the images of a file or patient",
        description="Print the file, frame and plane of an image in a set written by `dex prepare`, from the private "
        "folder beside the set.",
    )
    where.add_argument("dir", metavar="DIR", help="folder of the shard set")
    where.add_argument(
        "id",
        nargs="+",
        metavar="ID",
        help="id of an image, a unit or a patient group; a patient as named in headers (PatientID) or folders; or the "
        "path of a file or folder",
    )
    refused = commands.add_parser(
        "refused",
        help="list files that gave no image, with the reasons",
        description="List the files that `dex prepare` refused, left out or passed over, with the reasons, from the "
        "private folder beside the set.",
    )
    refused.add_argument("dir", metavar="DIR", help="folder of the shard set")
    refused.add_argument("--reason", metavar="REASON", help="list only files with this reason, such as unreadable")
    refused.add_argument("--csv", action="store_true", help="print CSV with columns source, path, reason and detail")
    withdraw = commands.add_parser(
        "withdraw",
        help="remove a patient from a set for good",
        description="Rewrite the shards of a set without the images of a patient, or without single images, and update "
        "counts, thumbnails and private tables. After a kill at any moment the set is the old or the new one, and the "
        "same command resumes. The original files are not touched.",
    )
    withdraw.add_argument("dir", metavar="DIR", help="folder of the shard set")
    withdraw.add_argument(
        "id",
        nargs="*",
        metavar="PATIENT|ID",
        help="patients or ids as in `dex data where`; none finishes an interrupted withdrawal",
    )
    leak = commands.add_parser(
        "leak",
        help="find images that two sets share",
        description="Find images of one data set (a shard set or a folder) that occur in another: equal pixels, copies "
        "in another encoding or brightness, shifted, cropped, mirrored and rotated copies, and neighbouring slices of "
        "a volume. Exit code 1 if there are any.",
    )
    leak.add_argument("a", metavar="A", help="training data: a shard set or a folder of images")
    leak.add_argument("b", metavar="B", help="test data: a shard set or a folder of images")
    leak.add_argument("--out", metavar="FILE", help="write all pairs to FILE.csv, or pairs and counts to FILE.json")
    return parser


def _set(path: str) -> Path:
    """Absolute path of a shard set. ValueError: there is none."""
    from dex.data.shard_format import MANIFEST

    folder = folder_argument("DIR", path)
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"DIR: expected a shard set; {folder} has no {MANIFEST}")
    return Path(os.path.abspath(folder))


def _private_folder(folder: Path) -> Path:
    """The private folder beside the set, or beside the target if the set is a link."""
    from dex.prepare.run import private_folder

    beside = private_folder(folder)
    return beside if beside.exists() else private_folder(folder.resolve())


def _check(path: str) -> Callable[[], int]:
    from dex.data import verify
    from dex.data.shard_format import read_manifest
    from dex.prepare import page

    folder = _set(path)

    def carry_out() -> int:
        problems = verify(folder)
        for problem in problems:
            print(problem)
        if problems:
            return exits.FAILED
        manifest, _ = read_manifest(folder)
        images, shards = page.count(manifest["samples"], "image"), page.count(len(manifest["shards"]), "shard")
        print(f"{images} in {shards}: every hash matches")
        return exits.DONE

    return carry_out


def _where(folder: Path, texts: list[str]) -> Callable[[], int]:
    from dex.prepare import lookup, withdraw

    private = lookup.Private(_private_folder(folder))
    results = lookup.find(folder, private, texts)
    for result in results:
        if not result:
            raise ValueError(withdraw.nothing(result, private))

    def carry_out() -> int:
        print(_PRIVATE, file=sys.stderr)
        for result in results:
            _print_result(result)
        return exits.DONE

    return carry_out


def _print_result(result: "Found") -> None:
    kept = sum(image.line is not None for image in result.images.values())
    ways = f", found by {', '.join(result.ways)}" if result.ways else ""
    print(f"{_printable(result.text)}: {_count(kept, 'image')} in the set{ways}")
    for record in result.withdrawn:
        print(f"  withdrawn on {record.time}: {_count(record.images, 'image')} in all")
    for image in result.images.values():
        print(f"  {image.id}  {_in_set(image)}")
        print(f"    {_origin(image.place) if image.place else 'not in the private table'}")
    for place in result.refused:
        detail = f" ({place.detail})" if place.detail else ""
        print(f"  refused as {place.refused}{detail}\n    {_origin(place)}")


def _in_set(image: "Image") -> str:
    if image.line is not None and image.shard is not None:
        line = image.line
        member = f"{image.shard['file']} {line['key']}.{line['kind']}"
        return f"{line['modality']}, {line['split']}, patient {line['group']}, {member}"
    if image.duplicate is not None:
        kind = "nearly the same as" if image.duplicate["near"] else "the same pixels as"
        return f"not in the set: {kind} {image.copy_of or 'another image that is not in the set'}"
    return "not in the set: a copy of another image"


def _origin(place: "Place") -> str:
    """File, frame and slice of a row in the private table."""
    file = place.files[0] if place.files else place.file
    path = os.path.join(place.root, file) if place.root else f"{file} of {place.source}"
    parts = [_printable(path)]
    if place.files:
        parts.append(f"and {len(place.files) - 1:,} more files of the series, up to {_printable(place.files[-1])}")
    if place.volume is not None:
        parts.append(f"volume {place.volume}")
    if place.frame is not None:
        parts.append(f"frame {place.frame}")
    if place.label and place.label != "image":
        parts.append(place.label)
    if not place.exact:
        parts.append("one of the files there; this set was made by an earlier version, which did not record which one")
    return ", ".join(parts)


def _refused(folder: Path, reason: str | None, as_csv: bool) -> Callable[[], int]:
    from dex.prepare import lookup

    private = lookup.Private(_private_folder(folder))
    counts: Counter[str] = Counter()
    rows: list[Place] = []
    for place in private.places():
        if place.refused:
            counts[place.refused] += 1
            rows += [place] if reason in (None, place.refused) else []
    for place in private.passed_over():
        counts[place.refused] += 1
        rows += [place] if reason in (None, place.refused) else []
    if reason is not None and reason not in counts:
        reasons = ", ".join(f"{name} ({count:,})" for name, count in sorted(counts.items()))
        expected = f"one of {reasons}" if reasons else "no --reason, since no file was refused"
        raise ValueError(f"reason: expected {expected}, got {reason!r}")

    def carry_out() -> int:
        print(_PRIVATE, file=sys.stderr)
        if not private.knows_duplicates:
            print(
                "note: this set was made by an earlier version, which recorded neither details nor passed-over files",
                file=sys.stderr,
            )
        if as_csv:
            files = ((place, file) for place in rows for file in place.files or (place.file,))
            table = ((p.source, _printable(os.path.join(p.root, file)), p.refused, p.detail) for p, file in files)
            print(csv_lines([("source", "path", "reason", "detail"), *table]), end="")
            return exits.DONE
        for place in rows:
            detail = f"  ({place.detail})" if place.detail else ""
            print(f"{place.refused}  {_origin(place)}{detail}")
        shown = counts if reason is None else {reason: counts[reason]}
        print(", ".join(f"{name} {count:,}" for name, count in sorted(shown.items())) or "nothing was refused")
        return exits.DONE

    return carry_out


def _withdraw(folder: Path, texts: list[str]) -> Callable[[], int]:
    from dex.prepare import lookup

    private = _private_folder(folder)
    if private.exists():
        lookup.Private(private)  # ValueError unless dex wrote it

    def carry_out() -> int:
        from dex.prepare import withdraw

        command = "dex data withdraw"
        try:
            outcome = withdraw.withdraw(folder, private, texts)
        except withdraw.Impossible as error:
            print_line(command, str(error))
            return exits.USAGE
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.ENOSPC:
                reason += "; a withdrawal needs space for a second copy of each changed shard"
            return failed(command, f"{reason}. {folder} is intact; start the same command again")
        except ValueError as error:
            return failed(command, error)
        _print_outcome(folder, outcome, private.exists())
        return exits.DONE

    return carry_out


def _print_outcome(folder: Path, outcome: "Outcome", has_private: bool) -> None:
    if outcome.finished:
        print("finished an interrupted withdrawal")
    if not outcome.images:
        if outcome.earlier:
            print(f"no such image is in the set: withdrawn on {', '.join(outcome.earlier)}")
        print(f"fingerprint: {outcome.after}")
        return
    copies = f", including {_count(outcome.copies, 'copy', 'copies')} of the named images" if outcome.copies else ""
    whose = f" of {_count(outcome.patients, 'patient')}" if outcome.patients else ""
    print(f"withdrawn: {_count(outcome.images, 'image')}{whose}{copies}")
    print(f"fingerprint before: {outcome.before}\nfingerprint now:    {outcome.after}")
    seen = "|".join(outcome.seen_by)
    print(
        "note: runs whose run.json has an earlier fingerprint, and their checkpoints, have seen the images; "
        f"`grep -rlE --include=run.json '{seen}' RUNS` lists them. They can no longer be resumed"
    )
    print("note: stop any training run that is reading the set: it would find unreadable images")
    print(
        f"note: the original files are untouched; `dex prepare --out {folder.name}` leaves them out from now on, but "
        "not with another --out"
    )
    if outcome.others:
        print(f"note: {_count(outcome.others, 'other image')} of the same patients, series or folders stay in the set")
    if not outcome.knows_copies:
        print(
            "note: this set was made by an earlier version, which did not record copies: an image of the patient that "
            "was left out as a copy of another patient's image may still be in the set under that patient"
        )
    if not has_private:
        print("note: copies of the images were not searched for, since the private folder is missing")
    print(f"next: dex data check {shlex.quote(str(folder))}")


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def _printable(path: str) -> str:
    """``path`` on one line, with unprintable bytes escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _leak(a: str, b: str, out: str | None) -> Callable[[], int]:
    for name, path in (("A", a), ("B", b)):
        folder = folder_argument(name, path)
        if not folder.is_dir():
            raise ValueError(f"{name}: expected a shard set or a folder of images; {folder} is not a folder")

    path = None if out is None else Path(out)
    if path is not None and (path.suffix.lower() not in (".csv", ".json") or not path.parent.is_dir()):
        raise ValueError(f"out: expected NAME.csv or NAME.json in an existing folder, got {out}")
    if path is not None:
        check_file(path)

    def carry_out() -> int:
        from dex.prepare.leak import leak

        try:
            overlap = leak(a, b, workers=cores())
            if path is not None:
                overlap.write(path)
        except (ValueError, OSError) as error:
            return failed("dex data leak", error)
        print(overlap.to_text())
        return exits.FAILED if overlap.overlap else exits.DONE

    return carry_out
