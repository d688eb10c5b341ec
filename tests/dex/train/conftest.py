import time

import pytest

from dex.train.runlog import read_rows


@pytest.fixture
def wait_for_rows():
    """Waits until a run that a process has started has logged ``count`` rows."""

    def wait(process, out, count):
        deadline = time.monotonic() + 90
        while len(read_rows(out / "metrics.jsonl")) < count:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    return wait
