"""`dex data`: look at data sets that exist."""

import os
from collections.abc import Callable

from dex.cli._console import Parser, failed, folder_argument
from dex.common import exits

HELP = "check a shard set's hashes; find images that two sets share"
POSITION = 20
NEEDS = "data"


def run(arguments: list[str]) -> Callable[[], int]:
    parser = Parser(prog="dex data", description="Look at data sets that exist.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
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
    return _check(options.dir) if options.command == "check" else _leak(options.a, options.b)


def _check(path: str) -> Callable[[], int]:
    from dex.data import verify
    from dex.data.shard_format import MANIFEST, read_manifest

    folder = folder_argument("DIR", path)
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"DIR: expected a shard set; {folder} holds no {MANIFEST}")

    def carry_out() -> int:
        problems = verify(folder)
        for problem in problems:
            print(problem)
        if problems:
            return exits.FAILED
        manifest, _ = read_manifest(folder)
        print(f"{manifest['samples']:,} images in {len(manifest['shards']):,} shards: every hash fits")
        return exits.DONE

    return carry_out


def _leak(a: str, b: str) -> Callable[[], int]:
    for name, path in (("A", a), ("B", b)):
        folder = folder_argument(name, path)
        if not folder.is_dir():
            raise ValueError(f"{name}: expected a shard set or a folder of images; {folder} is no folder")

    def carry_out() -> int:
        from dex.prepare.leak import leak

        try:
            overlap = leak(a, b, workers=len(os.sched_getaffinity(0)))
        except (ValueError, OSError) as error:
            return failed("dex data leak", error)
        print(overlap.to_text())
        return exits.FAILED if overlap.overlap else exits.DONE

    return carry_out
