"""Exit codes of every command, and the signals that lead to them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

DONE = 0
FAILED = 1
"""It failed after its input was accepted; ``dex doctor``: pretraining cannot run here."""
USAGE = 2
"""Wrong usage or input: one line on stderr, and nothing was changed."""
NONFINITE = 3
"""Pretraining stopped after several non-finite steps in a row."""
PREEMPTED = 75
"""Stopped by a signal with all that is done saved. The same command goes on; for ``dex pretrain`` only with
``--resume auto``."""
INTERRUPTED = 130
"""Interrupted at once by a second SIGINT."""

SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers stop a run with."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What schedulers and people stop a run with."""


class Stopped(BaseException):
    """A signal asked the command to stop; the message is its name."""


@contextlib.contextmanager
def handled(handler: Callable[[int], None], signals: tuple[int, ...] = STOP_SIGNALS) -> Iterator[None]:
    """Call ``handler`` with the number of each of ``signals`` that comes in the block, and no longer.

    ``handler`` runs between two instructions of the main thread and may raise.
    """

    def note(number: int, frame: Any) -> None:
        handler(number)

    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """The stop signals that have come in the block so far; SIGINT after an earlier one raises KeyboardInterrupt."""
    received: list[int] = []

    def note(number: int) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    with handled(note):
        yield received


@contextlib.contextmanager
def stopping(signals: tuple[int, ...] = SCHEDULER_SIGNALS) -> Iterator[None]:
    """Raise `Stopped` when the first of ``signals`` comes in the block; later ones change nothing.

    It is raised once more at the end of the block if code in the block has swallowed it.
    """
    received: list[str] = []

    def stop(number: int) -> None:
        received.append(signal.Signals(number).name)
        if len(received) == 1:
            raise Stopped(received[0])

    with handled(stop, signals):
        yield
        if received:
            raise Stopped(received[0])


def ignore_stop_signals() -> None:
    """For worker processes: a scheduler signals the whole group, and the parent still needs them to finish."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def heed_interrupts() -> None:
    """For child processes: SIGINT ends them, also when a shell has started their parent in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
