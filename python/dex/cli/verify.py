"""``dex verify``: prove the kernels on this machine's GPU, time them, and use the fastest from then on."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dex.cli._console import Parser, failed, require_one_process
from dex.common import exits
from dex.common.folders import check_file

if TYPE_CHECKING:
    from argparse import Namespace

    from dexkernels.verification.record import Sizes

HELP = "prove and time the kernels on this GPU; the fastest run then"
POSITION = 51
NEEDS = "train"

_SIZES = {
    "images": "images that a GPU computes at once (default: 224)",
    "tokens": "tokens per image including the CLS token; 1 if tokens are routed individually (default: 65)",
    "dim": "width of the network (default: 768)",
    "hidden_dim": "hidden width of an expert (default: 3072)",
    "num_experts": "experts per layer (default: 8)",
    "top_k": "experts per image (default: 2)",
}


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    require_one_process("dex verify")
    share = None if options.share is None else _file(options.share)
    if options.minutes <= 0:
        raise ValueError(f"minutes: expected a number above 0, got {options.minutes:g}")

    from dexkernels.verification import record
    from dexkernels.verification.identity import identity
    from dexkernels.verification.run import check_device, summary, verify

    sizes = _sizes(options)
    device = check_device(options.device)

    def carry_out() -> int:
        found = verify(sizes, device=device, seconds=60 * options.minutes, say=lambda line: print(line, flush=True))
        print(*summary(found), sep="\n")
        if share is not None:
            try:
                record.share(found, share)
            except OSError as error:
                return failed("dex verify", error)
            print(f"{share}: the record without paths and names, to be contributed or sent with a report")
        if record.load(identity(device))[0] is None:
            return failed("dex verify", f"the record was not kept; set {record.FOLDER} to a folder that can be written")
        return exits.FAILED if found.wrong() else exits.DONE

    return carry_out


def _parser() -> Parser:
    parser = Parser(
        prog="dex verify",
        description="Compare every kernel, forward and backward, with float64 on this GPU, and time it against plain "
        "torch, in under three minutes. The record is kept for this GPU, driver, torch, Triton and kernels; from then "
        "on every program takes the fastest backend that is right. Exit code 1 if a result is wrong.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of a pretraining run, whose sizes are timed")
    parser.add_argument("--preset", metavar="NAME", help="preset of dex pretrain, whose sizes are timed")
    for name, text in _SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="NUMBER", help=text)
    parser.add_argument("--device", default="cuda", metavar="DEVICE", help="CUDA device, such as cuda:1")
    parser.add_argument("--minutes", type=float, default=2.75, metavar="MINUTES", help="stop after this time")
    parser.add_argument("--share", metavar="FILE", help="also write the record without paths and names")
    return parser


def _file(text: str) -> Path:
    if not text.strip():
        raise ValueError(f"share: expected a file, got {text!r}")
    path = Path(text).expanduser()
    if not path.absolute().parent.is_dir():
        raise ValueError(f"share: expected a file in a folder that exists, got {path}")
    check_file(path, "share")
    return path


def _sizes(options: "Namespace") -> "Sizes":
    """Those of the configuration, if there is one, with what the options give."""
    from dexkernels.verification.cases import sizes_checked
    from dexkernels.verification.record import Sizes

    sizes = Sizes()
    if options.config is not None or options.preset is not None:
        from dex import config as configuration
        from dex.train.kernels import sizes_of

        chosen = configuration.preset(options.preset or "published-code")
        if options.config is not None:
            chosen = configuration.read_yaml(options.config, chosen)
        configuration.check(chosen)
        images = configuration.resolve_micro_batch(chosen, 1)
        sizes = sizes_of(chosen, images)
        if sizes is None:
            raise ValueError("config: expected a model with experts, got num_experts 0, which needs no kernels")
    given = {name: getattr(options, name) for name in _SIZES if getattr(options, name) is not None}
    return sizes_checked(sizes._asdict() | given)
