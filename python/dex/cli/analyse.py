"""``dex analyse``: did the experts of a run specialise?"""

import sys
from collections.abc import Callable
from pathlib import Path

from dex.cli import _features, _progress
from dex.cli._console import Parser, failed, folder_argument, require_one_process
from dex.common import exits
from dex.common.folders import RUN, check_folder, require

HELP = "measure whether the experts of a run specialised, as a page"
POSITION = 41
NEEDS = "train"

_FOLDER = "analysis"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    out = None if options.out is None else folder_argument("out", options.out)
    if out is not None:
        check_folder(out)
    require(options.run, RUN)
    if options.data is not None:
        from dex.data.opening import locate

        locate(options.data, "data")

    from dex.inference import analyse_job as job
    from dex.train.plan import resolve_device

    require_one_process("dex analyse")
    settings = job.Options(
        parts=tuple(options.only or job.PARTS),
        images=options.images,
        probed=options.probed,
        batch_size=options.batch_size,
        checkpoints=_checkpoints(options.checkpoints),
        ema=options.ema,
    )
    prepared = job.prepare(options.run, settings, data=options.data, compare=options.compare)
    losses_only = set(settings.parts) == {"heldout"}
    if out is None and not losses_only:
        if not job.is_run(Path(options.run)):
            raise ValueError(f"out: expected --out DIR, since {options.run} is not a run folder, got none")
        out = Path(options.run) / _FOLDER
        check_folder(out)
    device = resolve_device(options.device)

    def carry_out() -> int:
        from dex.report import analysis_page as page

        try:
            with exits.stopping(exits.STOP_SIGNALS), _progress.shown("dex analyse") as say:
                analysis = job.analyse(prepared, device, say)
                written = None if out is None else page.write(analysis, out)
        except exits.Stopped:
            print("dex analyse: stopped; nothing is written", file=sys.stderr)
            return exits.PREEMPTED
        except (ValueError, OSError) as error:
            return failed("dex analyse", error)
        for note in analysis.notes:
            print(f"{note}.")
        if losses_only:
            print(page.loss_table(analysis))
        else:
            print(page.concluded(analysis, analysis.findings).text)
        print(page.about(analysis))
        if written is not None:
            print(written)
        return exits.DONE

    return carry_out


def _checkpoints(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _parser() -> Parser:
    parser = Parser(
        prog="dex analyse",
        description="Measure whether the experts of a trained model specialised: swap gap, ablations, routes, "
        "gradients, similarity, spectra and probe. Each is compared with the model at step 0, with chance or with "
        "pixels, and has intervals over sources. Writes a self-contained page, each picture as a file, its numbers as "
        "CSV, and all results as findings.json. Images and models are only read.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by a signal with nothing written.",
    )
    _features.add_run(parser)
    parser.add_argument("--data", metavar="DIR", help="data set with held-out images (default: that of the run)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="output folder; files of an earlier analysis there are replaced (default: RUN/analysis)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="parts to compute: heldout, routing, swap, ablation, gradients, similarity, features (default: all). "
        "heldout alone prints a table of losses and writes no page",
    )
    parser.add_argument("--images", type=int, default=256, metavar="COUNT", help="largest number of held-out images")
    parser.add_argument(
        "--probed", type=int, default=512, metavar="COUNT", help="largest number of images in the linear probe"
    )
    parser.add_argument(
        "--checkpoints",
        default="last",
        metavar="WHICH",
        help="last, all, or a number of checkpoints over the run; several give curves over steps",
    )
    _features.add_ema(parser)
    parser.add_argument(
        "--compare", metavar="OTHER", help="second run to measure on the same images, such as the monolithic control"
    )
    _features.add_forward(parser, 64, "images")
    return parser
