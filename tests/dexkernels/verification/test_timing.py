"""Candidates take turns, and warm-ups count for nothing."""

import time

import torch

from dexkernels.verification.timing import Stopwatch, in_turns


def test_candidates_take_turns_after_the_warm_up():
    seen = []
    taken = in_turns({"a": "a", "b": "b"}, 2, 1, lambda name, turn: seen.append((name, turn)) or turn)
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert taken == {"a": [1, 2], "b": [1, 2]}


def test_milliseconds_by_the_clock_of_a_cpu():
    watch = Stopwatch(torch.device("cpu"), rounds=3, warmup=1)
    taken = watch.take({"sleep": lambda i: time.sleep(0.01)})
    assert len(taken["sleep"]) == 3 and all(9 < ms < 1000 for ms in taken["sleep"])
    assert 9 < watch.medians({"sleep": lambda i: time.sleep(0.1 if i == 2 else 0.01)})["sleep"] < 90
