"""Who is alive: every rank tells the others, through the store that they started with, how far it has come.

A rank that gives no sign of life, or does not come on while the others wait, is named with all that is known of it;
every rank that still runs then writes the stacks of its threads and ends, so that no job hangs for hours.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any

import torch.distributed as dist

from dex.distributed import Ranks

INTERVAL = 1.0
DEAD_AFTER = 15.0
"""Seconds without a sign of life from a process after which it is called dead or stopped."""
EXIT_FAILED = 1


class Watch:
    """A thread beside training. ``at(step, phase)`` says how far this rank is; timeout: longest stay at one place."""

    def __init__(self, ranks: Ranks, timeout: float):
        self.ranks, self.timeout = ranks, timeout
        self._place: dict[str, Any] = {"step": 0, "phase": "start"}
        self._since = time.monotonic()
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = None
        if ranks.world_size > 1:
            self._store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            self._tell(beat=0)
            self._seen = {r: (dict(self._place), self._since) for r in range(ranks.world_size) if r != ranks.rank}
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def at(self, step: int, phase: str) -> None:
        self._place = {"step": step, "phase": phase}
        self._since = time.monotonic()

    def close(self) -> None:
        """This rank is done: it is no longer waited for, and waits for nobody."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            try:
                self._tell(done=True)
            except RuntimeError:
                pass  # whoever held the store has ended already

    def explain(self, error: BaseException) -> None:
        """End this process when ``error`` comes from a rank that is gone, naming it; return when all are alive."""
        self._error = error
        deadline = time.monotonic() + DEAD_AFTER + 5 * INTERVAL
        while time.monotonic() < deadline and self._thread is not None:
            time.sleep(INTERVAL / 2)

    def _run(self) -> None:
        beat = 0
        while not self._stop.wait(INTERVAL):
            beat += 1
            try:
                self._tell(beat=beat)
                self._look()
            except RuntimeError as error:
                if not self._stop.is_set():
                    self._end(
                        f"the store of the ranks is gone, rank 0 or the launcher has ended ({type(error).__name__})"
                    )
            if time.monotonic() - self._since > self.timeout:
                self._end(f"no step for {self.timeout:.0f} s; {self._furthest_behind()}")

    def _tell(self, **more: Any) -> None:
        entry = {**self._place, "host": socket.gethostname(), "pid": os.getpid(), **more}
        self._store.set(f"dex/alive/{self.ranks.rank}", json.dumps(entry))

    def _look(self) -> None:
        now = time.monotonic()
        for rank, (before, _) in list(self._seen.items()):
            key = f"dex/alive/{rank}"
            entry = json.loads(self._store.get(key)) if self._store.check([key]) else before
            if before != entry:
                self._seen[rank] = (entry, now)
            elif not entry.get("done") and now - self._seen[rank][1] > DEAD_AFTER:
                self._end(f"{self._words(rank)}: no sign of life for {DEAD_AFTER:.0f} s, killed or stopped")

    def _furthest_behind(self) -> str:
        places = {rank: entry for rank, (entry, _) in self._seen.items() if not entry.get("done")}
        places[self.ranks.rank] = self._place
        first = min(places.values(), key=lambda entry: entry["step"])["step"]
        behind = [rank for rank, entry in places.items() if entry["step"] == first]
        # Those that wait in a collective are not what is waited for, if anybody else is not there yet.
        slow = [rank for rank in behind if places[rank]["phase"] != "step"] or behind
        return "furthest behind: " + "; ".join(self._words(rank) for rank in sorted(slow))

    def _words(self, rank: int) -> str:
        entry = self._seen[rank][0] if rank in self._seen else self._place
        who = f" (process {entry['pid']} on {entry['host']})" if "pid" in entry else ""
        return f"rank {rank}{who}, step {entry['step'] + 1}, {entry['phase']}"

    def _end(self, reason: str) -> None:
        with self._lock:
            print(f"dex pretrain: rank {self.ranks.rank} ends: {reason}", file=sys.stderr, flush=True)
            if self._error is not None:
                traceback.print_exception(self._error)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            sys.stderr.flush()
            os._exit(EXIT_FAILED)
