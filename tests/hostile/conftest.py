"""Files made to break readers, or to get something out of them: RELIABILITY rows 19 to 25.

`DEX_FUZZ=full` runs every case, a sample is run without it. The figures are printed at the end, and written as JSON to
the file that `DEX_FUZZ_OUT` names.
"""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.append(os.path.dirname(__file__))  # for the modules beside this one; started processes find them there too
FULL = os.environ.get("DEX_FUZZ") == "full"
_figures: dict[str, dict] = {}


@pytest.fixture(scope="session")
def full() -> bool:
    return FULL


@pytest.fixture(scope="session")
def figures() -> dict[str, dict]:
    """Row -> name -> value: what was measured, beside what was only tested."""
    return _figures


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Processes that these tests start are many, and a second thread each would only fight for the cores."""
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS",)}
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def pytest_terminal_summary(terminalreporter):
    if not _figures:
        return
    terminalreporter.section(f"hostile files, {'in full' if FULL else 'a sample'}")
    for row in sorted(_figures):
        for name, value in _figures[row].items():
            terminalreporter.write_line(f"{row}  {name}: {value}")
    if out := os.environ.get("DEX_FUZZ_OUT"):
        Path(out).write_text(json.dumps({"full": FULL, **_figures}, indent=1, sort_keys=True) + "\n")
