"""What the ranks say of themselves; what becomes of ranks that die or hang is in tests/reliability."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from dex.common.ranks import ALONE, Ranks
from dex.train.watch import Watch


def test_what_a_process_of_an_earlier_start_said_does_not_count():
    """torchrun --max-restarts starts the ranks again with the same store."""
    watch = Watch(ALONE, 60.0)
    first = {"step": 0, "phase": "start", "host": "a", "pid": 20}
    watch._seen, watch._store = {1: (first, 0.0)}, dist.HashStore()
    watch._store.set("dex/alive/1", json.dumps(first | {"pid": 10, "done": True, "failed": "OSError: gone"}))
    watch._read_reports()
    assert watch._failure() == "" and watch._seen[1] == (first, 0.0)
    watch._store.set("dex/alive/1", json.dumps(first | {"step": 3}))
    watch._read_reports()
    assert watch._seen[1][0]["step"] == 3


@pytest.mark.slow
def test_a_round_of_many_ranks_is_two_requests():
    """A thread for each of 64 ranks at one store: one request would be 63, and live ranks would be called dead."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    count, requests = 64, []

    class Counted:
        def __init__(self):
            self.store = dist.TCPStore("127.0.0.1", server.port, is_master=False)

        def set(self, key, value):
            requests.append("set")
            return self.store.set(key, value)

        def multi_get(self, keys):
            requests.append("multi_get")
            return self.store.multi_get(keys)

    watches = [Watch(ALONE, 60.0) for _ in range(count)]
    me = watches[0]._self
    for rank, watch in enumerate(watches):
        watch.ranks, watch._store, watch._main = Ranks(rank, count, 0), Counted(), 0
        first = {"step": 0, "phase": "start", **me}
        watch._seen = {other: (first, 0.0) for other in range(count) if other != rank}
        watch.at(rank, "step")
        watch._report()
    began = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(Watch._read_reports, watches))
    assert time.monotonic() - began < 10
    assert sorted(requests) == ["multi_get"] * count + ["set"] * count
    for rank, watch in enumerate(watches):
        assert {r: e["step"] for r, (e, _) in watch._seen.items()} == {r: r for r in range(count) if r != rank}
