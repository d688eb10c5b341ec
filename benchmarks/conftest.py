"""Timing for the benchmarks: candidates take turns within one run, medians are compared, and a table is printed.

Machines may be shared, so only ratios within one run are meaningful, and every row names its baseline.
On a GPU (``--device cuda``) the rows can be written as a results file, see record.py and README.md.
"""

import datetime
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import torch

from dexkernels.ops import products
from dexkernels.verification.timing import in_turns, seconds_of

from . import cpu_record, peers, record
from .measuring import Measure
from .samples import Samples
from .shapes import SHAPES, tiny_of
from .timing import Timer


class WithoutPytestBenchmark:
    """Stands in for pytest-benchmark if it is not installed; only the results file matters then."""

    @pytest.fixture
    def benchmark(self) -> None:
        return None


ROWS = pytest.StashKey[list]()
MEASURED = pytest.StashKey[list]()
CEILINGS = pytest.StashKey[dict]()
COMMIT = pytest.StashKey[str]()
REJECTED = pytest.StashKey[str]()
NOTES = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption(
        "--tiny", action="store_true", help="smallest sizes: execute every benchmark without asserting speed"
    )
    parser.addoption("--threads", type=int, default=2, help="CPU threads of torch (default 2)")
    parser.addoption(
        "--processor-time",
        action="store_true",
        help="on a CPU: one thread, and its processor time instead of the clock, for a machine that others use",
    )
    parser.addoption("--cpu-results", type=Path, metavar="FILE", help="write the ratios on a CPU to this JSON file")
    parser.addoption("--results", type=Path, help="folder to write <gpu>-<date>.json into; needs --device cuda")
    parser.addoption(
        "--baseline", action="append", metavar="NAME", help="measure only against these peers (default: all present)"
    )
    parser.addoption("--shape", action="append", metavar="NAME", help="only these shapes, such as ViT-B (default: all)")
    parser.addoption(
        "--once", action="store_true", help="check and call every candidate once: kernels are compiled, no speed counts"
    )
    parser.addoption("--commit", help="commit hash for the results file (default: git's)")


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(WithoutPytestBenchmark())
    if config.getoption("benchmark_columns", None) is None:  # All columns are too wide for a terminal.
        config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]
    if config.getoption("--tiny") and not config.getoption("benchmark_json", None):
        config.option.benchmark_disable = True  # Tiny sizes give no meaningful table.
    config.stash[COMMIT] = config.getoption("--commit") or record.commit()
    config.stash[REJECTED] = ""
    config.stash[ROWS], config.stash[MEASURED], config.stash[CEILINGS], config.stash[NOTES] = [], [], {}, []
    if unknown := set(config.getoption("--baseline") or ()) - set(peers.PEERS):
        raise pytest.UsageError(f"--baseline: expected some of {', '.join(peers.PEERS)}, got {', '.join(unknown)}")
    if unknown := set(config.getoption("--shape") or ()) - set(SHAPES):
        raise pytest.UsageError(f"--shape: expected some of {', '.join(SHAPES)}, got {', '.join(unknown)}")
    torch.set_num_threads(1 if config.getoption("--processor-time") else config.getoption("--threads"))
    if config.getoption("--cpu-results") and (config.getoption("--tiny") or config.getoption("--device") == "cuda"):
        raise pytest.UsageError("--cpu-results: expected on a CPU and without --tiny")
    if config.getoption("--results") and (
        config.getoption("--tiny") or config.getoption("--once") or config.getoption("--device") != "cuda"
    ):
        raise pytest.UsageError("--results: expected with --device cuda and without --tiny or --once")


def pytest_collection_modifyitems(config, items):
    gpu, tiny = config.getoption("--device") == "cuda", config.getoption("--tiny")
    if shapes := config.getoption("--shape"):
        left_out = [item for item in items if _shape_of(item) not in (None, *shapes)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        if item.path.name.startswith("test_gpu_"):
            if not gpu and not tiny:
                item.add_marker(pytest.mark.skip(reason="measured on a GPU (--device cuda); --tiny executes it here"))
        elif gpu and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason="a benchmark of the CPU"))


def _shape_of(item) -> str | None:
    """The name of the shape, or size of model, that a benchmark measures."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("shape_name", parameters.get("size"))


@pytest.fixture(scope="session")
def tiny(request) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture(scope="session")
def timer(request, tiny) -> Timer:
    timer = Timer(torch.device(request.config.getoption("--device")), tiny)
    if request.config.getoption("--once"):
        timer.rounds, timer.warmup = 1, 0
    return timer


@pytest.fixture(scope="session")
def ceilings(request, timer) -> dict:
    """The machine's limits, measured once per results file: a run that adds to a file uses the limits in it."""
    limits = request.config.stash[CEILINGS]
    if request.config.getoption("--results"):
        earlier = record.earlier(request.config.getoption("--results"), _head(request.config))
        limits.update(earlier["ceilings"] if earlier else {})
    if not limits:
        limits.update(timer.ceilings())
    return limits


@pytest.fixture
def measured(request, tiny):
    """``measured(row)`` adds a row to the results file, see record.ROW, or returns its faults.

    The file is written after every benchmark, so one that hangs or is killed loses only its own rows.
    """

    def add(row: dict) -> list[str]:
        faults = [fault for fault in record.row_problems(row) if not (tiny and fault.startswith("share_of_limit"))]
        if not faults:
            request.config.stash[MEASURED].append(row)
        return faults

    yield add
    _write(request.config)


@pytest.fixture(params=SHAPES)
def shape_name(request) -> str:
    return request.param


@pytest.fixture
def shape(shape_name, tiny) -> dict:
    return tiny_of(shape_name) if tiny else SHAPES[shape_name]


@pytest.fixture
def samples(benchmark) -> Samples:
    return Samples(benchmark)


@pytest.fixture
def measure(request, timer, ceilings, measured, samples) -> Measure:
    config = request.config
    return Measure(timer, ceilings, measured, samples, config.getoption("--backend"), config.stash[NOTES])


@pytest.fixture(scope="session")
def own_library() -> bool:
    """Whether float32 products use another library than torch's own."""
    return products.uses_onednn()


@pytest.fixture
def compare(request, tiny, samples):
    """``compare({name: callable}, ...) -> {name: median seconds}``; candidates run in turns after a warm-up."""
    clock = time.process_time if request.config.getoption("--processor-time") else time.perf_counter

    def run(candidates: dict, rounds: int = 15, warmup: int = 3, case: str = "") -> dict:
        if tiny:
            rounds, warmup = 2, 1
        seconds = in_turns(candidates, rounds, warmup, lambda candidate, turn: seconds_of(candidate, clock))
        samples.add(seconds, case)
        return {name: statistics.median(s) for name, s in seconds.items()}

    return run


@pytest.fixture
def report(request, tiny, samples):
    """``report(case, baseline, ratio, at_least, detail, goal)`` adds a row to the summary; unless tiny, asserts the
    ratio. goal: the ratio to aim at, if this processor may not reach it; by default at_least."""

    def add(case: str, baseline: str, ratio: float, at_least: float, detail: str, goal: float | None = None) -> None:
        request.config.stash[ROWS].append(cpu_record.Row(case, baseline, ratio, at_least, goal or at_least, detail))
        samples.say(**{f"ratio to {baseline}": ratio, f"least ratio to {baseline}": at_least})
        if not tiny:
            assert ratio >= at_least, f"{case}: {ratio:.2f} of {baseline}, expected at least {at_least:.2f} ({detail})"

    return add


def _write(config) -> None:
    folder, rows = config.getoption("--results"), config.stash[MEASURED]
    if folder is not None and rows:
        result = _head(config) | {"ceilings": config.stash[CEILINGS], "rows": rows}
        config.stash[REJECTED] = record.add(result, folder)


def _head(config) -> dict:
    return {
        "device": torch.cuda.get_device_name(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": config.stash[COMMIT],
        "versions": _versions(),
    }


def _versions() -> dict:
    import dexkernels

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "absent"
    major, minor = torch.cuda.get_device_capability()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, env=os.environ).stdout.strip() or "unknown"
    except OSError:
        driver = "unknown"
    return {
        "architecture": f"sm_{major}{minor}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": str(torch.version.cuda),
        "driver": driver,
        "dexkernels": dexkernels.__version__,
        **peers.versions(),
    }


def pytest_terminal_summary(terminalreporter, config):
    rows, measured = config.stash[ROWS], config.stash[MEASURED]
    size = "tiny sizes: not a measure of speed" if config.getoption("--tiny") else "medians of one run"
    if rows:
        terminalreporter.section(f"speed relative to the baseline ({size})")
        header = ("case", "baseline", "ratio", "at least", "goal", "figures")
        _table(terminalreporter, header, [[_cell(value) for value in row] for row in rows])
        if config.getoption("--cpu-results"):
            cpu_record.write(config.getoption("--cpu-results"), rows, config.stash[COMMIT], config.option)
        terminalreporter.write_line(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, CPU")
    if measured:
        terminalreporter.section(f"operators and layer on {config.getoption('--device')} ({size})")
        keys = ("case", "backend", "dtype", "baseline", "ms", "ratio", "tflops", "gbps", "share_of_limit")
        keys = (*keys, "max_rel_err", "peak_mb")
        cells = [[" ".join(f"{k}{v}" for k, v in r["shape"].items()), *(_cell(r[k]) for k in keys)] for r in measured]
        _table(terminalreporter, ("shape", *keys), cells)
        terminalreporter.write_line(f"limits of this run: {config.stash[CEILINGS]}")
        for note in config.stash[NOTES]:
            terminalreporter.write_line(note)
        absent = "; ".join(f"{module}: {reason}" for module, reason in peers.absent().items())
        terminalreporter.write_line(f"not timed: {absent}")
    if config.stash[REJECTED]:
        terminalreporter.write_line(f"rejected, results are in rejected.json: {config.stash[REJECTED]}", red=True)


def _cell(value) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value:.3g}"


def _table(terminalreporter, header, rows) -> None:
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        terminalreporter.write_line("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
