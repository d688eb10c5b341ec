"""Frames and masks of a case lie upon each other, however their files are turned."""

import itertools

import numpy as np
import pytest
from PIL import Image

from dex.inference.preprocess import opened_whole
from dex.prepare.slices import slices, unscaled
from dex.tasks.frames import read, read_target
from dex.tasks.task import Case, Layout, Task

TURNS = [
    np.stack([order, flips], axis=1)
    for order, flips in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
]


def task(plane="auto", **fields):
    fields = {"classes": ("one", "two"), "modality": "CT", "plane": plane, "layout": Layout("own")} | fields
    return Task("t", **fields)


def case(image, target):
    return Case("t/1", "p", "train", image, target)


def classes_in(images):
    """Of CT frames of `volume`: the class by brightness."""
    return np.digitize(images, (100, 170)).astype(np.uint8)  # 0, 100 and 300 HU are 85, 128 and 212


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal", "stored", "auto"])
def test_masks_lie_on_their_images_however_both_are_turned(tmp_path, volume, save_nifti, plane):
    for number, turn in enumerate(TURNS):
        image = save_nifti(tmp_path / "i.nii", volume.values, volume.affine, turn)
        mask = save_nifti(tmp_path / "m.nii", volume.labels, volume.affine, TURNS[(number * 17 + 5) % len(TURNS)])
        frames = read(case(image, mask), task(plane))
        assert set(np.unique(frames.masks)) == {0, 1, 2}
        assert np.array_equal(classes_in(frames.images), frames.masks)
        assert np.array_equal(read_target(case(image, mask), task(plane)), frames.masks)
        assert np.prod(frames.spacing_mm) == pytest.approx(0.8 * 1.1 * 1.5, rel=1e-5)
        assert sorted(frames.grid.shape) == sorted(volume.labels.shape)


def test_frames_of_a_plane_do_not_depend_on_how_the_file_is_turned(tmp_path, volume, save_nifti):
    first = None
    for turn in TURNS:
        image = save_nifti(tmp_path / "i.nii", volume.values, volume.affine, turn)
        frames = read(case(image, None), task("axial"))
        images = frames.images
        if frames.grid.axes[2] == 2 and frames.grid.signs[2] < 0:  # stored frames come in the order of the file
            images = images[::-1]
        first = images if first is None else first
        assert np.array_equal(images, first)
        assert frames.masks is None and frames.label is None
        assert frames.spacing_mm == pytest.approx((1.5, 1.1, 0.8), rel=1e-5)


def test_a_mask_on_another_grid_is_refused_with_both_grids(tmp_path, volume, save_nifti):
    image = save_nifti(tmp_path / "i.nii", volume.values, volume.affine)
    shifted, wider = volume.affine.copy(), volume.affine @ np.diag([1, 1, 1.2, 1])
    shifted[:3, 3] += 0.5
    for name, affine, labels in (
        ("shifted", shifted, volume.labels),
        ("spacing", wider, volume.labels),
        ("size", volume.affine, volume.labels[:, :, :-1]),
        ("no header", np.eye(4), volume.labels),
    ):
        mask = save_nifti(tmp_path / f"{name}.nii", labels, affine)
        with pytest.raises(
            ValueError, match=r"mask: expected the grid of its image, 12 x 10 x 9 voxels .* got .* voxels"
        ):
            read(case(image, mask), task())
        with pytest.raises(ValueError, match="resample the mask"):
            read_target(case(image, mask), task())


def test_a_series_and_its_mask_as_nifti_or_as_a_segmentation(tmp_path, save_series, save_nifti, save_segmentation):
    labels = np.zeros((5, 16, 14), np.uint8)
    labels[1:4, 2:9, 3:8], labels[3:, 10:13, 9:13] = 1, 2
    for reverse in (False, True):
        heads = save_series(tmp_path / f"s{reverse}", np.array([0, 100, 300])[labels], reverse=reverse)
        step = -2.0 if reverse else 2.0
        affine = np.array([[-0.5, 0, 0, 10], [0, -0.75, 0, -20], [0, 0, step, 50], [0, 0, 0, 1]])
        nifti = save_nifti(tmp_path / "m.nii.gz", labels.transpose(2, 1, 0), affine, TURNS[29])
        seg = save_segmentation(tmp_path / "seg.dcm", labels, heads, ["one", "two"])
        for mask in (nifti, seg):
            frames = read(case(tmp_path / f"s{reverse}", mask), task())
            assert np.array_equal(classes_in(frames.images), frames.masks)
            assert (frames.masks == 2).sum() == (labels == 2).sum()
            assert frames.spacing_mm == (2.0, 0.75, 0.5)
        assert len(frames.grid.files) == 5 and frames.grid.shape == (14, 16, 5)
        assert frames.affine[2, 3] == min(50, 50 + 4 * step)  # in the order of positions


def test_frames_are_the_slices_of_prepare_before_they_are_resized(tmp_path, volume, save_nifti):
    image = save_nifti(tmp_path / "i.nii", volume.values, volume.affine)
    frames = read(case(image, None), task("axial"))
    opened = opened_whole(image, "CT", ("axial",))
    for whole, small, mine in zip(
        unscaled(opened.stack, opened.source), slices(opened.stack, opened.source, 64, 8), frames.images, strict=True
    ):
        assert whole.label == small.label
        assert np.array_equal(whole.image, mine)
        assert abs(int(small.image.max()) - int(mine.max())) < 40


def test_pictures_keep_their_size_and_colours(tmp_path, save_png):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 33, 3), dtype=np.uint8)
    mask = (pixels[..., 0] > 128).astype(np.uint8)
    image, target = save_png(tmp_path / "i é.png", pixels), save_png(tmp_path / "m.png", mask)
    frames = read(case(image, target), task(modality="endoscopy"))
    assert np.array_equal(frames.images[0], pixels) and np.array_equal(frames.masks[0], mask)
    assert frames.spacing_mm is None and frames.grid is None and frames.affine is None
    frames = read(case(tmp_path / "i é.png", 1), task(kind="classification", modality=""))
    assert frames.label == 1 and frames.masks is None and frames.images.shape == (1, 24, 33, 3)


def test_a_mask_of_another_size_is_refused(tmp_path, save_png):
    image = save_png(tmp_path / "i.png", np.zeros((24, 33, 3), np.uint8))
    mask = save_png(tmp_path / "m.png", np.zeros((33, 24), np.uint8))
    with pytest.raises(ValueError, match=r"mask: expected the size of its image, 24 x 33, got 33 x 24 in .*m.png"):
        read(case(image, mask), task(modality="endoscopy"))


def test_an_image_that_is_to_be_turned_and_a_mask_that_is_not_are_refused(tmp_path, save_png):
    tag = Image.Exif()
    tag[0x0112] = 3
    pixels = np.zeros((24, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "i.jpg", exif=tag)
    mask = save_png(tmp_path / "m.png", np.zeros((24, 32), np.uint8))
    with pytest.raises(ValueError, match="EXIF orientation of its image, 3, got 1"):
        read(case(tmp_path / "i.jpg", mask), task(modality="endoscopy"))


def test_a_format_that_does_not_say_how_it_lies_is_no_mask_of_one_that_does(tmp_path, volume, save_nifti):
    image = save_nifti(tmp_path / "i.nii", volume.values, volume.affine)
    np.save(tmp_path / "m.npy", volume.labels.transpose(2, 1, 0))
    with pytest.raises(ValueError, match="formats with an orientation for both"):
        read(case(image, tmp_path / "m.npy"), task())


def test_several_series_in_a_folder_are_refused(tmp_path, save_series):
    values = np.zeros((3, 16, 16), np.int16)
    values[:, 4:9] = 100
    save_series(tmp_path / "s", values)
    for path in (tmp_path / "s").iterdir():
        path.rename(path.with_name(f"a{path.name}"))
    save_series(tmp_path / "s", values)
    with pytest.raises(ValueError, match="2 series or volumes, by Series Number . .3 images., . .3 images."):
        read(case(tmp_path / "s", None), task())
