import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dex.tasks.metrics.segmentation import IGNORE, ClassScores, mean_dice, segmentation_scores

pytest.importorskip("surface_distance", reason="needs surface-distance, of the extra 'adapt'")

NAMES = ("liver", "spleen")
MASK = arrays.arrays(
    np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)), elements=st.integers(0, 2)
)


def frame(*rows):
    return np.array([rows], np.uint8)


def test_what_is_empty_on_one_side_or_both():
    """Dice 0 with one side empty, none where both are; a distance only where both hold the class."""
    predicted = frame([0, 1, 1, 0], [0, 0, 3, 0])
    truth = frame([0, 0, 1, 1], [2, 0, 0, 0])
    got = segmentation_scores(predicted, truth, ("a", "b", "c", "d"), None).classes
    assert [c.state for c in got] == ["scored", "missed", "spurious", "empty"]
    assert [c.dice for c in got] == [0.5, 0.0, 0.0, None]
    assert [c.hd95 is None for c in got] == [c.nsd is None for c in got] == [False, True, True, True]
    assert mean_dice(got) == 0.5 / 3 and mean_dice(got[3:]) is None


def test_ignored_pixels_count_nowhere():
    truth = frame([1, 1, IGNORE, IGNORE], [0, 0, IGNORE, IGNORE])
    for rest in (0, 1, 2):
        predicted = frame([1, 1, rest, rest], [0, 0, rest, rest])
        got = segmentation_scores(predicted, truth, NAMES, (1, 1, 1))
        assert got.classes[0] == ClassScores(2, 2, 2, 0.0, 1.0) and got.classes[1].state == "empty"
        assert got.confusion.sum() == 4
    everything = np.full((1, 2, 4), IGNORE, np.uint8)
    assert [c.state for c in segmentation_scores(predicted, everything, NAMES, None).classes] == ["empty"] * 2


def test_a_picture_is_measured_in_its_plane_and_a_volume_across_it():
    a, b = np.zeros((2, 1, 9, 9), np.uint8)
    a[0, 2:5, 2:7], b[0, 4:7, 2:7] = 1, 1
    assert segmentation_scores(a, b, ("x",), (99.0, 0.5, 3.0)).classes[0].hd95 == 1.0
    assert segmentation_scores(a[0], b[0], ("x",), (99.0, 0.5, 3.0)).classes[0].hd95 == 1.0
    one, two = np.zeros((2, 6, 9, 9), np.uint8)
    one[1:3, 2:5, 2:7], two[3:5, 2:5, 2:7] = 1, 1
    assert segmentation_scores(one, two, ("x",), (2.5, 1.0, 1.0)).classes[0].hd95 == 5.0


def test_without_a_spacing_pixels_are_the_unit_and_it_is_said():
    a, b = np.zeros((2, 1, 9, 9), np.uint8)
    a[0, 2:5, 2:7], b[0, 4:7, 2:7] = 1, 1
    got = segmentation_scores(a, b, ("x",), None)
    assert got.unit == "pixels" and got.classes[0].hd95 == 2.0
    assert segmentation_scores(a, b, ("x",), (1, 2, 2)).unit == "mm"


def test_without_surfaces_only_distances_are_missing():
    a, b = frame([1, 1, 2]), frame([1, 2, 2])
    whole, quick = (segmentation_scores(a, b, NAMES, None, surfaces=s) for s in (True, False))
    assert [c._replace(hd95=None, nsd=None) for c in whole.classes] == list(quick.classes)
    assert whole.classes[0].hd95 is not None


def test_dice_is_monais_but_for_both_empty():
    """MONAI gives NaN for an empty truth whatever was predicted, unless ``ignore_empty=False``: then 0 with a
    prediction, as here, and 1 where both are empty, which is left out here."""
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics", reason="needs monai, of the extra 'adapt'")
    rng = np.random.default_rng(0)
    predicted, truth = (rng.integers(0, 4, (1, 12, 12)) for _ in range(2))
    truth[truth == 3] = 0  # the prediction of class 3 is spurious, class 4 is empty
    names = ("a", "b", "c", "d")
    ours = [c.dice for c in segmentation_scores(predicted, truth, names, None).classes]
    pair = [torch.nn.functional.one_hot(torch.from_numpy(m), 5).permute(0, 3, 1, 2) for m in (predicted, truth)]
    kept = monai.compute_dice(*pair, include_background=False, ignore_empty=False)[0].tolist()
    dropped = monai.compute_dice(*pair, include_background=False, ignore_empty=True)[0].tolist()
    assert kept[:2] == dropped[:2] and ours[:2] == pytest.approx(kept[:2])
    assert ours[2] == kept[2] == 0 and np.isnan(dropped[2])
    assert ours[3] is None and kept[3] == 1 and np.isnan(dropped[3])


def test_dice_is_torchmetrics_but_for_both_empty():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("torchmetrics.functional.segmentation", reason="needs torchmetrics")
    rng = np.random.default_rng(1)
    predicted, truth = (rng.integers(0, 3, (1, 9, 9)) for _ in range(2))
    pair = [torch.from_numpy(m) for m in (predicted, truth)]
    how = {"num_classes": 4, "include_background": False, "average": "none", "input_format": "index"}
    score = theirs.dice_score(*pair, **how)[0].tolist()
    ours = [c.dice for c in segmentation_scores(predicted, truth, ("a", "b", "c"), None).classes]
    assert ours[:2] == pytest.approx(score[:2])
    assert ours[2] is None and np.isnan(score[2])


@settings(max_examples=30, deadline=None)
@given(MASK, st.data())
def test_symmetry_bounds_and_counts(predicted, data):
    truth = data.draw(arrays.arrays(np.uint8, predicted.shape, elements=st.sampled_from([0, 1, 2])))
    got = segmentation_scores(predicted, truth, NAMES, (2.0, 1.0, 1.0))
    turned = segmentation_scores(truth, predicted, NAMES, (2.0, 1.0, 1.0))
    assert (got.confusion == turned.confusion.T).all() and got.confusion.sum() == truth.size
    for one, two in zip(got.classes, turned.classes, strict=True):
        assert one.dice == two.dice and one.hd95 == two.hd95
        assert one.dice is None or 0 <= one.dice <= 1
        assert (one.dice == 1) == (one.state == "scored" and one.both == one.predicted == one.truth)
    same = segmentation_scores(truth, truth, NAMES, None)
    assert {(c.dice, c.hd95, c.nsd) for c in same.classes} <= {(1.0, 0.0, 1.0), (None, None, None)}


GOOD = np.zeros((1, 2, 2), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicted": np.zeros((1, 2, 3), np.uint8)}, r"predicted: expected the shape of truth, \[1, 2, 2\]"),
        ({"predicted": GOOD.astype(float)}, "predicted: expected whole numbers"),
        ({"truth": np.zeros(4, np.uint8)}, "truth: expected"),
        ({"predicted": GOOD[:0], "truth": GOOD[:0]}, "predicted: expected .* without an empty side"),
        ({"predicted": GOOD + 3}, "predicted: expected 0 for background to 2 for the last class, got 3"),
        ({"predicted": GOOD + IGNORE}, "predicted: expected .* got 255"),
        ({"truth": GOOD + 7}, "truth: expected .* or 255 to ignore a pixel, got 7"),
        ({"truth": GOOD.astype(np.int64) - 1}, "truth: expected .* got -1"),
        ({"spacing_mm": (1, 0, 1)}, "spacing_mm: expected three positive"),
        ({"spacing_mm": 1.0}, "spacing_mm: expected three positive .* got 1.0"),
        ({"spacing_mm": "abc"}, "spacing_mm: expected three positive"),
        ({"spacing_mm": (1, 1)}, "spacing_mm: expected three positive"),
        ({"spacing_mm": (1, float("nan"), 1)}, "spacing_mm: expected three positive"),
        ({"classes": ()}, "classes: expected 1 to 254"),
        ({"tolerance": -1}, "tolerance: expected a distance"),
        ({"tolerance": float("nan")}, "tolerance: expected a distance"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"predicted": GOOD, "truth": GOOD, "classes": NAMES, "spacing_mm": None, "tolerance": 2.0} | change
    named = {name: arguments.pop(name) for name in ("tolerance",)}
    with pytest.raises(ValueError, match=message):
        segmentation_scores(*arguments.values(), **named)


@pytest.mark.slow
def test_large_structures_take_seconds():
    """A hundred frames of 512 x 512 with four structures 300 pixels wide, of 190,000 surface elements each."""
    z, y, x = np.ogrid[:100, :512, :512]
    truth, predicted = np.zeros((2, 100, 512, 512), np.uint8)
    for i in range(4):
        for mask, shift in ((truth, 0), (predicted, 2)):
            inside = ((z - 20 - 20 * i - shift) / 25) ** 2 + ((y - 256) / 150) ** 2 + ((x - 256 - shift) / 150) ** 2
            mask[inside < 1] = i + 1
    began = time.process_time()
    got = segmentation_scores(predicted, truth, [str(i) for i in range(4)], (1.5, 0.8, 0.8))
    assert time.process_time() - began < 20
    assert all(c.state == "scored" and c.hd95 < 5 for c in got.classes)
