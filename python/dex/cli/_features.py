"""Options that several commands share: the model, what it computes on, and how files are read."""

import argparse
from typing import Any

from dex.common.cores import cores
from dex.common.shapes import Size, plain_size

_READING = ("modality", "planes", "normalisation", "volumes", "slope", "intercept", "frame_stride")


def add_options(parser: argparse.ArgumentParser) -> None:
    """All options of ``dex embed`` and ``dex probe`` except the input and output."""
    add_scans(parser)
    add_reading(parser.add_argument_group("reading", "as in dex prepare; give what the training set was prepared with"))
    add_weights(parser)
    add_computing(parser, 64, "images")


def add_reading(parser: argparse._ActionsContainer) -> None:
    """How the values and frames of files are read."""
    parser.add_argument(
        "--normalisation", metavar="RULE", help="ct, mr, pet, suv or display (default: that of the modality)"
    )
    parser.add_argument(
        "--volumes",
        metavar="WHICH",
        help="volumes to read from files with several: first, all, mean, or a number N for every N-th (default: first)",
    )
    parser.add_argument(
        "--slope",
        type=float,
        metavar="SLOPE",
        help="convert the stored values of files other than DICOM, such as PNG files of HU + 32768, to SLOPE * value + "
        "INTERCEPT; needs --intercept",
    )
    parser.add_argument("--intercept", type=float, metavar="INTERCEPT", help="see --slope")
    parser.add_argument(
        "--frame-stride",
        type=int,
        metavar="FRAMES",
        help="read one of every FRAMES frames of videos and multi-frame files",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint, or folder written by dex export")


def add_scans(parser: argparse.ArgumentParser) -> None:
    """Modality and planes of the files."""
    parser.add_argument(
        "--modality",
        metavar="MODALITY",
        help="modality of the files: CT, MR, PET, X-ray, ..., or from-folders for the name of a parent folder "
        "(default: read from DICOM headers; pictures are read as from a plain folder of images)",
    )
    parser.add_argument(
        "--planes",
        nargs="+",
        default=["auto"],
        choices=("auto", "axial", "coronal", "sagittal", "stored"),
        help="planes cut from volumes; auto is axial, but stored for thick slices in another plane",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Which weights of a model are used, and for which image size."""
    parser.add_argument(
        "--path",
        choices=("experts", "director"),
        help="compute with the routed experts or with the director alone (default: experts)",
    )
    parser.add_argument(
        "--img-size",
        type=_size,
        metavar="PIXELS",
        help="side of the model's images, or HEIGHTxWIDTH (default: as trained)",
    )
    add_ema(parser)


def add_ema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ema", action="store_true", help="use the running average of the weights (optim.ema)")


def add_computing(parser: argparse.ArgumentParser, batch_size: int, unit: str) -> None:
    """How files are read and the model computes; a batch has ``batch_size`` of ``unit``."""
    add_forward(parser, batch_size, unit)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 computes under autocast")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="PROCESSES",
        help="processes that read files, each with limits on memory and time, so that a file that crashes or hangs "
        "does not stop the others (default: one per processor, at most 8). 0 reads in the main process, without these "
        "limits",
    )


def add_forward(parser: argparse.ArgumentParser, batch_size: int, unit: str) -> None:
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, metavar=unit.upper(), help=f"{unit} per forward pass"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto uses CUDA if available")


def _size(text: str) -> Size:
    sides = text.lower().split("x")
    try:
        height, width = (int(side) for side in (sides * 2 if len(sides) == 1 else sides))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected pixels, such as 224 or 224x320, got {text!r}") from None
    return plain_size((height, width))


def reading(options: argparse.Namespace) -> dict[str, Any]:
    """The given options as arguments of ``dex.inference.collection.collection``."""
    given = {name: getattr(options, name) for name in _READING}
    return {name: value for name, value in given.items() if value is not None}


def workers(options: argparse.Namespace) -> int:
    """Number of reading processes."""
    if options.workers is not None:
        return options.workers
    from dex.common.ranks import ranks_here

    return max(1, min(8, cores() // ranks_here()))
