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

from dex.common import exits
from dex.common.ranks import Ranks, gather

INTERVAL = 1.0
DEAD_AFTER = 15.0
"""Seconds without a sign of life from a process after which it is called dead or stopped."""
_GRACE = 5.0
"""Seconds after another rank's failure in which this one may still find out by itself what failed."""
_AT_FULL_RATE = 256
"""Above this number of ranks each reports less often: every rank reads all reports, so the store sends their square."""


class Watch:
    """A thread beside training. ``at(step, phase)`` says how far this rank is; timeout: longest stay at one place.

    command: its name before what is said.
    """

    def __init__(self, ranks: Ranks, timeout: float, command: str = "dex pretrain"):
        self.ranks: Ranks = ranks
        self.timeout: float = timeout
        self.command: str = command
        self._place: dict[str, Any] = {"step": 0, "phase": "start"}
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
            self._tell()
            processes = enumerate(gather(ranks, self._self))
            self._seen = {r: ({**self._place, **who}, self._since) for r, who in processes if r != ranks.rank}
            # The store of a process that was stopped answers nothing, not even an error: who judges must not ask it.
            self._threads = [threading.Thread(target=f, name="watch", daemon=True) for f in (self._talk, self._judge)]
            for thread in self._threads:
                thread.start()

    def at(self, step: int, phase: str) -> None:
        self._place = {"step": step, "phase": phase}
        self._since = time.monotonic()

    def close(self, failed: BaseException | None = None) -> None:
        """This rank is done: it is no longer waited for, and waits for nobody. failed: it did not end as it should.

        The others then end too, naming this one; what they wait in may not tell them (NCCL).
        """
        self._stop.set()
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.join(5 * self._interval)
        if threads and not any(thread.is_alive() for thread in threads):
            try:
                self._tell(done=True, failed=failed and f"{type(failed).__name__}: {failed}")
                if failed is not None:
                    self._wait_until_heard()
            except RuntimeError:
                pass  # whoever held the store has ended already
        if failed is not None and threads:
            # Whoever fails in the middle of a step may wait for the others when it leaves them (NCCL).
            self._error = failed
            last = threading.Timer(DEAD_AFTER, self._end, [f"its own failure {DEAD_AFTER:.0f} s ago"])
            last.daemon = True
            last.start()

    def _wait_until_heard(self) -> None:
        """The store may end with this process: until every other rank has heard of its failure, or is done too."""
        deadline = time.monotonic() + DEAD_AFTER
        while time.monotonic() < deadline:
            self._hear()
            if all(entry.get("done") or entry.get("heard") for entry, _ in self._seen.values()):
                return
            time.sleep(self._interval / 4)

    def explain(self, error: BaseException) -> None:
        """End this process when ``error`` comes from a rank that is gone, naming it; return when all are alive."""
        self._error = error
        deadline = time.monotonic() + DEAD_AFTER + 5 * INTERVAL
        while time.monotonic() < deadline and self._threads:
            time.sleep(INTERVAL / 2)

    def _talk(self) -> None:
        beat = 0
        while not self._stop.wait(self._interval):
            beat += 1
            try:
                self._tell(beat=beat)
                self._hear()
            except RuntimeError as error:
                if not self._stop.is_set():
                    gone = f"{self._holder()}: ended, and with it the store of the ranks ({type(error).__name__})"
                    self._end(self._failure() or gone)
            self._answered = time.monotonic()

    def _judge(self) -> None:
        while not self._stop.wait(INTERVAL):
            now = time.monotonic()
            for rank, (entry, heard) in list(self._seen.items()):
                # Counted up to the last answer of the store, whose own silence says nothing of a rank.
                if not entry.get("done") and self._answered - heard > DEAD_AFTER:
                    self._end(f"{self._words(rank)}: no sign of life for {DEAD_AFTER:.0f} s, killed or stopped")
                if entry.get("failed") and (self._error is not None or now - heard > _GRACE):
                    self._end(self._failure())
                if entry.get("done") and self._error is not None:
                    self._end(f"{self._words(rank)}: ended while this rank was not done")
            if now - self._answered > DEAD_AFTER:
                self._end(f"{self._holder()}: no sign of life of the ranks' store for {DEAD_AFTER:.0f} s, stopped")
            if now - self._since > self.timeout:
                self._end(f"no step for {self.timeout:.0f} s; {self._furthest_behind()}")

    def _holder(self) -> str:
        """Whose process holds the store."""
        return "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else self._words(0)

    def _failure(self) -> str:
        """Which rank has failed, and by what; empty when none has."""
        failed = [rank for rank, (entry, _) in sorted(self._seen.items()) if entry.get("failed")]
        return "; ".join(f"{self._words(rank)}: failed, {self._seen[rank][0]['failed']}" for rank in failed)

    def _tell(self, **more: Any) -> None:
        frame = sys._current_frames().get(self._main)
        where = frame.f_code.co_qualname if frame else ""
        entry = {**self._place, **self._self, "where": where, "heard": bool(self._failure()), **more}
        self._store.set(f"dex/alive/{self.ranks.rank}", json.dumps(entry))

    def _hear(self) -> None:
        now = time.monotonic()
        # One question for all: every rank has told something before any of them came here.
        said = self._store.multi_get([f"dex/alive/{rank}" for rank in self._seen])
        for (rank, (before, _)), words in zip(list(self._seen.items()), said, strict=True):
            entry = json.loads(words)
            # Launchers that start the ranks again keep the store, with what the processes before them said.
            same = all(entry[key] == before[key] for key in ("host", "pid"))
            if same and before != entry:
                self._seen[rank] = (entry, now)

    def _furthest_behind(self) -> str:
        places = {rank: entry for rank, (entry, _) in self._seen.items() if not entry.get("done")}
        places[self.ranks.rank] = self._place
        first = min(places.values(), key=lambda entry: entry["step"])["step"]
        behind = [rank for rank, entry in places.items() if entry["step"] == first]
        # Those that wait in a collective are not what is waited for, if anybody else is not there yet.
        slow = [rank for rank in behind if places[rank]["phase"] != "step"] or behind
        return "furthest behind: " + "; ".join(self._words(rank) for rank in sorted(slow))

    def who(self, rank: int) -> str:
        """A rank, its process and its machine."""
        entry = self._seen[rank][0] if rank in self._seen else self._self
        return f"rank {rank} (process {entry['pid']} on {entry['host']})"

    def _words(self, rank: int) -> str:
        entry = self._seen[rank][0] if rank in self._seen else self._place
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
            finally:  # whoever read it may be gone
                os._exit(exits.FAILED)
