"""Cases as training reads them: square, in an order of their own, and refused when nothing can be learned."""

import numpy as np
import pytest
import torch

from dex.tasks import task_dataset
from dex.tasks.cases import Case, Frames, Grid, TaskData
from dex.tasks.recipe import Settings
from dex.tasks.task import IGNORED, Task
from dex.tasks.task_dataset import TaskDataset, checked, read_splits, spread_cases, square

SEGMENTATION = Task("s", kind="segmentation", classes=("a", "b"))
CLASSIFICATION = Task("c", kind="classification", classes=("x", "y"), metric="auc")


def case(name="1", split="train"):
    return Case(f"t/{name}", f"patient {name}", split, name, None)


def frames(masks, images=None, label=None, spacing=None):
    images = np.zeros((*masks.shape,), np.uint8) if images is None else images
    return Frames(images, masks, label, spacing, None)


def test_the_longer_side_fills_the_square_and_the_rest_is_ignored():
    images = np.full((2, 20, 40), 200, np.uint8)
    masks = np.ones((2, 20, 40), np.uint8)
    out = square(images, masks, 16, None)
    assert out.images.shape == (2, 1, 16, 16) and out.masks.shape == (2, 16, 16)
    assert (out.images[:, :, 4:12] == 200).all() and (out.images[:, :, :4] == 0).all()
    assert (out.masks[:, 4:12] == 1).all() and (out.masks[:, 12:] == IGNORED).all()


def test_pixels_become_square_by_their_spacing():
    out = square(np.full((1, 20, 20), 9, np.uint8), None, 16, (1.0, 2.0))
    assert out.masks is None and (out.images[0, 0].sum(1) > 0).sum() == 8


def test_colours_stay_colours_and_nothing_is_resampled_at_the_same_size():
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3)).astype(np.uint8)
    out = square(images, None, 16, None)
    assert np.array_equal(out.images[0].numpy(), images[0].transpose(2, 0, 1))


@pytest.fixture
def dataset():
    dataset = TaskDataset(SEGMENTATION, 8)
    rng = np.random.default_rng(0)
    for name in "abc":
        images = rng.integers(0, 256, (2, 8, 8)).astype(np.uint8)
        dataset.add(case(name), frames(rng.integers(0, 3, (2, 8, 8)).astype(np.uint8), images))
    return dataset


def test_frames_come_back_as_they_were(dataset):
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 256, (2, 8, 8)), rng.integers(0, 3, (2, 8, 8))
    assert len(dataset) == 6 and dataset.of_case(1) == [2, 3] and dataset.name(3) == "t/b#1"
    assert np.array_equal(dataset.image(1).numpy(), np.stack([images[1]] * 3))
    assert np.array_equal(dataset.target(1).numpy(), masks[1])


def test_every_epoch_shows_every_frame_once_and_ranks_share_its_batches(dataset):
    ids = [name for step in range(3) for name in dataset.batch(step, 4, 0).ids]
    assert sorted(ids[:6]) == sorted(ids[6:]) == sorted(dataset.name(i) for i in range(6)) and ids[:6] != ids[6:]
    whole = dataset.batch(1, 4, 0)
    parts = [dataset.batch(1, 4, 0, rank, 2) for rank in range(2)]
    assert parts[0].ids + parts[1].ids == whole.ids
    assert torch.equal(torch.cat([p.places for p in parts]), whole.places)
    assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
    assert dataset.batch(0, 4, 1).ids != dataset.batch(0, 4, 0).ids


def test_a_batch_may_be_larger_than_the_data(dataset):
    assert len(set(dataset.batch(0, 16, 0).ids)) == 6


def test_the_fingerprint_is_of_every_pixel(dataset):
    def fingerprint(value, mask=0, name="1", label=None):
        one = TaskDataset(SEGMENTATION, 8)
        images, masks = np.zeros((1, 8, 8), np.uint8), np.zeros((1, 8, 8), np.uint8)
        images[0, 3, 3], masks[0, 2, 2] = value, mask
        one.add(case(name), frames(masks, images))
        return one.fingerprint

    assert fingerprint(1) == fingerprint(1)
    assert len({fingerprint(1), fingerprint(2), fingerprint(1, mask=1), fingerprint(1, name="2")}) == 4


def test_counts_are_of_the_masks_as_stored():
    dataset = TaskDataset(SEGMENTATION, 8)
    masks = np.zeros((1, 80, 80), np.uint8)
    masks[0, 3, 3] = 1  # too small for the model's size
    masks[0, 40:, :] = 2
    dataset.add(case(), frames(masks))
    assert dataset.counts.tolist() == [40 * 80 - 1, 1, 40 * 80]
    assert (dataset.target(0) == 1).sum() == 0


def test_what_no_training_can_use_is_refused_with_the_file():
    empty = np.zeros((1, 8, 8), np.uint8)
    with pytest.raises(ValueError, match="data: expected a mask for every case of s; 1 has none"):
        checked(case(), Frames(empty, None, None, None, None), SEGMENTATION)
    with pytest.raises(ValueError, match=r"masks of the images' size; 1 has \[1, 8, 8\] for images \[1, 8, 9\]"):
        checked(case(), frames(empty, np.zeros((1, 8, 9), np.uint8)), SEGMENTATION)
    with pytest.raises(ValueError, match=r"values 0 to 2 of s, or 255 for ignored pixels; the mask of 1 holds \[7\]"):
        checked(case(), frames(empty + 7), SEGMENTATION)
    with pytest.raises(ValueError, match="a label of c, 0 to 1; 1 has 2"):
        checked(case(), Frames(empty, None, 2, None, None), CLASSIFICATION)
    with pytest.raises(ValueError, match="at least one image; 1 holds none"):
        checked(case(), frames(empty[:0]), SEGMENTATION)


def masked(value):
    masks = np.zeros((1, 8, 8), np.uint8)
    masks[0, 2:4] = value
    masks[0, 4:6] = 3 - value if value else 0
    return masks


def splits_of(monkeypatch, contents, task=SEGMENTATION):
    """contents: (split, Frames) of every case."""
    held = {str(i): of_case for i, (_, of_case) in enumerate(contents)}
    monkeypatch.setattr(task_dataset, "frames_of", lambda cases, task, processes: (held[c.image] for c in cases))
    cases = tuple(case(str(i), split) for i, (split, _) in enumerate(contents))
    return read_splits(TaskData(task, cases, ()), 8, Settings(evaluate_cases=2))


def test_splits_need_something_to_learn(monkeypatch):
    whole, nothing = frames(masked(1)), frames(masked(0))
    only = np.zeros((1, 8, 8), np.uint8)
    only[0, 0] = 1
    with pytest.raises(ValueError, match="expected training cases of s, got 0 train, 1 val, 0 test"):
        splits_of(monkeypatch, [("val", whole)])
    with pytest.raises(ValueError, match="some mask of s that is not empty; all training masks are"):
        splits_of(monkeypatch, [("train", nothing), ("val", whole)])
    with pytest.raises(ValueError, match="every class of s in the training split; missing: b"):
        splits_of(monkeypatch, [("train", frames(only)), ("val", whole)])
    labelled = [Frames(np.zeros((1, 8, 8), np.uint8), None, label, None, None) for label in (0, 1)]
    with pytest.raises(ValueError, match="at least two classes in the training split of c, got x only"):
        splits_of(monkeypatch, [("train", labelled[0]), ("val", labelled[1])], CLASSIFICATION)


def test_notes_say_what_an_epoch_is_judged_by(monkeypatch):
    whole = frames(masked(1))
    assert "no validation cases" in splits_of(monkeypatch, [("train", whole)]).notes[0]
    many = splits_of(monkeypatch, [("train", whole), *[("val", whole)] * 5])
    assert many.notes == ("epochs are evaluated on 2 of 5 validation cases (evaluate_cases)",)
    assert [c.image for c in many.val.cases] == ["1", "3"]
    nothing = frames(masked(0))
    absent = splits_of(monkeypatch, [("train", whole), *[("val", each) for each in (nothing, whole, nothing, whole)]])
    assert absent.notes[0] == "the validation cases of an epoch do not contain a, b: the metric ignores them"
    assert absent.fingerprint != many.fingerprint


@pytest.mark.parametrize("side", ["val", "test"])
def test_a_class_missing_from_another_split_is_refused(monkeypatch, side):
    only = np.zeros((1, 8, 8), np.uint8)
    only[0, 0] = 1
    for contents, lacking in ((masked(0), "a, b"), (only, "b")):
        message = f"masks: expected each class in {side}; none of its 2 cases contains {lacking}; leave these"
        with pytest.raises(ValueError, match=message):
            splits_of(monkeypatch, [("train", frames(masked(1))), *[(side, frames(contents))] * 2])


@pytest.mark.parametrize("side", ["val", "test"])
def test_every_case_is_read_before_training_and_only_those_needed_are_kept(monkeypatch, side):
    whole = frames(masked(1))
    kept = splits_of(monkeypatch, [("train", whole), *[(side, whole)] * 4])
    assert (len(kept.train), len(kept.val)) == (1, 2 if side == "val" else 0)
    unknown = frames(masked(1))
    unknown.masks[0, 0, 0] = 9
    with pytest.raises(ValueError, match="data: expected values 0 to 2 of s, or 255 for ignored pixels; the mask of 2"):
        splits_of(monkeypatch, [("train", whole), (side, whole), (side, unknown), (side, whole)])


def test_distances_need_evenly_spaced_slices(monkeypatch):
    grid = Grid(np.eye(4), (8, 8, 1), "axial", (0, 1, 2), (1, 1, 1), (), even=False)
    whole, uneven = frames(masked(1)), frames(masked(1))._replace(grid=grid)
    assert len(splits_of(monkeypatch, [("train", uneven), ("val", uneven), ("test", whole)]).train) == 1
    with pytest.raises(ValueError, match="file: expected evenly spaced slices, .* got others in 1; add the missing"):
        splits_of(monkeypatch, [("train", whole), ("test", uneven)])


def test_cases_are_spread_over_the_list():
    assert spread_cases(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread_cases([1, 2], 5) == [1, 2]
