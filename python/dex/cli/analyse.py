"""`dex analyse`: did the experts of a run specialise?"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dex.cli import _progress
from dex.cli._console import Parser, check_folder, failed, folder_argument, require_one_process
from dex.common import exits

HELP = "did the experts specialise? every measure of a run with its references, as a page"
POSITION = 41
NEEDS = "train"

_FOLDER = "analysis"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    given = None if options.out is None else folder_argument("out", options.out)

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
    plain = set(settings.parts) == {"heldout"}
    out = given
    if given is None and not plain:
        if not job.is_run(Path(options.run)):
            raise ValueError(f"out: expected a folder, since {options.run} is not a run folder; give --out DIR")
        out = Path(options.run) / _FOLDER
    if out is not None:
        check_folder(out)
    config = prepared.loaded.config
    device = resolve_device(replace(config, run=replace(config.run, device=options.device)))

    def carry_out() -> int:
        from dex.report import analysis_page as page

        try:
            with exits.stopping(exits.STOP_SIGNALS), _progress.shown("dex analyse") as say:
                found = job.analyse(prepared, device, say)
                written = None if out is None else page.write(found, out)
        except exits.Stopped:
            print("dex analyse: stopped; nothing is written", file=sys.stderr)
            return exits.PREEMPTED
        except (ValueError, OSError) as error:
            return failed("dex analyse", error)
        for note in found.notes:
            print(f"{note}.")
        if plain:
            print(page.loss_table(found))
        else:
            print(page.concluded(found, found.found).text)
        print(page.about(found))
        if written is not None:
            print(written)
        return exits.DONE

    return carry_out


def _checkpoints(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _parser() -> Parser:
    parser = Parser(
        prog="dex analyse",
        description="Measures whether the experts of a trained model specialised: swap gap, ablations, routes, "
        "gradients, likeness, spectra, probe, each beside the model at step 0, chance, or pixels, with intervals over "
        "sources. Writes a self-contained page, each picture as a file, the numbers behind it as CSV, and all as "
        "findings.json. Reads only; images and models are not changed.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by a signal with nothing written.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint, or what dex export wrote")
    parser.add_argument("--data", metavar="DIR", help="data set with held-out images; that of the run without it")
    parser.add_argument(
        "--out", metavar="DIR", help="RUN/analysis without it; files of an earlier analysis are replaced"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="some of heldout (alone: a table of losses, and no page), routing, swap, ablation, gradients, similarity, "
        "features",
    )
    parser.add_argument("--images", type=int, default=256, metavar="N", help="held-out images, at most (256)")
    parser.add_argument(
        "--probed", type=int, default=512, metavar="N", help="images of the linear probe, at most (512)"
    )
    parser.add_argument(
        "--checkpoints",
        default="last",
        metavar="WHICH",
        help="last (without it); all, or N of them, for curves over the steps",
    )
    parser.add_argument(
        "--ema", action="store_true", help="measure the averages of the weights that optim.ema keeps, not the weights"
    )
    parser.add_argument("--compare", metavar="RUN2", help="another run on the same images: the monolithic control")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per forward (64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where it is")
    return parser
