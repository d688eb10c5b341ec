"""`dex data`: look at data sets that exist, and take patients out of them."""

import csv
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

if TYPE_CHECKING:
    from dex.prepare.lookup import Found, Image, Place
    from dex.prepare.withdraw import Outcome

HELP = "check a shard set, find the file behind an image, withdraw a patient, compare two sets"
POSITION = 20
NEEDS = "data"


_PRIVATE = "private: what follows names files and may name patients; do not give it away with the set"


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
    parser = Parser(prog="dex data", description="Look at data sets that exist, and take patients out of them.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    check = commands.add_parser(
        "check",
        help="verify every hash of a shard set",
        description="Read every byte of a shard set and name what is not as it was written. Exit code 1 for any.",
    )
    check.add_argument("dir", metavar="DIR")
    inventory = commands.add_parser(
        "inventory",
        help="what a folder of scans holds, and what `dex prepare` would make of it",
        description="Modalities, sizes, planes, spacing and patients by headers alone; what would be left out and why; "
        "by a few pixels, how much would be kept, how long it would take and how large the set would be: printed, and "
        "as a page and JSON. No name, path or date gets into either. Exit code 2 where nothing says of which modality "
        "some files are, with the command that does.",
    )
    inventory.add_argument("--out", default="inventory", metavar="DIR", help="for inventory.html and .json (inventory)")
    prepare.add_source_options(inventory)
    where = commands.add_parser(
        "where",
        help="the files behind images, and the images of a file or patient",
        description="Which file, frame and plane an image of a set that `dex prepare` wrote came from. The answer is "
        "in the private folder beside the set.",
    )
    where.add_argument("dir", metavar="DIR", help="the set")
    where.add_argument(
        "id",
        nargs="+",
        metavar="ID",
        help="of an image, a unit or a patient group; or a patient as the headers (PatientID) or folders call it; or "
        "the path of a file or folder",
    )
    refused = commands.add_parser(
        "refused",
        help="files that gave no image, with the reasons",
        description="What `dex prepare` refused, left out or passed over, with paths and reasons, from the private "
        "folder beside the set.",
    )
    refused.add_argument("dir", metavar="DIR", help="the set")
    refused.add_argument("--reason", metavar="R", help="only these, such as unreadable")
    refused.add_argument("--csv", action="store_true", help="as CSV: source, path, reason, detail")
    withdraw = commands.add_parser(
        "withdraw",
        help="take a patient out of a set, for good",
        description="Rewrite the shards of a set without a patient's images, or without single ones; counts, "
        "thumbnails and private tables follow. Killed at any moment, the set is the old or the new one, and the same "
        "command goes on. The files that the images came from are not touched.",
    )
    withdraw.add_argument("dir", metavar="DIR", help="the set")
    withdraw.add_argument(
        "id",
        nargs="*",
        metavar="PATIENT|ID",
        help="as `dex data where` takes them; without any, a withdrawal that was cut short is finished",
    )
    leak = commands.add_parser(
        "leak",
        help="images that two sets share",
        description="Images of one data set (a shard set or a folder) that occur in another: equal pixels, copies in "
        "another encoding or brightness, shifted, cropped, mirrored and turned ones, and neighbours in a volume. Exit "
        "code 1 when there are any.",
    )
    leak.add_argument("a", metavar="A", help="what is trained on")
    leak.add_argument("b", metavar="B", help="what is tested on")
    leak.add_argument("--out", metavar="FILE", help="write all pairs: FILE.csv, or FILE.json with all counts")
    return parser


def _set(path: str) -> Path:
    """A shard set, as an absolute path."""
    from dex.data.shard_format import MANIFEST

    folder = folder_argument("DIR", path)
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"DIR: expected a shard set; {folder} holds no {MANIFEST}")
    return Path(os.path.abspath(folder))


def _private_folder(folder: Path) -> Path:
    """Beside the set, or beside what a link to it points at."""
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
        print(f"{images} in {shards}: every hash fits")
        return exits.DONE

    return carry_out


def _where(folder: Path, texts: list[str]) -> Callable[[], int]:
    from dex.prepare import lookup, withdraw

    private = lookup.Private(_private_folder(folder))
    found = lookup.find(folder, private, texts)
    for one in found:
        if not one:
            raise ValueError(withdraw.nothing(one, private))

    def carry_out() -> int:
        print(_PRIVATE, file=sys.stderr)
        for one in found:
            _print_found(one)
        return exits.DONE

    return carry_out


def _print_found(one: "Found") -> None:
    kept = sum(image.line is not None for image in one.images.values())
    ways = f", found by {', '.join(one.ways)}" if one.ways else ""
    print(f"{_printable(one.text)}: {_count(kept, 'image')} in the set{ways}")
    for record in one.withdrawn:
        print(f"  withdrawn on {record.time}: {_count(record.images, 'image')} in all")
    for image in one.images.values():
        print(f"  {image.id}  {_in_set(image)}")
        print(f"    {_origin(image.place) if image.place else 'the private table has no row of it'}")
    for place in one.refused:
        detail = f" ({place.detail})" if place.detail else ""
        print(f"  refused as {place.refused}{detail}\n    {_origin(place)}")


def _in_set(image: "Image") -> str:
    if image.line is not None and image.shard is not None:
        line = image.line
        member = f"{image.shard['file']} {line['key']}.{line['kind']}"
        return f"{line['modality']}, {line['split']}, patient {line['group']}, {member}"
    if image.duplicate is not None:
        kind = "nearly the same as" if image.duplicate["near"] else "the same pixels as"
        return f"not in the set: {kind} {image.copy_of or 'an image that is not in it either'}"
    return "not in the set: a copy of another image"


def _origin(place: "Place") -> str:
    """File, frame and slice of a row of the private table."""
    file = place.files[0] if place.files else place.file
    path = os.path.join(place.root, file) if place.root else f"{file} of {place.source}"
    parts = [_printable(path)]
    if place.files:
        parts.append(f"and {len(place.files) - 1:,} more of its series, up to {_printable(place.files[-1])}")
    if place.volume is not None:
        parts.append(f"volume {place.volume}")
    if place.frame is not None:
        parts.append(f"frame {place.frame}")
    if place.label and place.label != "image":
        parts.append(place.label)
    if not place.exact:
        parts.append("one of the files there; the earlier version that made this set did not record which")
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
        there = ", ".join(f"{name} ({count:,})" for name, count in sorted(counts.items())) or "none at all"
        raise ValueError(f"reason: expected one that is there: {there}; got {reason!r}")

    def carry_out() -> int:
        print(_PRIVATE, file=sys.stderr)
        if not private.knows_duplicates:
            print("note: an earlier version made this set, without details and passed-over files", file=sys.stderr)
        if as_csv:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(["source", "path", "reason", "detail"])
            for place in rows:
                for file in place.files or (place.file,):
                    path = _printable(os.path.join(place.root, file))
                    writer.writerow([place.source, path, place.refused, place.detail])
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
        lookup.Private(private)  # one of dex's, or ValueError

    def carry_out() -> int:
        from dex.prepare import withdraw

        command = "dex data withdraw"
        try:
            outcome = withdraw.withdraw(folder, private, texts)
        except withdraw.Impossible as error:
            print_line(command, str(error))
            return exits.USAGE
        except OSError as error:
            room = "; there must be room for the shards that change, once more" if error.errno == errno.ENOSPC else ""
            reason = error.strerror or str(error)
            return failed(command, f"{reason}{room}. Start the same command again; until then {folder} is whole")
        except ValueError as error:
            return failed(command, error)
        _print_outcome(folder, outcome, private.exists())
        return exits.DONE

    return carry_out


def _print_outcome(folder: Path, outcome: "Outcome", has_private: bool) -> None:
    if outcome.finished:
        print("finished a withdrawal that was cut short")
    if not outcome.images:
        if outcome.earlier:
            print(f"nothing of it is in the set: withdrawn on {', '.join(outcome.earlier)}")
        print(f"fingerprint: {outcome.after}")
        return
    copies = f", {outcome.copies:,} of which only repeat what was named" if outcome.copies else ""
    whose = f" of {_count(outcome.patients, 'patient')}" if outcome.patients else ""
    print(f"withdrawn: {_count(outcome.images, 'image')}{whose}{copies}")
    print(f"fingerprint before: {outcome.before}\nfingerprint now:    {outcome.after}")
    seen = "|".join(outcome.seen_by)
    print(
        "note: runs whose run.json names a fingerprint from before have seen the images, and so have their "
        f"checkpoints; `grep -rlE --include=run.json '{seen}' RUNS` lists them. --resume on them is refused"
    )
    print("note: a training run that is reading the set will find unreadable images: stop it")
    print(
        f"note: the original files are untouched; `dex prepare --out {folder.name}` leaves them out from now on, with "
        "another --out it does not"
    )
    if outcome.others:
        print(f"note: {_count(outcome.others, 'other image')} of the same patients, series or folders stay in the set")
    if not outcome.knows_copies:
        print(
            "note: an earlier version made this set and did not record copies: an image of theirs that was left out as "
            "a copy of another patient's may still be in it under that patient"
        )
    if not has_private:
        print("note: without the private folder no copies of the images could be looked for")
    print(f"next: dex data check {shlex.quote(str(folder))}")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _printable(path: str) -> str:
    """A path on one line, whatever its bytes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _leak(a: str, b: str, out: str | None) -> Callable[[], int]:
    for name, path in (("A", a), ("B", b)):
        folder = folder_argument(name, path)
        if not folder.is_dir():
            raise ValueError(f"{name}: expected a shard set or a folder of images; {folder} is no folder")

    path = None if out is None else Path(out)
    if path is not None and (path.suffix.lower() not in (".csv", ".json") or not path.parent.is_dir()):
        raise ValueError(f"--out: expected NAME.csv or NAME.json in a folder that is there, got {out}")

    def carry_out() -> int:
        from dex.prepare.leak import leak

        try:
            overlap = leak(a, b, workers=len(os.sched_getaffinity(0)))
            if path is not None:
                overlap.write(path)
        except (ValueError, OSError) as error:
            return failed("dex data leak", error)
        print(overlap.to_text())
        return exits.FAILED if overlap.overlap else exits.DONE

    return carry_out
