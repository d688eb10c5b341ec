"""What ranks agree on, on two of gloo. Run as a program, this file is one of them: it prints what it saw."""

import datetime
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.distributed as dist

from dex.common import ranks
from dex.common.ranks import ALONE, Failed, Ranks


def main(rank):
    joined = ranks.start(ranks.announced(), torch.device("cpu"), 60)
    seen = {"gather": ranks.gather(joined, {"rank": rank, "text": "é" * (rank + 1)})}
    seen["first"] = ranks.from_first(joined, [rank, None])
    seen["decided"] = ranks.decided(joined, lambda: f"by {rank}")
    seen["everywhere"] = ranks.everywhere(joined, lambda: rank)

    def fail(*of):
        if rank in of:
            raise KeyError(f"on {rank}")

    for name, act in (
        ("one fails", lambda: ranks.everywhere(joined, lambda: fail(1))),
        ("both fail", lambda: ranks.everywhere(joined, lambda: fail(0, 1))),
        ("the first fails", lambda: ranks.decided(joined, lambda: fail(0))),
    ):
        try:
            act()
        except Exception as error:
            seen[name] = f"{type(error).__name__}: {error}"
    bits = torch.tensor([1.5, -0.0]), torch.tensor([[2.0]])
    seen["same"] = ranks.same_bits(bits)
    seen["other sign of zero"] = ranks.same_bits([torch.tensor([1.5, 0.0 if rank else -0.0])])
    ranks.gather(joined, None)  # Neither stops while the other still waits for it
    ranks.stop(joined)
    print(json.dumps(seen))


def stops_early(rank):
    """Stop while a thread of gloo may still release tensors, of a group that something else, as DDP would, holds."""
    joined = ranks.start(ranks.announced(), torch.device("cpu"), 60)
    group = dist.group.WORLD
    first, second, third = ([torch.ones(1) for _ in range(30_000)] for _ in range(3))
    alive = weakref.WeakSet(third)
    work = group.allgather_coalesced([first, second], third)
    work.wait()
    del work, first, second, third
    ranks.stop(joined)
    print(len(alive))


@pytest.fixture(scope="module")
def seen(on_two_ranks):
    """What each of two ranks saw."""
    return on_two_ranks(__file__)


def test_nothing_reads_beside_the_forwards_of_a_cpu(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(24))
    assert (ranks.default_workers("cpu"), ranks.default_workers("cuda")) == (0, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (ranks.default_workers("cpu"), ranks.default_workers("cuda")) == (0, 3)


def test_what_one_says_all_know(seen):
    for rank, told in enumerate(seen):
        assert told["gather"] == [{"rank": 0, "text": "é"}, {"rank": 1, "text": "éé"}]
        assert told["first"] == [0, None] and told["decided"] == "by 0" and told["everywhere"] == rank


def test_an_error_of_one_is_raised_on_all(seen):
    assert [told["one fails"] for told in seen] == ["Failed: rank 1: KeyError: 'on 1'", "KeyError: 'on 1'"]
    assert [told["both fail"] for told in seen] == ["KeyError: 'on 0'", "KeyError: 'on 1'"]
    assert [told["the first fails"] for told in seen] == ["KeyError: 'on 0'", "Failed: rank 0: KeyError: 'on 0'"]


def test_one_bit_makes_a_difference(seen):
    assert [(told["same"], told["other sign of zero"]) for told in seen] == [(True, False)] * 2


def test_ranks_that_do_not_meet_are_named_with_what_helps(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (said | {"RANK": "0", "WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    words = rf"^rank 0: expected all 2 ranks to meet at 127.0.0.1:{store.port} within 0.2 s, got: .+"
    with pytest.raises(RuntimeError, match=words) as error:
        ranks.start(ranks.announced(), torch.device("cpu"), 0.2)
    assert "torchrun" not in str(error.value) and not dist.is_initialized()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=words + "torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        ranks.start(ranks.announced(), torch.device("cpu"), 0.2)


def test_a_start_looks_for_no_rank_of_the_start_before():
    """torchrun keeps its store: rank 0 of a first start left its address there, and rank 1 of a second comes early."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    program = [sys.executable, __file__, "starts"]
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = subprocess.run(program, env=os.environ | path | said, capture_output=True, text=True, timeout=60).stdout
    first, second = out.splitlines()
    assert first.startswith("rank 0: expected all 2 ranks to meet at ")
    assert second.startswith("rank 1: expected all 2 ranks to meet at ") and "wait timeout" in second, second


def starts():
    """Rank 0 of a first start, then rank 1 of a second one, each a process of its own; what they end with."""
    for number in (0, 1):
        if os.fork() == 0:
            os.environ |= {"WORLD_SIZE": "2", "RANK": str(number), "TORCHELASTIC_RESTART_COUNT": str(number)}
            try:
                ranks.start(ranks.announced(), torch.device("cpu"), 0.5)
            except RuntimeError as error:
                print(error, flush=True)
            os._exit(0)
        os.wait()


def test_alone_nothing_is_exchanged():
    value = object()
    assert ranks.gather(ALONE, value) == [value] and ranks.from_first(ALONE, value) is value
    assert ranks.decided(ALONE, lambda: value) is value and ranks.start(ALONE, torch.device("cpu"), 1.0) is ALONE
    with pytest.raises(KeyError):
        ranks.everywhere(ALONE, lambda: {}["absent"])
    ranks.stop(ALONE)
    tensor = torch.ones(2)
    assert ranks.full(tensor) is tensor and issubclass(Failed, RuntimeError)


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({}, ALONE),
        ({"WORLD_SIZE": "1", "RANK": "0"}, ALONE),
        ({"WORLD_SIZE": "4", "RANK": "3"}, Ranks(3, 4, 3)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, Ranks(3, 4, 1)),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE: expected a whole number, got 'many'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: expected at least 1, got -1"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": ""}, "MASTER_PORT: expected a value with WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: expected 0 <= RANK < WORLD_SIZE = 2, got 2"),
    ],
)
def test_a_launch_is_read_from_the_environment(environment, want, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"MASTER_ADDR": "localhost", "MASTER_PORT": "1"} | environment).items():
        monkeypatch.setenv(name, value)
    if isinstance(want, Ranks):
        assert ranks.announced() == want
    else:
        with pytest.raises(ValueError, match=want):
            ranks.announced()


def test_nccl_gives_up_later_than_the_watch(monkeypatch):
    """Its watchdog aborts the process, and with it the watch that names the rank that hangs."""
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: asked.append((backend, timeout)))
    monkeypatch.setattr(dist, "new_group", lambda **options: None)
    ranks.start(Ranks(0, 2, 0), torch.device("cuda", 0), 600.0)
    ranks.start(Ranks(0, 2, 0), torch.device("cpu"), 600.0)
    assert [backend for backend, _ in asked] == ["cpu:gloo,cuda:nccl", "gloo"]
    assert asked[0][1] >= datetime.timedelta(seconds=630) and asked[1][1] == datetime.timedelta(seconds=600)


def test_what_cannot_be_cut_evenly_is_refused():
    ranks.check_cut("experts.fc1", (4, 12, 8), 3)
    with pytest.raises(
        ValueError, match=r"parallel.strategy: expected dimension 1 of experts.fc1, .*, got \[4, 12, 8\]"
    ):
        ranks.check_cut("experts.fc1", (4, 12, 8), 5)


def test_a_rank_stops_after_gloo_has_released_its_tensors(on_two_ranks):
    assert on_two_ranks(__file__, "early") == [0, 0]


if __name__ == "__main__":
    if sys.argv[1] == "starts":
        starts()
    else:
        (stops_early if sys.argv[2:] else main)(int(sys.argv[1]))
