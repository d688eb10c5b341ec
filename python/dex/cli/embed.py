"""`dex embed`: features of images by a trained model."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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

    from dex.common.ranks import announced, default_workers
    from dex.inference import embed_job
    from dex.inference.collection import collection
    from dex.inference.load import load
    from dex.train.plan import resolve_device

    ranks = announced()
    loaded = load(options.run, img_size=options.img_size, path=options.path)
    config = loaded.config
    device = resolve_device(replace(config, run=replace(config.run, device=options.device)), ranks)
    job = embed_job.Options(
        out,
        tuple(options.layers),
        options.batch_size,
        options.precision,
        default_workers(device.type) if options.workers is None else options.workers,
        ranks.rank,
        ranks.world_size,
    )
    images = collection(
        Path(options.input),
        embed_job.private_folder(out),
        modality=options.modality,
        planes=options.planes,
        public=options.public,
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
        except OSError as error:
            return failed("dex embed", error)
        if summary.refused:
            notes = embed_job.private_folder(out) / embed_job.NOTES
            print(f"refused: {summary.refused:,} files or parts of files; which and why is in {notes}")
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
        "--modality",
        metavar="M",
        help="of scans and pictures: CT, MR, PET, X-ray, ..., or from-folders; without it DICOM says it and pictures "
        "are taken as a plain folder of images gives them",
    )
    parser.add_argument(
        "--planes",
        nargs="+",
        default=["auto"],
        choices=("auto", "axial", "coronal", "sagittal", "stored"),
        help="of volumes; auto: as they were acquired",
    )
    parser.add_argument(
        "--layers", nargs="+", type=int, default=[], metavar="L", help="blocks, from 0, whose CLS token is wanted too"
    )
    parser.add_argument("--path", choices=("experts", "director"), help="what the model computes with (experts)")
    parser.add_argument("--img-size", type=int, metavar="S", help="side of the model's images (as trained)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per forward (64)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where it is")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read ahead; 0, the default on a CPU, reads between the forwards",
    )
    parser.add_argument("--public", action="store_true", help="readable ids from the files' paths, not salted hashes")
    return parser
