"""``dex explain``: why does a model choose these experts for this scan?"""

import sys
from collections.abc import Callable
from pathlib import Path

from dex.cli import _features, _progress
from dex.cli._console import Parser, failed, require_one_process
from dex.common import exits
from dex.common.folders import RUN, check_file, require

HELP = "show why a model chooses its experts for one scan"
POSITION = 41
NEEDS = "train,data"

_PAGE = "explain.html"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    if options.out is not None and not options.out.strip():
        raise ValueError(f"out: expected a file, got {options.out!r}")
    out = Path(_PAGE if options.out is None else options.out).expanduser()
    check_file(out)
    require(options.run, RUN)
    if options.data is not None:
        from dex.data.opening import locate

        locate(options.data, "data")

    from dex.inference import explain_job as job
    from dex.train.plan import resolve_device

    require_one_process("dex explain")
    settings = job.Options(options.image, options.masks, options.train, options.neighbours, options.batch_size)
    prepared = job.prepare(
        options.run, options.file, settings, modality=options.modality, planes=options.planes, data=options.data
    )
    device = resolve_device(options.device)

    def carry_out() -> int:
        from dex.report import explain_page as page

        try:
            with exits.stopping(exits.STOP_SIGNALS), _progress.shown("dex explain") as say:
                explanation = job.explain(prepared, device, say)
                page.write(explanation, out)
        except exits.Stopped:
            print("dex explain: stopped; nothing is written", file=sys.stderr)
            return exits.PREEMPTED
        except (ValueError, OSError) as error:
            return failed("dex explain", error)
        for note in explanation.notes:
            print(f"{note}.")
        print(page.sentence(explanation))
        print(f"{out} (contains the scan and training images)")
        return exits.DONE

    return carry_out


def _parser() -> Parser:
    parser = Parser(
        prog="dex explain",
        description="Explain the choice of experts for one scan: its route by layer, the masked loss with other "
        "experts and with those of each modality, and the most similar training images, as one page. The page contains "
        "the scan, so only its owner can read it (mode 0600). The scan and the model are only read.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by a signal with nothing written.",
    )
    _features.add_run(parser)
    parser.add_argument("file", metavar="FILE", help="picture, volume, or folder of a DICOM series")
    _features.add_scans(parser)
    parser.add_argument(
        "--image", metavar="LABEL", help="image of a volume, such as axial-012 (default: one from the middle)"
    )
    parser.add_argument("--data", metavar="DIR", help="data set with the training images (default: that of the run)")
    parser.add_argument("--out", metavar="FILE", help=f"page to write (default: {_PAGE})")
    parser.add_argument(
        "--masks", type=int, default=16, metavar="COUNT", help="random masks over which losses are averaged"
    )
    parser.add_argument(
        "--train", type=int, default=512, metavar="COUNT", help="largest number of training images to compare with"
    )
    parser.add_argument("--neighbours", type=int, default=8, metavar="COUNT", help="similar training images to show")
    _features.add_forward(parser, 64, "images")
    return parser
