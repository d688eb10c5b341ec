"""`dex embed`: features of images by a trained model."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dex.cli import _features
from dex.cli._console import Parser, failed, folder_argument
from dex.common import exits

HELP = "features of images, scans or a shard set, as Parquet or NPZ"
POSITION = 42
NEEDS = "train,data,adapt"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    out = folder_argument("out", options.out)
    single = out.suffix == ".npz"
    if not single:
        import pyarrow  # noqa: F401  before anything is computed

    from dex.common.ranks import announced
    from dex.inference import embed_job
    from dex.inference.collection import collection
    from dex.inference.load import load
    from dex.prepare.workers import WorkerFault
    from dex.train.plan import resolve_device

    ranks = announced()
    loaded = load(options.run, img_size=options.img_size, path=options.path, ema=options.ema)
    config = loaded.config
    device = resolve_device(replace(config, run=replace(config.run, device=options.device)), ranks)
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
            rest = "nothing is written" if single else f"{out}: what is written stays; the same command goes on"
            print(f"dex embed: stopped; {rest}", file=sys.stderr)
            return exits.PREEMPTED
        except (OSError, WorkerFault) as error:
            return failed("dex embed", error)
        if summary.refused:
            notes = embed_job.private_folder(out) / embed_job.NOTES
            why = ", ".join(f"{reason} {count:,}" for reason, count in summary.refused.items())
            count = sum(summary.refused.values())
            print(f"refused: {count:,} files or parts of files ({why}); which and why is in {notes}")
            if summary.complete and not summary.images:
                return failed(
                    "dex embed", f"input: expected at least one image that can be read; {options.input} has none"
                )
        print(f"{out}: {summary.images:,} images" + ("" if summary.complete else "; other ranks are still at work"))
        return exits.DONE

    return carry_out


def _parser() -> Parser:
    parser = Parser(
        prog="dex embed",
        description="Features of images by a trained model: CLS token, mean of patches, chosen layers, experts and "
        "gates. Killed or stopped, the same command goes on with the parts that are missing. Several ranks "
        "(torchrun -m dex embed ...) share the parts.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by a signal and resumable.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint, or what dex export wrote")
    parser.add_argument("input", metavar="INPUT", help="shard set, folder of pictures or scans, or one file")
    parser.add_argument(
        "--out",
        required=True,
        metavar="OUT",
        help="folder of Parquet parts, or FILE.npz for small sets; OUT.private beside it says which file is which",
    )
    parser.add_argument(
        "--layers", nargs="+", type=int, default=[], metavar="L", help="blocks, from 0, whose CLS token is wanted too"
    )
    parser.add_argument("--public", action="store_true", help="readable ids from the files' paths, not salted hashes")
    _features.add_options(parser)
    return parser
