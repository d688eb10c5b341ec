"""``dex predict``: masks, probabilities and overlays for new files from a fine-tuned model."""

import sys
from collections.abc import Callable
from pathlib import Path

from dex.cli import _progress, _task_data
from dex.cli._console import Parser, failed, folder_argument, require_one_process
from dex.common import exits
from dex.common.folders import FILE, TUNED, check_folder, require

HELP = "predict masks or classes of files with a fine-tuned model"
POSITION = 48
NEEDS = "train,data,adapt"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    out = folder_argument("out", options.out)
    check_folder(out)
    require(options.folder, TUNED)
    for file in filter(None, options.file):
        require(Path(file).expanduser(), FILE)
    require_one_process("dex predict")

    from dex.cli._features import workers
    from dex.prepare.workers import WorkerFault
    from dex.tasks import predict
    from dex.tasks.load import load_task_model
    from dex.train.plan import resolve_device

    check_folder(predict.private_folder(out))
    job = predict.Options(
        out,
        options.probabilities,
        options.overlays,
        options.public,
        options.batch_size,
        options.precision,
        options.window,
        workers(options),
    )
    loaded = load_task_model(options.folder, options.checkpoint)
    device = resolve_device(options.device)
    files = predict.inputs(options.file, out)
    items = predict.parted(files, loaded.task, options.series or ())
    ids = predict.begin(loaded, items, job)
    loaded.model.to(device)

    def carry_out() -> int:
        try:
            with _progress.shown("dex predict") as say:
                summary = predict.run(loaded, items, ids, job, say)
        except predict.Stopped:
            print(f"dex predict: stopped; finished files stay in {out}, and the same command resumes", file=sys.stderr)
            return exits.PREEMPTED
        except (OSError, FloatingPointError, WorkerFault) as error:
            return failed("dex predict", error)
        if summary.refused:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary.refused.items())
            table = predict.private_folder(out) / predict.FILES
            print(f"refused: {sum(summary.refused.values()):,} files ({reasons}); {table} lists them")
        if not summary.done:
            return failed("dex predict", f"file: expected at least one readable file, got none; {summary.example}")
        print(f"{out}: {summary.done:,} of {len(items):,} files, {out / predict.TABLE}")
        return exits.DONE

    return carry_out


def _parser() -> Parser:
    parser = Parser(
        prog="dex predict",
        description="Predict masks or classes of new files with a fine-tuned model. The mask of a NIfTI, MHA or NRRD "
        "file has the same shape, orientation and position; that of a DICOM series is a NIfTI file in patient "
        "coordinates; that of a picture is a PNG of the same size. Classes are written as a table. A file that cannot "
        "be used is refused with the reason, and the rest are predicted. After a kill or a stop, the same command "
        "predicts the missing files.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by a signal and resumable.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder written by dex finetune, or one of its checkpoints")
    parser.add_argument("file", nargs="+", metavar="FILE", help="files, DICOM folders, or folders of either")
    parser.add_argument(
        "--out", required=True, metavar="OUT", help="output folder; OUT.private beside it maps ids to files"
    )
    parser.add_argument(
        "--series",
        action="append",
        metavar="N|UID",
        help="of DICOM data only the series of this Series Number or Series Instance UID; may be repeated (all, "
        "each in its own file)",
    )
    parser.add_argument("--probabilities", action="store_true", help="also write the probability of every class")
    parser.add_argument(
        "--overlays", action="store_true", help="draw the mask over the frame of each file where it is largest"
    )
    parser.add_argument(
        "--public", action="store_true", help="make readable ids from the names of the files instead of salted hashes"
    )
    _task_data.add_model_options(parser)
    return parser
