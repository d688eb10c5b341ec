"""``dex export``: write a trained model for other programs."""

from collections.abc import Callable

from dex.cli import _features
from dex.cli._console import Parser, failed, folder_argument
from dex.common import exits
from dex.common.folders import RUN, check_folder, require
from dex.common.units import format_bytes

HELP = "write a model as safetensors, Hugging Face, timm or ONNX"
POSITION = 44
NEEDS = "train,data,export"

_FORMATS = ("safetensors", "hf", "timm", "onnx", "torch-export")


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    out = folder_argument("out", options.out)
    check_folder(out)
    require(options.run, RUN)
    if options.format == "onnx":
        import onnx  # noqa: F401  Fails before anything is computed
        import onnxscript  # noqa: F401

    from dex.inference.export import check, export
    from dex.inference.load import choose_path_, load

    loaded = load(options.run, img_size=options.img_size, ema=options.ema)
    path = options.path
    if path is None and options.format == "timm" and loaded.encoder.dex_layers:
        path = "director"
    if path is not None:
        choose_path_(loaded.encoder, path)
    check(loaded, options.format, out)

    def carry_out() -> int:
        try:
            export(loaded, options.format, out)
        except OSError as error:
            return failed("dex export", error)
        size = sum(file.stat().st_size for file in out.iterdir())
        computed = loaded.path if loaded.encoder.dex_layers else "dense"
        print(f"{out}: {options.format}, {format_bytes(size)}, {computed}")
        return exits.DONE

    return carry_out


def _parser() -> Parser:
    parser = Parser(
        prog="dex export",
        description="Write a trained model for other programs, as a folder that appears complete or not at all. "
        "safetensors: for dex.load. hf: the same with a model card, for the Hugging Face Hub. timm: a dense ViT made "
        "of the directors, under timm's names. onnx, torch-export: the encoder as a graph of plain operators for any "
        "batch size, from images to tokens.",
    )
    _features.add_run(parser)
    parser.add_argument("--format", required=True, choices=_FORMATS, help="format to write, see above")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; new or empty")
    _features.add_weights(parser)
    return parser
