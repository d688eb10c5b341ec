"""`dex explain`: why these experts for this scan?"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dex.cli import _progress
from dex.cli._console import Parser, check_folder, failed, require_one_process
from dex.common import exits

HELP = "why a trained model takes these experts for one scan, and what others would cost"
POSITION = 41
NEEDS = "train,data"

_PAGE = "explain.html"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    if options.out is not None and not options.out.strip():
        raise ValueError(f"out: expected a file; got {options.out!r}")
    out = Path(_PAGE if options.out is None else options.out).expanduser()
    if out.is_dir():
        raise ValueError(f"out: expected a file to write; got the folder {out}")

    from dex.inference import explain_job as job
    from dex.train.plan import resolve_device

    require_one_process("dex explain")
    settings = job.Options(options.image, options.masks, options.train, options.neighbours, options.batch_size)
    prepared = job.prepare(
        options.run, options.file, settings, modality=options.modality, planes=options.planes, data=options.data
    )
    check_folder(out.absolute().parent)
    config = prepared.loaded.config
    device = resolve_device(replace(config, run=replace(config.run, device=options.device)))

    def carry_out() -> int:
        from dex.report import explain_page as page

        try:
            with exits.stopping(exits.STOP_SIGNALS), _progress.shown("dex explain") as say:
                found = job.explain(prepared, device, say)
                page.write(found, out)
        except exits.Stopped:
            print("dex explain: stopped; nothing is written", file=sys.stderr)
            return exits.PREEMPTED
        except (ValueError, OSError) as error:
            return failed("dex explain", error)
        for note in found.notes:
            print(f"{note}.")
        print(page.sentence(found))
        print(f"{out}, which holds the scan and training images")
        return exits.DONE

    return carry_out


def _parser() -> Parser:
    parser = Parser(
        prog="dex explain",
        description="Why a model takes these experts for one scan: its route by layer, the masked loss with other "
        "experts and with those of each modality, and the training images that are most alike, as one page. Reads "
        "only; the page holds the scan, and only its owner can read it (mode 0600).",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by a signal with nothing written.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint, or what dex export wrote")
    parser.add_argument("file", metavar="FILE", help="picture, volume, or folder of a DICOM series")
    parser.add_argument("--modality", metavar="M", help="CT, MR, PET, X-ray, ...; DICOM says it itself")
    parser.add_argument(
        "--planes",
        nargs="+",
        default=["auto"],
        choices=("auto", "axial", "coronal", "sagittal", "stored"),
        help="of volumes; auto: axial, but as stored of thick slices that are not",
    )
    parser.add_argument("--image", metavar="LABEL", help="which image of a volume (axial-012); without it a middle one")
    parser.add_argument("--data", metavar="DIR", help="data set with the training images; that of the run without it")
    parser.add_argument("--out", metavar="FILE.html", help=f"{_PAGE} here without it")
    parser.add_argument("--masks", type=int, default=16, metavar="N", help="masks that losses are the mean of (16)")
    parser.add_argument("--train", type=int, default=512, metavar="N", help="training images compared, at most (512)")
    parser.add_argument("--neighbours", type=int, default=8, metavar="N", help="training images shown (8)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per forward (64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where it is")
    return parser
