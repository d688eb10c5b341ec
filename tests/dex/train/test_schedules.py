import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dex import config
from dex.train.schedules import cosine, learning_rate, schedule_at, stable_steps, total_steps


def test_end_points_are_exact(change):
    published = config.preset("published-code")
    batches = 40
    steps = total_steps(published, batches)
    warmup = 10 * batches
    assert steps == 200 * batches
    peak = 1e-4 * 896 / 512
    first, top, last = (schedule_at(published, t, steps) for t in (0, warmup - 1, steps - 1))
    assert (first.lr, top.lr, last.lr) == (peak * (1 / warmup), peak, 0.0)
    assert schedule_at(published, warmup, steps).lr < peak
    assert (first.noise_std, last.noise_std) == (1.0, 0.0)
    assert (first.momentum, last.momentum) == (0.99, 0.999)
    assert (first.balance_weight, last.balance_weight) == (0.01, 0.01)
    assert (first.align_weight, last.align_weight) == (0.01, 0.01)
    paper = config.preset("paper")
    assert schedule_at(paper, 0, steps).balance_weight == 0.001
    assert schedule_at(paper, steps - 1, steps).balance_weight == 0.0
    assert schedule_at(paper, warmup - 1, steps).lr == 1e-4 * 448 / 512


def test_middle_is_half_way():
    assert cosine(1.0, 0.0, 50, 101) == pytest.approx(0.5, abs=1e-15)
    assert cosine(0.99, 0.999, 50, 101) == pytest.approx(0.9945, abs=1e-15)
    assert learning_rate(1.0, 9 + 45, 100, 10) == pytest.approx(0.5, abs=1e-15)


def test_warmup_is_linear():
    assert [learning_rate(1.0, t, 100, 4) for t in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(1.0, 0, 100, 0) == 1.0


@given(steps=st.integers(1, 500), share=st.floats(0, 0.99))
def test_every_schedule_is_monotone_and_within_its_ends(steps, share):
    warmup = round(share * steps)
    rates = [learning_rate(3e-4, t, steps, warmup) for t in range(steps)]
    assert all(0.0 <= r <= 3e-4 for r in rates)
    assert all(a < b for a, b in zip(rates[:warmup], rates[1:warmup], strict=False))
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert all(math.isfinite(cosine(1.0, 0.0, t, steps)) for t in range(steps))


def test_steps_override_epochs_and_keep_the_share_of_the_warmup(change):
    short = change(config.preset("published-code"), schedule__steps=20)
    assert total_steps(short, 40) == 20
    assert schedule_at(short, 0, 20).lr == short.peak_lr  # 5 % of 20 steps is one step


def test_wsd_holds_the_peak_and_falls_in_a_line_to_exactly_zero(change):
    c = change(config.preset("published-code"), schedule__lr_shape="wsd", schedule__warmup=0.1, schedule__decay=0.2)
    rates = [schedule_at(c, t, 100).lr / c.peak_lr for t in range(100)]
    assert rates[:10] == pytest.approx([(t + 1) / 10 for t in range(10)], rel=1e-15)
    assert rates[9:80] == [1.0] * 71
    assert rates[80:] == pytest.approx([t / 20 for t in range(19, -1, -1)], rel=1e-15) and rates[-1] == 0.0
    assert stable_steps(c, 100) == 80


@given(steps=st.integers(1, 300), warmup=st.floats(0, 0.5), decay=st.floats(0.01, 0.5))
def test_wsd_is_monotone_after_its_warmup_and_never_idle_at_first(steps, warmup, decay):
    stable = steps - max(1, round(decay * steps))
    first = round(warmup * steps)
    rates = [learning_rate(1.0, t, steps, first, stable) for t in range(steps)]
    assert all(0.0 <= r <= 1.0 for r in rates) and rates[0] > 0
    assert all(a >= b for a, b in zip(rates[first:], rates[first + 1 :], strict=False))


def test_a_constant_rate_stays(change):
    c = change(config.preset("published-code"), schedule__lr_shape="constant", schedule__warmup=0.1)
    assert {schedule_at(c, t, 100).lr for t in range(9, 100)} == {c.peak_lr}
    assert schedule_at(c, 0, 100).lr == pytest.approx(c.peak_lr / 10)
    assert (stable_steps(c, 100), stable_steps(config.preset("paper"), 100)) == (100, None)


def test_a_longer_run_takes_the_same_first_steps_and_then_holds_the_last_values(change):
    """What an extension promises: with the span of the shorter run nothing that was done depends on the length."""
    for shape in ("wsd", "constant"):
        short = change(config.preset("published-code"), schedule__lr_shape=shape, schedule__decay=0.2)
        long = change(short, schedule__span=50)
        stable = stable_steps(short, 50)
        assert [schedule_at(short, t, 50) for t in range(stable)] == [schedule_at(long, t, 200) for t in range(stable)]
        after = [schedule_at(long, t, 200) for t in range(49, 200)]
        assert {(v.noise_std, v.momentum) for v in after} == {(0.0, 0.999)}
