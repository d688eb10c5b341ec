"""What a pretraining cost, and whether two cost the same."""

import dataclasses

import pytest

from dex.inference.load import load
from dex.tasks import compute
from dex.tasks.compute import Compute

ONE = Compute("DEX", 10, 80, 1000, 500, 10**9, 10**8, "abc")


def test_a_run_says_what_it_cost(pretrained):
    loaded = load(pretrained)
    cost = compute.of_run("DEX", loaded)
    assert (cost.steps, cost.images) == (6, 48)
    assert len(cost.data) == 64
    encoder = loaded.encoder
    assert cost.parameters == sum(p.numel() for p in encoder.parameters())
    experts = directors = 0
    for layer in encoder.dex_layers:
        experts += sum(p.numel() for p in layer.experts.parameters())
        directors += sum(p.numel() for p in layer.director.parameters())
    assert cost.active == cost.parameters - directors - experts // 2  # 2 of 4 experts
    assert cost.director > 0


def test_nothing_of_a_random_start_counts(pretrained):
    cost = compute.of_run("random", load(pretrained), random_start=True)
    assert (cost.steps, cost.images, cost.operations, cost.director, cost.data) == (0, 0, 0, 0, "")


def test_a_monolithic_control_has_the_active_parameters_of_dex():
    from dex.config import preset
    from dex.inference.load import Loaded
    from dex.model.build import build_model

    cost = {}
    for name in ("demo", "demo-monolithic"):
        config = dataclasses.replace(preset(name))
        cost[name] = compute.of_run(name, Loaded(build_model(config), config, (), 1000, _nowhere()))
    a, b = cost.values()
    assert compute.differences(a, b) == ()
    assert abs(a.active / b.active - 1) < 0.01 and a.parameters > 2 * b.parameters
    (equal, director, unknown) = compute.sentences(a, b)
    assert equal.startswith("Equal compute: 16,000 images in 1,000 steps")
    assert "Directors take 7% of the operations of demo's pretraining" in director and "unknown" in unknown


def _nowhere():
    from pathlib import Path

    return Path("/nowhere/at/all")


@pytest.mark.parametrize(
    "change",
    [{"steps": 11}, {"images": 88}, {"active": 600}, {"operations": 2 * 10**9}, {"data": "other"}],
)
def test_each_difference_is_named(change):
    (name,) = change
    (said,) = compute.differences(ONE, ONE._replace(**change))
    titles = {"active": "active parameters", "images": "images seen", "data": "pretraining set"}
    assert said.startswith(titles.get(name, name))
    assert compute.sentences(ONE, ONE._replace(**change))[0].startswith("Compute is not equal")


def test_small_differences_are_none():
    assert compute.differences(ONE, ONE._replace(active=510, operations=10**9 + 10**7, data="")) == ()
