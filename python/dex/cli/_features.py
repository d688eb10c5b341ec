"""What `dex embed` and `dex probe` share: options of the model and of how files are read."""

import argparse
import os
from typing import Any

from dex.common.shapes import Size, plain_size

_READING = ("modality", "planes", "normalisation", "volumes", "slope", "intercept", "frame_stride")


def add_options(parser: argparse.ArgumentParser) -> None:
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
        help="of volumes; auto: axial, but as stored of thick slices that are not",
    )
    group = parser.add_argument_group("reading", "as in dex prepare; for a run on a set that was prepared with them")
    group.add_argument(
        "--normalisation", metavar="RULE", help="ct, mr, pet, suv or display; of the modality without it"
    )
    group.add_argument("--volumes", metavar="WHICH", help="of files with several: first (without it), all, mean or N")
    group.add_argument("--slope", type=float, metavar="A", help="with --intercept B: numbers are A * stored + B, of")
    group.add_argument("--intercept", type=float, metavar="B", help="files other than DICOM")
    group.add_argument("--frame-stride", type=int, metavar="N", help="one frame in N of videos and multi-frame files")
    parser.add_argument("--path", choices=("experts", "director"), help="what the model computes with (experts)")
    add_img_size(parser)
    parser.add_argument("--ema", action="store_true", help="the average of the weights (optim.ema), not the weights")
    add_computing(parser, 64, "images")


def add_computing(parser: argparse.ArgumentParser, batch_size: int, of: str) -> None:
    """How files are read and a model computes; `of`: what a batch counts."""
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, metavar="N", help=f"{of} per forward ({batch_size})"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where it is")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read, each with limits on memory and time, so that a file that crashes or hangs costs "
        "only itself (one for each processor, at most 8). 0 reads in the command's own process, without these limits",
    )


def add_img_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--img-size", type=_size, metavar="S", help="side of the model's images, or HEIGHTxWIDTH (as trained)"
    )


def _size(text: str) -> Size:
    sides = text.lower().split("x")
    try:
        height, width = (int(side) for side in (sides * 2 if len(sides) == 1 else sides))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected pixels, such as 224 or 224x320; got {text!r}") from None
    return plain_size((height, width))


def reading(options: argparse.Namespace) -> dict[str, Any]:
    """What `dex.inference.collection.collection` takes of the options that were given."""
    given = {name: getattr(options, name) for name in _READING}
    return {name: value for name, value in given.items() if value is not None}


def workers(options: argparse.Namespace) -> int:
    """Processes that read."""
    if options.workers is not None:
        return options.workers
    from dex.common.ranks import ranks_here

    return max(1, min(8, len(os.sched_getaffinity(0)) // ranks_here()))
