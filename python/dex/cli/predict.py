"""`dex predict`: masks, probabilities and overlays of new files by a fine-tuned model."""

import sys
from collections.abc import Callable
from dataclasses import replace

from dex.cli import _progress, _task_data
from dex.cli._console import Parser, check_folder, failed, folder_argument, require_one_process
from dex.common import exits

HELP = "masks or classes of new files by a fine-tuned model"
POSITION = 48
NEEDS = "train,data,adapt"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    require_one_process("dex predict")
    out = folder_argument("out", options.out)
    check_folder(out)

    from dex.cli._features import workers
    from dex.common.ranks import announced
    from dex.prepare.workers import WorkerFault
    from dex.tasks import predict
    from dex.tasks.load import load_task_model
    from dex.train.plan import resolve_device

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
    config = replace(loaded.config, run=replace(loaded.config.run, device=options.device))
    device = resolve_device(config, announced())
    files = predict.inputs(options.file)
    ids = predict.begin(loaded, files, job)
    loaded.model.to(device)

    def carry_out() -> int:
        try:
            with _progress.shown("dex predict") as say:
                summary = predict.run(loaded, files, ids, job, say)
        except predict.Stopped:
            print(f"dex predict: stopped; {out}: what is written stays; the same command goes on", file=sys.stderr)
            return exits.PREEMPTED
        except (OSError, FloatingPointError, WorkerFault) as error:
            return failed("dex predict", error)
        if summary.refused:
            why = ", ".join(f"{reason} {count:,}" for reason, count in summary.refused.items())
            where = predict.private_folder(out) / predict.FILES
            print(f"refused: {sum(summary.refused.values()):,} files ({why}); which and why is in {where}")
        if not summary.done:
            return failed("dex predict", "file: expected at least one that can be read; there is none")
        print(f"{out}: {summary.done:,} of {len(files):,} files, {out / predict.TABLE}")
        return exits.DONE

    return carry_out


def _parser() -> Parser:
    parser = Parser(
        prog="dex predict",
        description="What a fine-tuned model says of new files. A mask of a NIfTI, MHA or NRRD file has its shape, "
        "orientation and place; that of a DICOM series is a NIfTI file in the patient's space; that of a picture a PNG "
        "of its size. Classifications are a table. A file that cannot be used is refused by name and the others go on. "
        "Killed or stopped, the same command goes on with the files that are missing.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by a signal and resumable.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="what dex finetune wrote, or one of its checkpoint folders")
    parser.add_argument("file", nargs="+", metavar="FILE", help="files, DICOM folders, or folders of them")
    parser.add_argument(
        "--out", required=True, metavar="OUT", help="folder; OUT.private beside it says which file is which"
    )
    parser.add_argument("--probabilities", action="store_true", help="write the probability of every class as well")
    parser.add_argument("--overlays", action="store_true", help="draw the frame of each file that shows most")
    parser.add_argument("--public", action="store_true", help="readable ids from the files' names, not salted hashes")
    _task_data.add_model_options(parser)
    return parser
