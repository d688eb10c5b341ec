"""``dex doctor``: what works on this machine, what does not, and why. Needs only torch and numpy; tries the rest."""

import argparse
import importlib.metadata
import importlib.util
import io
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dex.cli._console import Parser
from dex.cli.pretrain import base_config
from dex.common import exits
from dex.common import formats as table

if TYPE_CHECKING:
    from dex.config import Config
    from dex.train.plan import Plan

HELP = "check what works on this machine, what does not, and why"
POSITION = 50
NEEDS = "train"

_NEEDED = ("safetensors", "PyYAML", "rich", "matplotlib", "tensorboard", "pillow")
_OPTIONAL = ("triton", "nibabel", "pydicom", "pylibjpeg")
_DISK_BYTES = 64 * 2**20
_LOADER_BATCHES, _LOADER_BATCH = 4, 32


class Check(NamedTuple):
    """One line of the report."""

    section: str
    name: str
    status: Literal["ok", "note", "failed"]
    """``failed``: pretraining cannot run. ``note``: pretraining can run, but something else cannot."""
    detail: str


def run(arguments: list[str]) -> Callable[[], int]:
    parser = Parser(
        prog="dex doctor",
        description="Say in a line what works here and what to do next, estimate how long a run would take, and check "
        "versions, devices, kernel backends, codecs, file formats, disk and data. Exit code 1 if pretraining cannot "
        "run.",
    )
    parser.add_argument("--data", metavar="DIR", help="data set to check and read (default: the one in the package)")
    parser.add_argument("--out", default="runs", metavar="DIR", help="folder for runs, whose disk is measured")
    parser.add_argument(
        "--preset", metavar="NAME", help="preset of the run whose time is estimated (default: demo without --config)"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of the run whose time is estimated")
    parser.add_argument("--all", action="store_true", help="also list every operator's backends and kernels")
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.strip():
        raise ValueError(f"data: expected a folder, got {options.data!r}")
    asked = _asked(options)
    return lambda: exits.FAILED if doctor(options.data, Path(options.out), asked, options.all) else exits.DONE


def _asked(options: argparse.Namespace) -> "Asked":
    """The run whose time is estimated. ValueError or FileNotFoundError: no such preset or file, or a wrong value."""
    name = options.preset or (None if options.config else "demo")
    words = [f"--preset {name}"] if name else []
    words += [f"--config {shlex.quote(options.config)}"] if options.config else []
    words += [f"--data {shlex.quote(options.data)}"] if options.data else []
    try:
        from dex.config import check
    except ModuleNotFoundError as error:  # Reported like every other missing package, as a check
        return Asked(None, " ".join(words), str(error))
    config = base_config(name, options.config, None)
    if options.data is not None:
        config = replace(config, data=replace(config.data, path=options.data))
    check(config)
    return Asked(config, " ".join(words))


class Asked(NamedTuple):
    """The run whose time is estimated."""

    config: "Config | None"
    words: str
    """The options of ``dex pretrain`` that start it."""
    missing: str = ""
    """Why there is no configuration: the package that it needs is not installed."""


def doctor(data: str | None, out: Path, asked: Asked, everything: bool = False) -> int:
    """Print the verdict and every check, and return the number of failed ones.

    data: data set to check and read; None takes the one in the package. out: folder for runs. everything: list each
    operator's backends and kernels.
    """
    checks: list[Check] = []
    sections = [versions, devices, *([operators, kernels] if everything else [backends]), codecs, formats]
    for section in (*sections, lambda: disk(out), lambda: data_set(data), command):
        checks += section()
    failed = [check for check in checks if check.status == "failed"]
    if failed:
        first = f"{failed[0].name}: {failed[0].detail}"
        print(f"pretraining cannot run: {len(failed)} of {len(checks)} checks failed, first {first}")
    else:
        plan = _planned(asked)
        if isinstance(plan, ValueError):
            print(f"pretraining can run, but not dex pretrain {asked.words}: {' '.join(str(plan).split())}")
        else:
            print(f"pretraining can run, {_used(plan)}; next: dex pretrain {asked.words}")
            print(f"time of dex pretrain {asked.words}: {_time(plan)}")
    print()
    _show(checks)
    return len(failed)


def _planned(asked: Asked) -> "Plan | ValueError":
    """The plan of the run, or why it cannot start."""
    if asked.config is None:
        return ValueError(asked.missing)
    from dex.train.plan import plan

    with tempfile.TemporaryDirectory(prefix="dex-doctor-") as folder:
        try:
            return plan(asked.config, Path(folder) / "run")
        except (ValueError, FileNotFoundError) as error:
            return ValueError(str(error))


def _used(plan: "Plan") -> str:
    """Device, precision and backends of the run, in words."""
    from dexkernels.ops import backends as table

    default = sorted({row.backend for row in table.report() if row.default})
    names = ["plain torch" if name == "reference" else f"the {name} kernels" for name in default]
    return f"on the {'GPU' if plan.device.type == 'cuda' else 'CPU'} in {plan.precision} with {' and '.join(names)}"


def _time(plan: "Plan") -> str:
    from dex.train.forecast import forecast

    try:
        return forecast(plan).sentence(plan.steps)
    except Exception as error:  # As in ``_try``: a step that fails is a result
        return f"not known: a step failed: {type(error).__name__}: {' '.join(str(error).split())}"


def versions() -> Iterator[Check]:
    yield Check("versions", "python", "ok", f"{platform.python_version()}, {platform.platform()}")
    for name in ("torch", "numpy", "dexkernels", *_NEEDED, *_OPTIONAL):
        try:
            yield Check("versions", name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            if name == "dexkernels":
                yield Check("versions", name, "note", "not installed; run from the source tree")
            elif name in _NEEDED:
                yield Check("versions", name, "failed", "not installed; pip install -e '.[train]' in the clone")
            else:
                yield Check("versions", name, "note", "not installed; optional")


def devices() -> Iterator[Check]:
    import torch

    from dex.train import cuda_graph

    capabilities = torch.cpu.get_capabilities()
    name = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    bf16 = "bf16 in hardware" if capabilities.get("avx512_bf16") else "bf16 only emulated, slower than fp32"
    yield Check("devices", "CPU", "ok", f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores used, {bf16}")
    if not torch.cuda.is_available():
        reason = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no device"
        yield Check("devices", "GPU", "note", f"none: {reason}")
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        detail = f"{gpu.name}, {memory}, sm_{gpu.major}{gpu.minor}, CUDA {torch.version.cuda}"
        yield Check("devices", f"GPU {i}", "ok", detail)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = cuda_graph.why_not(device, world_size=1, backend=None, experts=True)
    detail = f"parallel.cuda_graph, {cuda_graph.STATUS}: {reason or 'off by default'}"
    yield Check("devices", "CUDA graph", "note", detail)


def backends() -> Iterator[Check]:
    """One line for each backend: the operators it runs and is the default of, what is proven, and what it lacks."""
    from dexkernels.ops import backends as table

    rows = table.report()
    for backend in table.BACKENDS:
        its = [row for row in rows if row.backend == backend]
        available = [row.op for row in its if row.available]
        default = [row.op for row in its if row.default]
        parts = [f"runs {_operators(available, its)}"] if available else []
        parts += [f"default of {_operators(default, its)}"] if default else []
        reasons: dict[str, list[str]] = {}
        for row in its:
            if not row.available or backend != "reference":  # Kernels also say whether they are proven here
                reasons.setdefault(row.reason.replace(f" for {row.op}", ""), []).append(row.op)
        parts += [f"{reason} ({_operators(ops, its)})" for reason, ops in reasons.items()]
        yield Check("backends", backend, "ok" if available else "note", "; ".join(parts))


def _operators(some: list[str], rows: list[Any]) -> str:
    return f"all {len(rows)} operators" if len(some) == len(rows) else ", ".join(some)


def operators() -> Iterator[Check]:
    """Every operator and backend: whether it runs here, whether it is the default, its limits."""
    from dexkernels.ops import backends as table

    for row in table.report():
        text = ("default; " if row.default else "") + row.reason + (f"; {row.limits}" if row.limits else "")
        yield Check("operators", f"{row.op} {row.backend}", "ok" if row.available else "note", text)


def kernels() -> Iterator[Check]:
    """Where the kernels of each operator and backend have been executed: on an emulator, on a GPU, or never."""
    from dexkernels.ops import backends as table

    for row in table.report():
        if row.executed:
            yield Check("kernels", f"{row.op} {row.backend}", "ok", row.executed)


def codecs() -> Iterator[Check]:
    """Encode and decode a small picture with each codec."""
    for name, needed in (("JPEG", True), ("PNG", True), ("WEBP", False), ("JPEG2000", False)):
        yield _try("codecs", name, lambda name=name: _round_trip(name), needed)


def formats() -> Iterator[Check]:
    """The file formats that ``dex prepare`` reads, by suffix, and those that a plain folder of images may hold."""
    for format in table.FORMATS:
        suffixes, missing = " ".join(format.suffixes), format.missing()
        plain = "" if not format.plain else "; each is an image of a plain folder"
        if format.plain and format.plain != format.suffixes:
            plain = f"; {' '.join(format.plain)} also in a plain folder"
        if missing:
            lacking = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; {table.EXTRA}"
            yield Check("formats", format.title, "note", f"{suffixes}: {lacking} in the clone")
        else:
            libraries = ", ".join(dict.fromkeys(format.needs.values())) or "no library"
            note = f" ({format.note})" if format.note else ""
            yield Check("formats", format.title, "ok", f"{suffixes}{note}: read with {libraries}{plain}")


def disk(out: Path) -> Iterator[Check]:
    """Free space and write speed of the disk of ``out``, measured with a temporary file."""
    root = out.absolute()
    while not root.is_dir():
        root = root.parent
    yield Check("disk", "free", "ok", f"{shutil.disk_usage(root).free / 2**30:.1f} GiB under {root}")

    def write() -> str:
        block = os.urandom(2**20)
        with tempfile.TemporaryFile(dir=root, prefix=".dex-doctor-") as file:
            began = time.perf_counter()
            for _ in range(_DISK_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
        return f"{_DISK_BYTES / 1e6 / seconds:.0f} MB/s ({_DISK_BYTES // 2**20} MiB written and flushed to the disk)"

    yield _try("disk", "write", write, True)


def data_set(path: str | None) -> Iterator[Check]:
    """Verify the hashes of a shard set (only open any other folder), and measure images per second from the loader."""
    label = "embedded set" if path is None else path

    def check() -> str:
        from dex.data import open_dataset, verify
        from dex.data.dataset import EMBEDDED
        from dex.data.shard_format import MANIFEST

        dataset = open_dataset(path)
        counts = ", ".join(f"{name} {n}" for name, n in dataset.modality_counts().items())
        if not (Path(path or EMBEDDED) / MANIFEST).exists():
            return f"{len(dataset)} images: {counts}; a plain folder, no hashes to check"
        problems = verify(path)
        if problems:
            raise ValueError("; ".join(problems[:3]) + (f"; {len(problems) - 3} more" if len(problems) > 3 else ""))
        return f"{len(dataset)} images, every hash matches: {counts}"

    def read() -> str:
        from dex.data import Loader, augment, open_dataset, sample_keys

        train = open_dataset(path).split("train")
        batch_size = min(_LOADER_BATCH, len(train))
        with Loader(train, batch_size, seed=0) as loader:
            next(loader)
            began = time.perf_counter()
            batches = [next(loader) for _ in range(_LOADER_BATCHES)]
            reading = time.perf_counter() - began
            began = time.perf_counter()
            for batch in batches:
                augment(batch.images, 256, sample_keys(0, batch.places))
            augmenting = time.perf_counter() - began
        images = batch_size * _LOADER_BATCHES
        return f"{images / reading:.0f} images/s read by one process, {images / augmenting:.0f} augmented on the CPU"

    first = _try("data", label, check, True)
    yield first
    if first.status == "ok":
        yield _try("data", "loader", read, True)


def command() -> Iterator[Check]:
    """Whether the ``dex`` on PATH is this package. The file is read, not run."""
    path = shutil.which("dex")
    remedy = f"use {Path(sys.executable).name} -m dex"
    if path is None:
        yield Check("command", "dex", "note", f"not on PATH; {remedy}")
        return
    try:
        with open(path, "rb") as file:
            ours = b"dex.cli" in file.read(4096)
    except OSError:
        ours = False
    if not ours:
        yield Check("command", "dex", "note", f"{path} is another program; {remedy}")
    elif Path(path).resolve().parent != Path(sys.executable).absolute().parent:
        yield Check("command", "dex", "note", f"{path} belongs to a Python other than {sys.executable}; {remedy}")
    else:
        yield Check("command", "dex", "ok", path)


def _try(section: str, name: str, action: Callable[[], str], needed: bool) -> Check:
    try:
        return Check(section, name, "ok", action())
    except Exception as error:  # Any exception from a library is the result of the check
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Check(section, name, "failed" if needed else "note", text)


def _round_trip(name: str) -> str:
    import numpy as np
    from PIL import Image

    ramp = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8) * 4
    picture = np.stack([ramp, ramp.T, 255 - ramp], -1)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, name)
    back = np.asarray(Image.open(io.BytesIO(file.getvalue()), formats=[name]).convert("RGB"))
    error = int(np.abs(back.astype(int) - picture).max())
    allowed = 0 if name == "PNG" else 64
    if back.shape != picture.shape or error > allowed:
        raise ValueError(f"expected the picture within {allowed} of 255, got shape {back.shape}, off by {error}")
    return "encoded and decoded a picture"


def _show(checks: list[Check]) -> None:
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        for check in checks:
            print(f"{check.section:9} {check.status:7} {check.name}: {check.detail}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("", "check", "", "result"):
        table.add_column(title, overflow="fold")
    colour = {"ok": "green", "note": "yellow", "failed": "bold red"}
    previous = None
    for check in checks:
        section = check.section if check.section != previous else ""
        if section and previous:
            table.add_row()
        previous = check.section
        status = Text(check.status, colour[check.status])
        table.add_row(Text(section, "bold"), Text(check.name), status, Text(check.detail))
    Console().print(table)
