import time
from types import SimpleNamespace

import pytest
import torch

from dex.train.stopwatch import Stopwatch


def test_seconds_add_up_until_they_are_read():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(3):
        with watch:
            time.sleep(0.02)
        time.sleep(0.05)  # not counted
    assert 0.06 <= watch.seconds() < 0.2
    assert watch.seconds() == 0


def test_an_error_ends_a_span_too():
    watch = Stopwatch(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="within"), watch:
        time.sleep(0.01)
        raise RuntimeError("within")
    assert watch.seconds() >= 0.01


class Event:
    """One of a GPU whose clock goes on by 5 ms at every record."""

    now, waits = 0.0, 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 5.0
        self.at = Event.now

    def synchronize(self):
        Event.waits += 1

    def elapsed_time(self, end):
        return end.at - self.at


def test_on_a_gpu_the_device_is_waited_for_once_and_captures_do_not_count(monkeypatch):
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    watch = Stopwatch(SimpleNamespace(type="cuda"))
    for capturing[0] in (False, True, False):
        with watch:
            pass
    assert Event.waits == 0
    assert watch.seconds() == pytest.approx(0.01) and Event.waits == 1
    assert watch.seconds() == 0 and Event.waits == 1
