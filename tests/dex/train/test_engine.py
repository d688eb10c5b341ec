"""What every training shares of a step: how verdicts that arrive later are read."""

import math

import pytest
import torch

from dex.common.ranks import ALONE
from dex.train.engine import Engine
from dex.train.verdict import Losses, Verdict, send


@pytest.fixture
def engine():
    return Engine(ALONE, torch.device("cpu"), "fp32")


def sent(step, image_loss, *, stop=0, grad_norm=1.0):
    loss = torch.tensor(image_loss)
    total = torch.tensor([loss.mean(), grad_norm])
    zero = torch.zeros((), dtype=torch.float64)
    losses = Losses(loss.mean(), loss.mean(), zero, zero, total[1])
    verdict = Verdict(total.isfinite().all(), torch.tensor(stop), torch.tensor(0), losses, zero, zero, zero, [])
    return send(verdict, loss, step, [f"image {i}" for i in range(len(image_loss))])


def test_a_bad_step_names_its_images_and_good_ones_forget_it(engine):
    engine._pending.extend([sent(0, [1.0, math.nan]), sent(1, [1.0, 2.0], grad_norm=math.inf), sent(2, [1.0, 2.0])])
    first, second = engine._read_verdicts(keep=1)
    assert (first.step, first.samples) == (0, ["image 1"])
    assert (second.step, second.samples) == (1, ["image 0", "image 1"])
    assert engine.nonfinite_in_a_row == 2 and len(engine._pending) == 1
    assert engine.flush() == [] and engine.nonfinite_in_a_row == 0


def test_a_request_to_stop_is_heard(engine):
    engine._pending.append(sent(0, [1.0]))
    engine.flush()
    assert not engine.stopping
    engine._pending.append(sent(1, [1.0], stop=1))
    engine.flush()
    assert engine.stopping


def test_overflows_of_fp16_are_its_own_until_no_scale_is_left():
    engine = Engine(ALONE, torch.device("cpu"), "fp16")
    engine._pending.append(sent(0, [1.0], grad_norm=math.inf))
    assert engine.flush() == [] and engine.loss_scale.overflows == 1
    engine._pending.append(sent(1, [math.nan]))
    assert len(engine.flush()) == 1


def test_pace_is_this_process_own_time(engine):
    engine.data_wait = 0.5
    pace = engine.pace(1)
    assert pace["data_wait_s"] == 0.5 and engine.data_wait == 0 and pace["memory_mb"] > 10
    assert "slowest_rank" not in pace and engine.ranks_agree() is None
