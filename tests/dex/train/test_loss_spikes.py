"""Which losses are spikes, and which images are named."""

import json

import pytest
import torch

from dex.train.loss_spikes import STEPS, LossSpikes, Spike
from dex.train.verdict import HostVerdict


def watch(spikes, step, loss, images=(0.5, 3.0, 1.0)):
    spikes.watch(step, ["a", "b", "c"], HostVerdict(True, False, False, loss, 0.1, torch.tensor(images)))


def noisy(steps):
    """Losses about 1 whose median absolute deviation is 0.01."""
    return [1.0 + 0.01 * (step % 3 - 1) for step in range(steps)]


@pytest.mark.parametrize(
    ("loss", "spike"),
    [(1.0, False), (1.11, False), (1.13, True), (0.1, False), (-5.0, False)],
    ids=["usual", "within 12 deviations", "above", "below", "far below"],
)
def test_a_spike_is_far_above_the_losses_before(loss, spike):
    spikes = LossSpikes()
    for step, before in enumerate(noisy(STEPS // 2)):
        watch(spikes, step, before)
    assert spikes.take() == []
    watch(spikes, 50, loss)
    taken = spikes.take()
    assert [s.step for s in taken] == ([50] if spike else [])
    if spike:
        assert taken == [Spike(50, loss, pytest.approx(1.0, abs=0.02), [("b", 3.0), ("c", 1.0), ("a", 0.5)])]
    assert spikes.take() == []


def test_a_calm_loss_may_move_by_a_twentieth():
    spikes = LossSpikes()
    for step in range(STEPS):
        watch(spikes, step, 2.0)
    watch(spikes, 100, 2.09)
    assert spikes.take() == []
    watch(spikes, 101, 2.11)
    assert [s.step for s in spikes.take()] == [101]


def test_nothing_is_a_spike_before_half_a_window_was_seen():
    spikes = LossSpikes()
    for step, loss in enumerate([*noisy(STEPS // 2 - 1), 100.0]):
        watch(spikes, step, loss)
    assert spikes.take() == []


def test_at_most_five_images_are_named():
    spikes = LossSpikes()
    for step in range(STEPS):
        watch(spikes, step, 1.0)
    losses = torch.arange(9.0)
    spikes.watch(100, [str(i) for i in range(9)], HostVerdict(True, False, False, 9.0, 0.1, losses))
    (spike,) = spikes.take()
    assert spike.samples == [(str(i), float(i)) for i in (8, 7, 6, 5, 4)]


def test_restored_it_goes_on_as_the_first_would():
    first, second = LossSpikes(), LossSpikes()
    for step, loss in enumerate(noisy(60)):
        watch(first, step, loss)
    state = json.loads(json.dumps(first.state()))
    assert list(state) == ["losses"] and len(state["losses"]) == 60
    second.restore({"step": 60} | state)
    for spikes in (first, second):
        watch(spikes, 60, 3.0)
    assert first.state() == second.state() and first.take() == second.take() != []
