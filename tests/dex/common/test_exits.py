import contextlib
import os
import signal
import subprocess
import sys

import pytest

from dex.common import exits


def test_codes_of_the_contract():
    assert (exits.DONE, exits.FAILED, exits.USAGE, exits.NONFINITE) == (0, 1, 2, 3)
    assert (exits.PREEMPTED, exits.INTERRUPTED) == (75, 130)


@pytest.mark.parametrize("number", exits.STOP_SIGNALS)
def test_signals_are_collected_and_handlers_come_back(number):
    before = [signal.getsignal(n) for n in exits.STOP_SIGNALS]
    with exits.collected() as received:
        assert received == []
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert received == [number, signal.SIGTERM]
    assert [signal.getsignal(n) for n in exits.STOP_SIGNALS] == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_interrupts_at_once(first):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), exits.collected():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_handlers_come_back_when_the_handler_raises():
    before = signal.getsignal(signal.SIGUSR1)

    def stop(number):
        raise RuntimeError(f"signal {number}")

    with pytest.raises(RuntimeError, match=f"signal {signal.SIGUSR1}"), exits.handled(stop, (signal.SIGUSR1,)):
        signal.raise_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.fixture
def interruptible():
    """A process that a shell has started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", exits.SCHEDULER_SIGNALS)
def test_a_scheduler_stops_a_block_once(number, interruptible):
    before = [signal.getsignal(n) for n in exits.STOP_SIGNALS]
    with pytest.raises(exits.Stopped, match=signal.Signals(number).name), exits.stopping():
        try:
            signal.raise_signal(number)
        finally:
            for again in exits.SCHEDULER_SIGNALS:
                signal.raise_signal(again)  # on the way out
    assert [signal.getsignal(n) for n in exits.STOP_SIGNALS] == before
    with pytest.raises(KeyboardInterrupt), exits.stopping():
        signal.raise_signal(signal.SIGINT)


def test_a_swallowed_stop_is_raised_at_the_end():
    reached = []
    with pytest.raises(exits.Stopped), exits.stopping():
        with contextlib.suppress(exits.Stopped):
            signal.raise_signal(signal.SIGTERM)
        reached.append(True)
    assert reached


def test_a_worker_outlives_a_signal_to_the_group():
    program = """
import signal
from dex.common import exits
exits.ignore_stop_signals()
for number in exits.STOP_SIGNALS:
    signal.raise_signal(number)
print("alive")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "alive\n")
