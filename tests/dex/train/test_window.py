"""What is gathered over steps."""

import json
import math

import torch

from dex.train.verdict import Losses, Verdict
from dex.train.window import SLOTS_TO_JUDGE, Window

CPU = torch.device("cpu")


def window(modalities=("ct", "mr"), experts=(4, 4)):
    return Window(modalities, experts, CPU)


def verdict(loss=1.0, good=True, unreadable=0, slots=(1,) * 8, modality_loss=(1.0, 2.0), modality_images=(1.0, 4.0)):
    def double(*values):
        return torch.tensor(values, dtype=torch.float64)

    losses = Losses(*double(loss, 2.0, 3.0, 4.0, 5.0))
    zero, mass = torch.zeros(()), [torch.zeros(4)] * 2
    return Verdict(
        torch.tensor(good),
        zero,
        torch.tensor(float(unreadable)),
        losses,
        double(*modality_loss),
        double(*modality_images),
        double(*slots),
        mass,
    )


def test_means_are_of_the_good_steps_alone():
    w = window()
    for step in (verdict(1.0), verdict(math.nan, good=False, modality_loss=(math.inf, 0.0)), verdict(4.0)):
        w.count(step)
    w.count(verdict(7.0, good=False, unreadable=1))  # it will be taken again, so it is not skipped
    means = w.read()
    assert means.losses == {"loss": 2.5, "total": 2.0, "align_loss": 3.0, "balance_loss": 4.0, "grad_norm": 5.0}
    assert means.skipped == 1 and means.modality_loss == {"ct": 1.0, "mr": 0.5}
    w.count(verdict(9.0, modality_images=(0.0, 2.0)))
    again = w.read()
    assert again.losses["loss"] == 9.0 and again.skipped == 0 and again.modality_loss == {"mr": 1.0}
    w.count(verdict(good=False))
    assert w.read() == (dict.fromkeys(Losses._fields), 1, {})


def test_counts_stay_in_place():
    """A CUDA graph adds to the memory that it was captured with."""
    w = window()
    before = [tensor.data_ptr() for tensor in (w.steps, w._sums, w.slots)]
    w.count(verdict())
    w.read(), w.load(), w.newly_unused()
    w.restore(w.state())
    assert [tensor.data_ptr() for tensor in (w.steps, w._sums, w.slots)] == before


def test_the_load_is_of_each_layer():
    w = window()
    w.count(verdict(slots=(2, 2, 2, 2, 8, 0, 0, 0)))
    assert w.load() == {"usage_entropy": [1.0, 0.0], "usage_min_share": [0.25, 0.0]}
    w.count(verdict(slots=(9,) * 8, good=False))
    assert w.slots.tolist() == [2, 2, 2, 2, 8, 0, 0, 0]
    assert window(experts=()).load() == {"usage_entropy": [], "usage_min_share": []}


def test_an_expert_without_images_is_named_once_and_not_before_its_second_time():
    w = window()
    for counts, want in (
        ([[100, 0, 5, 295], [100] * 4], []),
        ([[100, 0, 0, 300], [100] * 4], [(0, (1,))]),
        ([[10, 0, 5, 25], [100] * 4], []),  # too few slots to judge
        ([[100, 0, 0, 300], [0, 100, 100, 200]], [(0, (2,))]),  # 1 was named
        ([[100, 100, 0, 200], [100] * 4], []),  # 1 is used again
        ([[100, 0, 0, 300], [0, 100, 100, 200]], []),
        ([[100, 0, 100, 200], [0, 100, 100, 200]], [(0, (1,)), (1, (0,))]),
    ):
        w.slots.copy_(torch.tensor(counts).flatten())
        assert w.newly_unused() == want
    assert w.slots.sum() == 0
    w.slots.fill_(SLOTS_TO_JUDGE)
    w.slots[0] -= 1
    assert w.newly_unused() == [] and w.slots.sum() > 0  # one slot short of a judgement
    assert window(experts=()).newly_unused() == []


def test_nobody_is_named_during_the_warm_up():
    w = window()
    for warming_up, want in ((True, []), (True, []), (False, [(1, (3,))]), (False, [])):
        w.slots.copy_(torch.tensor([200] * 7 + [0]))
        assert w.newly_unused(warming_up=warming_up) == want


def test_the_state_keeps_losses_in_the_order_of_earlier_versions():
    w = window()
    w.count(verdict(1.0))
    want = {"steps": 1.0, "good": 1.0, "sums": [1.0, 2.0, 3.0, 4.0, 5.0]}
    assert w.state()["window"] == want | {"modality_loss": [1.0, 2.0], "modality_images": [1.0, 4.0]}


def test_a_restored_window_goes_on_as_the_first_would():
    first, second = window(), window()
    for step in range(60):
        first.count(verdict(1.0 + 0.01 * step, slots=(1, 0, 3, 4, 2, 2, 2, 2)))
    for _ in range(2):
        first.slots.copy_(torch.tensor([100, 0, 300, 400, 200, 200, 200, 200]))
        first.newly_unused()
    state = json.loads(json.dumps(first.state()))
    assert list(state) == ["window", "slots", "unused", "unused_told"]
    assert list(state["window"]) == ["steps", "good", "sums", "modality_loss", "modality_images"]
    second.restore({"step": 60} | state)
    for w in (first, second):
        w.count(verdict(3.0))
    assert first.state() == second.state() and first.read() == second.read()
    for w in (first, second):
        w.slots.fill_(0)
        w.slots[[0, 2, 3, 4, 5, 6, 7]] = 500
        assert w.newly_unused() == []  # expert 1 of layer 0 was named before the break
    earlier = window()
    earlier.restore({name: value for name, value in state.items() if name != "unused_told"})
    earlier.slots.copy_(second.slots + 500)
    earlier.slots[1] = 0
    assert earlier.newly_unused() == []  # which named it at once
