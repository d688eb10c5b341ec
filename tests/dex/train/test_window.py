"""What is gathered over steps."""

import json
import math

import pytest
import torch

from dex.train.verdict import HostVerdict, Losses, Verdict
from dex.train.window import SLOTS_TO_JUDGE, SPIKE_WINDOW, Spike, Window

CPU = torch.device("cpu")


def window(modalities=("ct", "mr"), experts=(4, 4)):
    return Window(modalities, experts, CPU)


def verdict(loss=1.0, good=True, unreadable=0, slots=(1,) * 8, modality_loss=(1.0, 2.0), modality_images=(1.0, 4.0)):
    def double(*values):
        return torch.tensor(values, dtype=torch.float64)

    numbers = double(loss, 2.0, 3.0, 4.0, 5.0)
    zero, mass = torch.zeros(()), [torch.zeros(4)] * 2
    return Verdict(
        torch.tensor(good),
        zero,
        torch.tensor(float(unreadable)),
        numbers,
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
    before = [tensor.data_ptr() for tensor in (*w.sums, w.slots)]
    w.count(verdict())
    w.read(), w.load(), w.newly_unused()
    w.restore(w.state())
    assert [tensor.data_ptr() for tensor in (*w.sums, w.slots)] == before


def test_the_load_is_of_each_layer():
    w = window()
    w.count(verdict(slots=(2, 2, 2, 2, 8, 0, 0, 0)))
    assert w.load() == {"usage_entropy": [1.0, 0.0], "usage_min_share": [0.25, 0.0]}
    w.count(verdict(slots=(9,) * 8, good=False))
    assert w.slots.tolist() == [2, 2, 2, 2, 8, 0, 0, 0]
    assert window(experts=()).load() == {"usage_entropy": [], "usage_min_share": []}


def test_dead_experts_are_told_once():
    w = window()
    for counts, want in (
        ([[100, 0, 5, 295], [100] * 4], [(0, ((1,), (2,)))]),
        ([[100, 0, 5, 295], [100] * 4], []),  # told already
        ([[10, 0, 5, 25], [100] * 4], []),  # too few slots to judge
        ([[100] * 4, [0, 100, 100, 200]], [(1, ((0,), ()))]),
        ([[100] * 4, [100] * 4], []),
    ):
        w.slots.copy_(torch.tensor(counts).flatten())
        assert [(layer, tuple(u)) for layer, u in w.newly_unused()] == want
    assert w.slots.sum() == 0
    w.slots.fill_(SLOTS_TO_JUDGE)
    w.slots[0] -= 1
    assert w.newly_unused() == [] and w.slots.sum() > 0  # one slot short of a judgement
    assert window(experts=()).newly_unused() == []


def watch(w, step, loss, images=(0.5, 3.0, 1.0)):
    w.watch(step, ["a", "b", "c"], HostVerdict(True, False, False, loss, 0.1, torch.tensor(images)))


def noisy(steps):
    """Losses about 1 whose median absolute deviation is 0.01."""
    return [1.0 + 0.01 * (step % 3 - 1) for step in range(steps)]


@pytest.mark.parametrize(
    ("loss", "spike"),
    [(1.0, False), (1.11, False), (1.13, True), (0.1, False), (-5.0, False)],
    ids=["usual", "within 12 deviations", "above", "below", "far below"],
)
def test_a_spike_is_far_above_the_losses_before(loss, spike):
    w = window()
    for step, before in enumerate(noisy(SPIKE_WINDOW // 2)):
        watch(w, step, before)
    assert w.take_spikes() == []
    watch(w, 50, loss)
    spikes = w.take_spikes()
    assert [s.step for s in spikes] == ([50] if spike else [])
    if spike:
        assert spikes == [Spike(50, loss, pytest.approx(1.0, abs=0.02), [("b", 3.0), ("c", 1.0), ("a", 0.5)])]
    assert w.take_spikes() == []


def test_a_calm_loss_may_move_by_a_twentieth():
    w = window()
    for step in range(SPIKE_WINDOW):
        watch(w, step, 2.0)
    watch(w, 100, 2.09)
    assert w.take_spikes() == []
    watch(w, 101, 2.11)
    assert [s.step for s in w.take_spikes()] == [101]


def test_nothing_is_a_spike_before_half_a_window_was_seen():
    w = window()
    for step, loss in enumerate([*noisy(SPIKE_WINDOW // 2 - 1), 100.0]):
        watch(w, step, loss)
    assert w.take_spikes() == []


def test_at_most_five_images_are_named():
    w = window()
    for step in range(SPIKE_WINDOW):
        watch(w, step, 1.0)
    losses = torch.arange(9.0)
    w.watch(100, [str(i) for i in range(9)], HostVerdict(True, False, False, 9.0, 0.1, losses))
    (spike,) = w.take_spikes()
    assert spike.samples == [(str(i), float(i)) for i in (8, 7, 6, 5, 4)]


def test_a_restored_window_goes_on_as_the_first_would():
    first, second = window(), window()
    for step, loss in enumerate(noisy(60)):
        first.count(verdict(loss, slots=(1, 0, 3, 4, 2, 2, 2, 2)))
        watch(first, step, loss)
    first.slots.mul_(10)
    first.newly_unused()
    state = json.loads(json.dumps(first.state()))
    assert list(state) == ["losses", "window", "slots", "unused"]
    assert list(state["window"]) == ["steps", "good", "sums", "modality_loss", "modality_images"]
    second.restore({"step": 60} | state)
    for w in (first, second):
        w.count(verdict(3.0))
        watch(w, 60, 3.0)
    assert first.state() == second.state() and first.read() == second.read()
    assert first.take_spikes() == second.take_spikes() != []
    for w in (first, second):
        w.slots.fill_(0)
        w.slots[[0, 2, 3, 4, 5, 6, 7]] = 500
        assert w.newly_unused() == []  # expert 1 of layer 0 was told of before the break
