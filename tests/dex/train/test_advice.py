import pytest

from dex.analysis.information import Information
from dex.analysis.instruments import Instruments, LayerRoutes
from dex.analysis.intervals import Interval
from dex.analysis.swap import Gap
from dex.train.advice import Adviser, unused
from dex.train.schedules import Schedule

NONE = Information(0.0, 0.0, 0.0, 1.0)


def now(noise=0.0, balance=0.01):
    return Schedule(lr=1e-3, noise_std=noise, momentum=0.99, align_weight=0.01, balance_weight=balance)


def found(low=-0.1, sets=(8, 8), kind="other modality"):
    layers = [LayerRoutes(0.5, s, s, 1.0, NONE, NONE) for s in sets]
    return Instruments([Gap(kind, None, Interval(0.01, low, 0.1), 0.4)], None, layers, None, None, None, None)


@pytest.fixture
def adviser(tiny):
    return Adviser(tiny, (8, 8), warmup_steps=3)


def kinds(warned):
    return [warning.kind for warning in warned]


def test_a_missing_gap_is_said_once_the_noise_is_gone(adviser):
    assert adviser.look(found(), 12, 5, now(noise=0.5)) == []
    (warning,) = adviser.look(found(), 12, 8, now())
    assert warning.kind == "no swap gap" and "+0.010 [-0.100, 0.100] of 0.400" in warning.text
    assert "schedule.balance_weight (now 0.01; 0.1 for short runs), or set model.route_from to mean" in warning.text
    assert adviser.look(found(), 12, 9, now()) == []  # said
    assert adviser.look(found(low=0.001), 12, 10, now()) == []
    assert kinds(adviser.look(found(), 12, 11, now())) == ["no swap gap"]  # it came and went


def test_nothing_is_said_of_an_interval_over_too_few(adviser):
    assert adviser.look(found(), 4, 8, now()) == []
    assert kinds(adviser.look(found(kind="random"), 5, 9, now())) == ["no swap gap"]


def test_few_sets_of_experts_are_said_after_the_warm_up(adviser):
    few = found(low=0.01, sets=(3, 8))
    assert adviser.look(few, 12, 2, now()) == []
    (warning,) = adviser.look(few, 12, 5, now(noise=1.0, balance=0.1))
    assert warning.kind == "few expert sets" and "layer 0 3 of at least 4" in warning.text
    assert "raise schedule.balance_weight (now 0.1)" in warning.text
    assert adviser.look(found(low=0.01, sets=(4, 4)), 12, 9, now()) == []  # half of them


def test_a_model_without_experts_has_nothing_to_be_said_of(tiny):
    nothing = Instruments([], None, [], 3.0, 4.0, None, None)
    assert Adviser(tiny, (), 0).look(nothing, 12, 8, now()) == []


def test_unused_experts_are_named_with_what_to_change(tiny, change):
    assert unused(tiny, 1, (2, 5), 0.01) == (
        "layer 1: no image goes to expert 2, 5: raise schedule.balance_weight (now 0.01; 0.1 for short runs)"
    )
    assert unused(change(tiny, schedule__noise_std=(0.0, 0.0)), 0, (1,), 0.1).endswith("or schedule.noise_std above 0")
