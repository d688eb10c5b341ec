"""Timing for the benchmarks: candidates take turns within one run, medians are compared, a table is printed.

These machines are shared: only ratios within one run mean anything, and every row names its baseline.
"""

import statistics
import time

import pytest
import torch

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption(
        "--tiny", action="store_true", help="smallest sizes, no speed asserted: every benchmark is executed"
    )
    parser.addoption("--threads", type=int, default=2, help="CPU threads of torch (default 2)")


def pytest_configure(config):
    config.stash[ROWS] = []
    torch.set_num_threads(config.getoption("--threads"))


@pytest.fixture(scope="session")
def tiny(request) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture
def compare(request, tiny):
    """``compare({name: callable}, ...) -> {name: median seconds}``, run in turns after warm-up."""

    def run(candidates: dict, rounds: int = 15, warmup: int = 3) -> dict:
        if tiny:
            rounds, warmup = 2, 1
        seconds = {name: [] for name in candidates}
        for i in range(warmup + rounds):
            for name, candidate in candidates.items():
                start = time.perf_counter()
                candidate()
                if i >= warmup:
                    seconds[name].append(time.perf_counter() - start)
        return {name: statistics.median(s) for name, s in seconds.items()}

    return run


@pytest.fixture
def report(request, tiny):
    """``report(case, baseline, ratio, at_least, detail)``: a row at the end; unless tiny the ratio is asserted."""

    def add(case: str, baseline: str, ratio: float, at_least: float, detail: str) -> None:
        request.config.stash[ROWS].append((case, baseline, f"{ratio:.2f}", f"{at_least:.2f}", detail))
        if not tiny:
            assert ratio >= at_least, f"{case}: {ratio:.2f} of {baseline}, expected at least {at_least:.2f} ({detail})"

    return add


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    size = "tiny sizes: these figures say nothing about speed" if config.getoption("--tiny") else "medians of one run"
    terminalreporter.section(f"speed as a multiple of the baseline's ({size})")
    header = ("case", "baseline", "ratio", "at least", "figures")
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        terminalreporter.write_line("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    terminalreporter.write_line(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, CPU")
