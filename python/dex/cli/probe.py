"""`dex probe`: linear, kNN and few-shot probes of a trained model on labelled images."""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dex.cli import _features
from dex.cli._console import Parser, failed, folder_argument
from dex.common import exits

HELP = "linear, kNN and few-shot probes on labelled images, with intervals over patients"
POSITION = 43
NEEDS = "train,data"


def run(arguments: list[str]) -> Callable[[], int]:
    options = _parser().parse_args(arguments)
    out = folder_argument("out", options.out)

    from dex.common.ranks import announced
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
    if announced().world_size > 1:
        raise ValueError(f"WORLD_SIZE: expected one process, which dex probe runs in; got {announced().world_size}")
    labels = probe_job.read_labels(Path(options.labels) if options.labels else None, options.patient)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder; got the file {out}")
    if (out / probe_job.SHEET).exists():
        raise ValueError(
            f"out: expected a folder without results; {out / probe_job.SHEET} is there. Give another --out"
        )
    private = tempfile.TemporaryDirectory()  # the ids' salt: no id leaves; it goes with its last reference
    workers = _features.workers(options)
    where = Path(private.name) / "private"
    images = collection(Path(options.input), where, processes=workers, **_features.reading(options))
    probe_job.check_labels(images, labels)
    loaded = load(options.run, img_size=options.img_size, path=options.path, ema=options.ema)
    config = loaded.config
    device = resolve_device(replace(config, run=replace(config.run, device=options.device)))
    loaded.model.to(device)
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
        description="What frozen features are worth: a linear probe and kNN, cross-validated by patient, with BCa "
        "intervals over patients, and a few-shot curve. Accuracy is the mean over classes.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint, or what dex export wrote")
    parser.add_argument(
        "input", metavar="INPUT", help="folder with a sub-folder per class, or with --labels; shard set"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="for probe.csv and curve.png")
    parser.add_argument("--labels", metavar="CSV", help="columns path (below INPUT; or id), label and perhaps patient")
    parser.add_argument(
        "--patient",
        metavar="REGEX",
        help="searched in the path; group 1 is the patient. Without it: a DICOM header's patient, else the folder "
        "below the class, else each file is a patient",
    )
    parser.add_argument("--features", choices=("cls", "patches"), default="cls", help="CLS token or mean of patches")
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="of the cross-validation (5)")
    parser.add_argument("--k", type=int, default=20, metavar="K", help="neighbours (20)")
    parser.add_argument(
        "--shots",
        type=int,
        nargs="*",
        default=[1, 2, 4, 8, 16, 32],
        metavar="N",
        help="images per class (1 2 4 ... 32)",
    )
    parser.add_argument("--draws", type=int, default=10, metavar="N", help="of images, per number of shots (10)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of the split by patient (3)")
    _features.add_options(parser)
    return parser
