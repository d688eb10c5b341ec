"""Exit codes of all commands, and the signals that lead to them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

DONE = 0
FAILED = 1
"""Failed after validation; ``dex doctor``: pretraining cannot run here."""
USAGE = 2
"""Wrong usage or input: one line on stderr, and nothing was changed."""
NONFINITE = 3
"""Training stopped after several consecutive non-finite steps."""
PREEMPTED = 75
"""Stopped by a signal with all finished work saved. The same command resumes; ``dex pretrain`` needs ``--resume auto``.
"""
INTERRUPTED = 130
"""Interrupted at once by a second SIGINT."""

_USER_SIGNALS = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()  # Windows has none
SCHEDULER_SIGNALS = (signal.SIGTERM, *_USER_SIGNALS)
"""Signals with which schedulers stop a run."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *_USER_SIGNALS)
"""Signals with which schedulers and users stop a run."""


class Stopped(BaseException):
    """A signal asked the command to stop; the message is its name."""


@contextlib.contextmanager
def handled(handler: Callable[[int], None], signals: tuple[int, ...] = STOP_SIGNALS) -> Iterator[None]:
    """Call ``handler`` with the number of each of ``signals`` that arrives in the block.

    ``handler`` runs between two instructions of the main thread and may raise.
    """

    def note(number: int, frame: Any) -> None:
        handler(number)

    previous = {number: signal.signal(number, note) for number in signals}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """List of the stop signals received in the block; a SIGINT after an earlier signal raises KeyboardInterrupt."""
    received: list[int] = []

    def note(number: int) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    with handled(note):
        yield received


@contextlib.contextmanager
def stopping(signals: tuple[int, ...] = SCHEDULER_SIGNALS) -> Iterator[None]:
    """Raise ``Stopped`` at the first of ``signals`` in the block; later signals are ignored.

    It is raised again at the end of the block if code in the block has swallowed it.
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
    """For worker processes: a scheduler signals the whole group, but the parent still needs its workers to finish."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def heed_interrupts() -> None:
    """For child processes: let SIGINT end them, even if a shell started their parent in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
