"""Progress of a command on stderr: a bar on a terminal, otherwise a line every 10 seconds."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_EVERY = 10.0
"""Seconds between lines."""

Say = Callable[[int, int, str], None]
"""``(done, total, current step)``"""


@contextlib.contextmanager
def shown(name: str) -> Iterator[Say]:
    """Yield the function that shows the progress of ``name``."""
    if not sys.stderr.isatty():
        yield _Lines(name)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(name),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


class _Lines:
    def __init__(self, name: str):
        self._name, self._printed_at = name, time.monotonic()

    def __call__(self, done: int, total: int, text: str) -> None:
        if done < total and time.monotonic() - self._printed_at >= _EVERY:
            print(f"{self._name} {done}/{total}  {text}", file=sys.stderr, flush=True)
            self._printed_at = time.monotonic()
