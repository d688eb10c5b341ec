"""A watchdog over ranks: every rank reports its progress to the others through the store of the process group.

If a rank stops reporting, or makes no progress while the others wait, the others name it and its last known state,
print the stacks of their threads and end, so that no job hangs for hours.
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

from dex.common import exits
from dex.common.ranks import Ranks, gather

INTERVAL = 1.0
DEAD_AFTER = 15.0
"""Seconds without a report after which a process is considered dead or stopped."""
_GRACE = 5.0
"""Seconds after another rank's failure in which this rank may still raise its own error."""
_AT_FULL_RATE = 256
"""With more ranks than this, each reports less often: traffic is the square of the ranks, as each reads all reports."""


class Watch:
    """Threads beside training. ``at(step, phase)`` records the progress of this rank.

    timeout: seconds without progress after which the process ends. command: prefix of messages.
    """

    def __init__(self, ranks: Ranks, timeout: float, command: str = "dex pretrain"):
        self.ranks: Ranks = ranks
        self.timeout: float = timeout
        self.command: str = command
        self._progress: dict[str, Any] = {"step": 0, "phase": "start"}
        self._since = time.monotonic()
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._interval = INTERVAL * max(1.0, ranks.world_size / _AT_FULL_RATE)
        self._lock = threading.Lock()
        self._self = {"host": socket.gethostname(), "pid": os.getpid()}
        self._threads: list[threading.Thread] = []
        if ranks.world_size > 1:
            self._store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            self._main = threading.get_ident()
            self._answered = self._since
            self._report()
            processes = enumerate(gather(ranks, self._self))
            self._seen = {
                r: ({**self._progress, **process}, self._since) for r, process in processes if r != ranks.rank
            }
            # The store of a stopped process never answers, not even with an error, so `_judge` must not ask it.
            self._threads = [threading.Thread(target=f, name="watch", daemon=True) for f in (self._talk, self._judge)]
            for thread in self._threads:
                thread.start()

    def at(self, step: int, phase: str) -> None:
        """Record that this rank is in ``phase`` of ``step``."""
        self._progress = {"step": step, "phase": phase}
        self._since = time.monotonic()

    def close(self, failed: BaseException | None = None) -> None:
        """End watching: this rank is done. failed: the error that ended it.

        After an error the others end too and name this rank; the collective in which they wait (NCCL) may not fail.
        """
        self._stop.set()
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.join(5 * self._interval)
        if threads and not any(thread.is_alive() for thread in threads):
            try:
                self._report(done=True, failed=failed and f"{type(failed).__name__}: {failed}")
                if failed is not None:
                    self._wait_until_heard()
            except RuntimeError:
                pass  # The process that holds the store has already ended
        if failed is not None and threads:
            # After an error in the middle of a step, leaving the process group may hang (NCCL).
            self._error = failed
            last = threading.Timer(DEAD_AFTER, self._end, [f"its own failure {DEAD_AFTER:.0f} s ago"])
            last.daemon = True
            last.start()

    def _wait_until_heard(self) -> None:
        """Wait until every other rank knows of the failure or is done, since the store may end with this process."""
        deadline = time.monotonic() + DEAD_AFTER
        while time.monotonic() < deadline:
            self._read_reports()
            if all(entry.get("done") or entry.get("heard") for entry, _ in self._seen.values()):
                return
            time.sleep(self._interval / 4)

    def explain(self, error: BaseException) -> None:
        """End this process with the name of the lost rank that caused ``error``; return if all ranks are alive."""
        self._error = error
        deadline = time.monotonic() + DEAD_AFTER + 5 * INTERVAL
        while time.monotonic() < deadline and self._threads:
            time.sleep(INTERVAL / 2)

    def _talk(self) -> None:
        beat = 0
        while not self._stop.wait(self._interval):
            beat += 1
            try:
                self._report(beat=beat)
                self._read_reports()
            except RuntimeError as error:
                if not self._stop.is_set():
                    reason = f"{self._holder()}: ended, and with it the store of the ranks ({type(error).__name__})"
                    self._end(self._failure() or reason)
            self._answered = time.monotonic()

    def _judge(self) -> None:
        while not self._stop.wait(INTERVAL):
            now = time.monotonic()
            for rank, (entry, heard) in list(self._seen.items()):
                # Up to the last answer of the store, since a silent store says nothing about a rank.
                if not entry.get("done") and self._answered - heard > DEAD_AFTER:
                    self._end(f"{self._describe(rank)}: no sign of life for {DEAD_AFTER:.0f} s, killed or stopped")
                if entry.get("failed") and (self._error is not None or now - heard > _GRACE):
                    self._end(self._failure())
                if entry.get("done") and self._error is not None:
                    self._end(f"{self._describe(rank)}: ended while this rank was not done")
            if now - self._answered > DEAD_AFTER:
                self._end(f"{self._holder()}: no sign of life of the ranks' store for {DEAD_AFTER:.0f} s, stopped")
            if now - self._since > self.timeout:
                self._end(f"no step for {self.timeout:.0f} s; {self._furthest_behind()}")

    def _holder(self) -> str:
        """The process that holds the store."""
        return "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else self._describe(0)

    def _failure(self) -> str:
        """The ranks that failed and their errors; empty if there are none."""
        failed = [rank for rank, (entry, _) in sorted(self._seen.items()) if entry.get("failed")]
        return "; ".join(f"{self._describe(rank)}: failed, {self._seen[rank][0]['failed']}" for rank in failed)

    def _report(self, **more: Any) -> None:
        """Write the state of this rank to the store."""
        frame = sys._current_frames().get(self._main)
        where = frame.f_code.co_qualname if frame else ""
        entry = {**self._progress, **self._self, "where": where, "heard": bool(self._failure()), **more}
        self._store.set(f"dex/alive/{self.ranks.rank}", json.dumps(entry))

    def _read_reports(self) -> None:
        now = time.monotonic()
        # In one request, which does not block: every rank has reported before any rank gets here.
        reports = self._store.multi_get([f"dex/alive/{rank}" for rank in self._seen])
        for (rank, (previous, _)), report in zip(list(self._seen.items()), reports, strict=True):
            entry = json.loads(report)
            # A launcher that restarts the ranks keeps the store with the reports of the earlier processes.
            same_process = all(entry[key] == previous[key] for key in ("host", "pid"))
            if same_process and previous != entry:
                self._seen[rank] = (entry, now)

    def _furthest_behind(self) -> str:
        running = {rank: entry for rank, (entry, _) in self._seen.items() if not entry.get("done")}
        running[self.ranks.rank] = self._progress
        first = min(running.values(), key=lambda entry: entry["step"])["step"]
        behind = [rank for rank, entry in running.items() if entry["step"] == first]
        # Ranks in phase "step" wait in a collective; they are to blame only if no rank is in another phase.
        slow = [rank for rank in behind if running[rank]["phase"] != "step"] or behind
        return "furthest behind: " + "; ".join(self._describe(rank) for rank in sorted(slow))

    def who(self, rank: int) -> str:
        """A rank, its process and its machine, in words."""
        entry = self._seen[rank][0] if rank in self._seen else self._self
        return f"rank {rank} (process {entry['pid']} on {entry['host']})"

    def _describe(self, rank: int) -> str:
        entry = self._seen[rank][0] if rank in self._seen else self._progress
        who = self.who(rank) if rank in self._seen else f"rank {rank}"
        where = f" in {entry['where']}" if entry.get("where") else ""
        return f"{who}, step {entry['step'] + 1}, {entry['phase']}{where}"

    def _end(self, reason: str) -> None:
        with self._lock:
            try:
                print(f"{self.command}: rank {self.ranks.rank} ends: {reason}", file=sys.stderr, flush=True)
                if self._error is not None:
                    traceback.print_exception(self._error)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
            finally:  # Also if stderr is closed
                os._exit(exits.FAILED)
