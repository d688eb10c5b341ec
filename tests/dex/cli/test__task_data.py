"""What the commands about tasks share."""

import argparse

import pytest

from dex.cli import _task_data
from dex.tasks.metrics.evaluation import of_segmentation
from dex.tasks.metrics.segmentation import segmentation_scores


@pytest.fixture
def options(discs, tmp_path):
    def parse(*arguments):
        parser = argparse.ArgumentParser()
        _task_data.add_options(parser)
        common = ["--data", str(discs), "--classes", "disc=255", "--private", str(tmp_path / "salt")]
        return parser.parse_args([*common, *arguments])

    return parse


def sides(data):
    return {case.id: case.split for case in data.cases}


def test_what_was_remembered_counts_where_nothing_is_said(options, discs):
    drawn = _task_data.open_data(str(discs), options("--split-seed", "4"))
    kept = _task_data.remembered(options("--split-seed", "4"))
    assert set(kept) == {"split", "patient", "split_seed", "shots"}
    assert sides(_task_data.open_data(str(discs), options(), kept)) == sides(drawn)
    assert sides(_task_data.open_data(str(discs), options("--split-seed", "0"), kept)) != sides(drawn)


BLIND = ", reference 0.0000 (background only)"


def test_words_have_intervals_only_where_there_are_any():
    import numpy as np

    truth = np.zeros((1, 4, 4), np.uint8)
    truth[0, 1:3, 1:3] = 1
    scores = segmentation_scores(truth, truth, ("a",), None)
    one = of_segmentation("t", ("a",), [("1", "p", scores)])
    assert _task_data.words(one) == "1 cases of 1 patients: dice 1.0000, hd95 0.0000, nsd 1.0000" + BLIND
    worse = segmentation_scores(np.roll(truth, 1), truth, ("a",), None)
    many = of_segmentation("t", ("a",), [(f"{i}", f"p{i}", worse if i % 3 else scores) for i in range(12)])
    assert " to " in _task_data.words(many)
