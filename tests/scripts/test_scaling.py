"""From what ranks measure to the results file of scaling."""

import json
import sys

import pytest
import scaling
import scaling_ranks


def test_medians_and_quartiles_are_lists_in_the_file():
    entry = scaling.spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert entry == scaling.Spread(median=3.0, low=2.0, high=4.0)
    assert scaling.Spread(*json.loads(json.dumps(scaling.rounded(entry)))) == entry


def test_ranks_are_pooled():
    rank = {"steps": {"8": [1.0, 2.0]}, "update": [1.0, 1.0], "gema": [2.0, 2.0], "collectives": {}}
    other = rank | {"steps": {"8": [3.0, 4.0]}, "update": [3.0, 3.0]}
    pooled = scaling.summary([rank, other])
    assert pooled["steps"]["8"].median == 2.5 and pooled["update"].median == 2.0 and pooled["gema"].median == 2.0
    assert "checkpoint" not in pooled
    alone = rank | {"checkpoint": [5.0, 7.0]}
    assert scaling.summary([alone])["checkpoint"].median == 6.0


def test_no_test_point_is_the_calibration():
    for ranks in scaling.RANKS:
        points = scaling.test_points(ranks)
        assert points and all(point["experts"] != scaling.CALIBRATION["experts"] for point in points)
        assert not {point["batch"] for point in points} & set(scaling.CALIBRATION["batches"])


def test_a_configuration_is_that_of_the_point():
    point = {"experts": 4, "batch": 8, "strategy": "fsdp", "micro_batch": 2, "precision": "bf16", "model": {"depth": 3}}
    config = scaling_ranks.configuration(point)
    assert (config.model.num_experts, config.model.depth, config.data.batch_size) == (4, 3, 8)
    assert (config.parallel.strategy, config.parallel.micro_batch, config.run.precision) == ("fsdp", 2, "bf16")


def test_a_rank_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="a rank exited with 1"):
        scaling_ranks.launch(1, {"rounds": 1, "sizes": []})
