"""``dex embed``: compute features of images with a trained model."""

import sys
from collections.abc import Callable
from pathlib import Path

from dex.cli import _features
from dex.cli._console import Parser, failed, folder_argument
from dex.common import exits
from dex.common.folders import INPUT, RUN, check_file, check_folder, require

HELP = "compute features of images or scans, as Parquet or NPZ"
POSITION = 42
NEEDS = "train,data,adapt"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    out = folder_argument("out", options.out)
    single = out.suffix == ".npz"
    if not single:
        import pyarrow  # noqa: F401  Fails before anything is computed
    (check_file if single else check_folder)(out)
    require(options.run, RUN)
    require(Path(options.input), INPUT)

    from dex.common.ranks import announced
    from dex.inference import embed_job
    from dex.inference.collection import collection
    from dex.inference.load import load
    from dex.prepare.workers import WorkerFault
    from dex.train.plan import resolve_device

    check_folder(embed_job.private_folder(out))
    ranks = announced()
    loaded = load(options.run, img_size=options.img_size, path=options.path, ema=options.ema)
    device = resolve_device(options.device, ranks)
    job = embed_job.Options(
        out,
        tuple(options.layers),
        options.batch_size,
        options.precision,
        _features.workers(options),
        ranks.rank,
        ranks.world_size,
    )
    images = collection(
        Path(options.input),
        embed_job.private_folder(out),
        public=options.public,
        processes=job.workers,
        **_features.reading(options),
    )
    embed_job.begin(loaded, images, job)
    loaded.model.to(device)

    def carry_out() -> int:
        try:
            summary = embed_job.run(loaded, images, job, embed_job.say_to_stderr)
        except embed_job.Stopped:
            written = "nothing is written" if single else f"finished parts stay in {out}, and the same command resumes"
            print(f"dex embed: stopped; {written}", file=sys.stderr)
            return exits.PREEMPTED
        except (OSError, WorkerFault) as error:
            return failed("dex embed", error)
        if summary.refused:
            notes = embed_job.private_folder(out) / embed_job.NOTES
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary.refused.items())
            count = sum(summary.refused.values())
            print(f"refused: {count:,} files or parts of files ({reasons}); {notes} lists them")
            if summary.complete and not summary.images:
                return failed("dex embed", f"input: expected at least one readable image; {options.input} has none")
        print(f"{out}: {summary.images:,} images" + ("" if summary.complete else "; other ranks are still working"))
        return exits.DONE

    return carry_out


def _parser() -> Parser:
    parser = Parser(
        prog="dex embed",
        essentials=("modality", "planes", "path", "img_size", "batch_size", "device", "workers", "layers"),
        description="Compute features of images with a trained model: CLS token, mean of patches, chosen layers, "
        "experts and gates. After a kill or a stop, the same command computes the missing parts. Several ranks "
        "(torchrun -m dex embed ...) share the parts.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by a signal and resumable.",
    )
    _features.add_run(parser)
    parser.add_argument("input", metavar="INPUT", help="shard set, folder of pictures or scans, or a single file")
    parser.add_argument(
        "--out",
        required=True,
        metavar="OUT",
        help="folder for Parquet parts, or FILE.npz for small sets; OUT.private beside it maps ids to files",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        default=[],
        metavar="BLOCK",
        help="also write the CLS token after these blocks, counted from 0",
    )
    parser.add_argument(
        "--public", action="store_true", help="make readable ids from the paths of the files instead of salted hashes"
    )
    _features.add_options(parser)
    return parser
