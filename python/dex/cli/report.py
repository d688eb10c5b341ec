"""``dex report``: one HTML page about run folders."""

from collections.abc import Callable
from pathlib import Path

from dex.cli._console import Parser
from dex.common import exits
from dex.common.folders import check_file, require
from dex.common.units import format_bytes

HELP = "write one HTML page about a run, or one that compares several"
POSITION = 40
NEEDS = "train"


def run(arguments: list[str]) -> Callable[[], int]:
    parser = Parser(
        prog="dex report",
        description="Write one self-contained HTML page about run folders: curves, pictures, events, configuration and "
        "machine.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; several are compared")
    parser.add_argument(
        "--out", metavar="FILE", help="page to write (default: RUN/report.html, or report.html for several runs)"
    )
    options = parser.parse_args(arguments)
    if not all(text.strip() for text in [*options.runs, *([] if options.out is None else [options.out])]):
        raise ValueError("runs, --out: expected paths, got an empty one")
    runs = [Path(run) for run in options.runs]
    out = Path(options.out) if options.out else (runs[0] if len(runs) == 1 else Path()) / "report.html"
    check_file(out)
    for run in runs:
        require(run, f"run {run}: expected a run folder")
    from dex.report.page import report

    written = report(runs, out)  # Here, not in carry_out: any error is an error in the input

    def carry_out() -> int:
        print(f"{written}, {format_bytes(written.stat().st_size)}")
        return exits.DONE

    return carry_out
