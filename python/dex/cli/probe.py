"""``dex probe``: linear, kNN and few-shot probes of a trained model on labelled images."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from dex.cli import _features
from dex.cli._console import Parser, failed, folder_argument, require_one_process
from dex.common import exits
from dex.common.folders import INPUT, RUN, check_folder, require

HELP = "run linear, kNN and few-shot probes on labelled images"
POSITION = 43
NEEDS = "train,data"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    out = folder_argument("out", options.out)
    check_folder(out)
    require(options.run, RUN)
    require(Path(options.input), INPUT)

    from dex.inference import probe_job
    from dex.inference.collection import collection
    from dex.inference.embed_job import Options, Stopped
    from dex.inference.load import load
    from dex.prepare.workers import WorkerFault
    from dex.train.plan import resolve_device

    settings = probe_job.Settings(
        options.features, options.folds, options.k, tuple(options.shots), options.draws, options.seeds
    )
    probe_job.check(settings)
    require_one_process("dex probe")
    labels = probe_job.read_labels(Path(options.labels) if options.labels else None, options.patient)
    if (out / probe_job.SHEET).exists():
        raise ValueError(
            f"out: expected a folder without results; {out / probe_job.SHEET} exists. Choose another --out"
        )
    # Holds the salt of the ids until the last reference is gone; no id is written anywhere else
    private = tempfile.TemporaryDirectory()
    workers = _features.workers(options)
    folder = Path(private.name) / "private"
    images = collection(Path(options.input), folder, processes=workers, **_features.reading(options))
    probe_job.check_labels(images, labels)
    loaded = load(options.run, img_size=options.img_size, path=options.path, ema=options.ema)
    loaded.model.to(resolve_device(options.device))
    job = Options(out, (), options.batch_size, options.precision, workers)

    def carry_out() -> int:
        try:
            with private:
                result = probe_job.probe(loaded, images, labels, settings, job)
            probe_job.write(result, out)
        except Stopped:
            print("dex probe: stopped; nothing is written", file=sys.stderr)
            return exits.PREEMPTED
        except (ValueError, OSError, WorkerFault) as error:
            return failed("dex probe", error)
        counts = result.data.labels.bincount().tolist()
        print(f"{len(result.data.labels):,} images of {int(result.data.patients.max()) + 1:,} patients: ", end="")
        print(probe_job.describe(counts, result.names))
        print(probe_job.table(result))
        for line in probe_job.left_out(result, out):
            print(line)
        print(f"{out / probe_job.SHEET}")
        return exits.DONE

    return carry_out


def _parser() -> Parser:
    parser = Parser(
        prog="dex probe",
        essentials=(
            "modality",
            "planes",
            "path",
            "img_size",
            "batch_size",
            "device",
            "workers",
            "labels",
            "patient",
            "features",
            "shots",
        ),
        description="Evaluate frozen features with a linear probe and kNN, cross-validated by patient, with BCa "
        "intervals over patients, and with a few-shot curve. Accuracy is the mean over classes.",
    )
    _features.add_run(parser)
    parser.add_argument(
        "input", metavar="INPUT", help="folder with a sub-folder per class; with --labels, any folder; or a shard set"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for probe.csv and curve.png")
    parser.add_argument(
        "--labels", metavar="CSV", help="table with columns path (below INPUT) or id, label and optionally patient"
    )
    parser.add_argument(
        "--patient",
        metavar="REGEX",
        help="regular expression searched in each path; group 1 is the patient (default: the patient in the DICOM "
        "header, else the folder below the class, else each file is a patient)",
    )
    parser.add_argument(
        "--features",
        choices=("cls", "patches"),
        default="cls",
        help="features to probe: the CLS token or the mean of the patches",
    )
    parser.add_argument("--folds", type=int, default=5, metavar="COUNT", help="folds of the cross-validation")
    parser.add_argument("--k", type=int, default=20, metavar="NEIGHBOURS", help="neighbours of kNN")
    parser.add_argument(
        "--shots",
        type=int,
        nargs="*",
        default=[1, 2, 4, 8, 16, 32],
        metavar="IMAGES",
        help="images per class of the few-shot curve",
    )
    parser.add_argument("--draws", type=int, default=10, metavar="COUNT", help="random draws per number of shots")
    parser.add_argument("--seeds", type=int, default=3, metavar="COUNT", help="random splits by patient")
    _features.add_options(parser)
    return parser
