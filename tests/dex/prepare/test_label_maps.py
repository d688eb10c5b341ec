import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dex.data
from dex.prepare.label_maps import FRAMES, intent, is_probability_map, judge, measure, spread, suspicious

RNG = np.random.default_rng(0)
Z, Y, X = np.mgrid[0:24, 0:96, 0:80].astype(np.float64)


def ball(z, y, x, r):
    return (Z - z) ** 2 * 9 + (Y - y) ** 2 + (X - x) ** 2 < r * r


def anatomy():
    """A volume of soft balls, float [24, 96, 80] within 0 and 1, without noise."""
    volume = np.zeros(Z.shape)
    for z, y, x, r, value in (
        (12, 48, 40, 44, 0.4),
        (12, 40, 30, 14, 0.3),
        (10, 60, 50, 12, 0.35),
        (14, 30, 52, 8, 0.5),
    ):
        distance = np.sqrt((Z - z) ** 2 * 9 + (Y - y) ** 2 + (X - x) ** 2)
        volume += value / (1 + np.exp((distance - r) / 1.5))
    return volume / volume.max()


def noisy(volume, sigma):
    return volume + RNG.normal(0, sigma, volume.shape)


def organs():
    labels = np.zeros(Z.shape, np.uint8)
    for value, place in ((5, (12, 48, 40, 40)), (1, (12, 40, 30, 14)), (117, (10, 60, 50, 12)), (52, (14, 30, 52, 8))):
        labels[ball(*place)] = value
    return labels


def parcels(count):
    """`count` cells of random seeds within a ball, like an atlas of the cortex: values up to 14,175."""
    seeds = RNG.uniform((0, 8, 8), (24, 88, 72), (count, 3))
    nearest = np.stack([(Z - z) ** 2 * 9 + (Y - y) ** 2 + (X - x) ** 2 for z, y, x in seeds]).argmin(axis=0)
    names = RNG.permutation(np.arange(1000, 14176, 13))[:count]
    return np.where(ball(12, 48, 40, 40), names[nearest], 0).astype(np.int16)


def layers():
    """Nine layers of a retina, from 0 down to 8."""
    y, x = np.mgrid[0:96, 0:80]
    return np.digitize(y + 6 * np.sin(x / 12), np.arange(20, 84, 8)).astype(np.uint8)[None]


def heart():
    """A cavity (3) within its muscle (2), and another (1) beside it."""
    labels = np.where(ball(12, 48, 40, 30), 2, 0)
    labels[ball(12, 48, 40, 20)] = 3
    labels[ball(12, 48, 6, 12)] = 1
    return labels.astype(np.int16)


def vessels():
    mask = np.zeros((256, 256), np.uint8)
    for phase in np.linspace(0, 6, 9):
        x = np.arange(256)
        y = (128 + 90 * np.sin(x / 40 + phase)).astype(int)
        for width in range(3):
            mask[np.clip(y + width, 0, 255), x] = 255
    return mask


def as_jpeg(image, quality=95):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


LABELS = {
    "organs": organs(),
    "organs as float": organs().astype(np.float64),
    "organs scaled": organs().astype(np.float32) / 255,
    "organs and a void": np.where(X < 5, -1, organs().astype(np.int16)),
    "one organ": (organs() == 1).astype(np.uint8),
    "one organ, 0 and 255": (organs() == 117).astype(np.uint8) * 255,
    "bool": organs() == 5,
    "atlas": parcels(120),
    "vessels": vessels()[None],
    "layers, in order": layers(),
    "nested": heart(),
    "nested, as float": heart().astype(np.float32),
    "two of many slices": np.concatenate([np.zeros((40, 96, 80), np.uint8), (organs() == 52).astype(np.uint8)]),
}


@pytest.mark.parametrize("name", LABELS)
def test_label_maps_are_known_by_their_numbers(name):
    frames = LABELS[name]
    assert judge(frames) and judge(frames, named=True)


def test_coloured_masks_are_known_too():
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    places = np.searchsorted([0, 1, 5, 52, 117], organs()[12]) % 4
    assert judge([palette[places]])


def hounsfield():
    return noisy(anatomy() * 1100 - 1000, 12).astype(np.int16)


IMAGES = {
    "CT": hounsfield(),
    "CT without noise": (anatomy() * 1100 - 1000).astype(np.int16),
    "CT, windowed to 8 bits": np.clip((hounsfield() + 200) / 600 * 255, 0, 255).astype(np.uint8),
    "CT, narrow window": np.clip((hounsfield() + 20) / 60 * 255, 0, 255).astype(np.uint8),
    "MR": (noisy(anatomy(), 0.02).clip(0) * 900).astype(np.uint16),
    "MR of 16 levels": (noisy(anatomy(), 0.02).clip(0, 1) * 15).astype(np.uint8),
    "MR of 8 levels": (noisy(anatomy(), 0.05).clip(0, 1) * 7).astype(np.uint8),
    "MR of 8 levels without noise": np.rint(anatomy() * 7).astype(np.int16) * 36,
    "MR of 8 fractions without noise": (np.rint(anatomy() * 7) / 7).astype(np.float32),
    "dark, without noise": np.rint(anatomy() * 40).astype(np.uint8),
    "MR, skull stripped": np.where(organs() > 0, noisy(anatomy(), 0.02) * 900, 0).astype(np.float32),
    "float": noisy(anatomy(), 0.02).astype(np.float32),
    "fluorescence": RNG.poisson(anatomy() ** 4 * 3).astype(np.uint16),
    "X-ray, almost two levels": np.clip(noisy(anatomy()[12:13], 0.01) * 2000 - 500, 0, 255).astype(np.uint8),
    "saturated": np.clip(noisy(anatomy(), 0.05) * 900, 0, 255).astype(np.uint8),
    "phantom of HU": np.where(organs() > 0, organs().astype(np.int16), -1000),
    "phantom of one number": np.where(organs() > 0, 800, 0).astype(np.int16),
    "noise of two levels": (RNG.random((4, 64, 64)) < 0.5).astype(np.uint8),
    "JPEG": as_jpeg((anatomy()[12] * 255).astype(np.uint8), 30)[None],
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_none_of_any_name(name):
    frames = IMAGES[name]
    drawn = name.startswith("phantom") or name.endswith("without noise")
    assert not judge(frames) and (not judge(frames, named=True) or drawn)
    assert not any(judge(frame[None]) for frame in frames[:: max(1, len(frames) // 4)] if len(np.unique(frame)) > 3)


@pytest.mark.parametrize("scale", [1, 12])
def test_labels_that_follow_each_other_are_known_with_a_name_whatever_they_count(scale):
    """Layers from 0 to 8 are known without; those from 0 to 96 could be grey levels."""
    assert judge(layers() * scale, named=True) and judge(layers() * scale) == (scale == 1)
    deep = np.arange(0, 60).repeat(4)[None, :, None].repeat(40, 2)
    assert judge(deep, named=True) and not judge(deep) and not judge(deep * 4, named=True)
    assert not judge(deep / 60, named=True)


@pytest.mark.parametrize("value", [0, 255])
def test_what_is_blank_is_a_label_map_by_name_alone(value):
    blank = np.full((5, 64, 64), value, np.uint8)
    assert not judge(blank) and judge(blank, named=True)
    assert not judge([]) and not judge([np.zeros((1, 1), np.uint8)], named=True)


@pytest.mark.parametrize("quality", [90, 95, 100])
def test_a_mask_stored_as_jpeg_is_known_with_its_name(quality):
    mask = as_jpeg((organs()[12] == 5).astype(np.uint8).repeat(4, 0).repeat(4, 1) * 255, quality)
    assert len(np.unique(mask)) > 2 or quality == 100
    assert judge([mask], named=True)


def test_large_frames_are_judged_by_bands_and_long_stacks_by_some_frames():
    large = (anatomy()[12] * 255).astype(np.uint8).repeat(30, 0).repeat(30, 1)
    large = large + RNG.integers(0, 9, large.shape).astype(np.uint8)
    assert not judge([large])
    assert judge([organs()[12].repeat(30, 0).repeat(30, 1)])
    seen = []

    def frames():
        for number in range(100):
            seen.append(number)
            yield organs()[12]

    assert judge(frames()) and len(seen) == FRAMES
    assert spread(5) == [0, 1, 2, 3, 4] and len(spread(1000)) == FRAMES and max(spread(1000)) < 1000


def test_the_evidence_of_a_checkerboard():
    board = np.kron([[0, 1], [1, 0]], np.ones((4, 4), int))
    evidence = measure([board])
    assert (evidence.values, evidence.following) == (2, 1.0)
    assert evidence.flat == evidence.inside == pytest.approx(96 / 112)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "labelsTr/case_001.nii.gz",
            "p1/liver_seg.nii.gz",
            "mask.png",
            "p/brain_mask.nii",
            "x/img_gt.png",
            "aseg.mgz",
        ),
        *("sub-01_desc-aparcaseg_dseg.nii.gz", "aparc+aseg.mgz", "wmparc.mgz", "case-seg.nrrd", "Segmentation-0.nii"),
        *("masks/0001.jpg", "a/GT/1.png", "brainmask.nii.gz", "annotations/1.png", "parcellation.nii", "ROI_3.nii"),
        *("label.nii.gz", "lungMask.nii.gz", "SegmentationClass/1.png", "t1_labels.nii.gz", "ground truth/01.tif"),
    ],
)
def test_names_of_label_maps(path):
    assert suspicious(path)


@pytest.mark.parametrize(
    "path", ["ct/0001.dcm", "t1w.nii.gz", "imagesTr/a_0000.nii.gz", "segundo/1.png", "p/damask.png", "roitman/t2.nii"]
)
def test_other_names(path):
    assert suspicious(path) == (path == "p/damask.png")  # the numbers have to agree anyway


def test_intents_of_nifti():
    assert (intent(0), intent(1002), intent(1003)) == ("", "label map", "label map")
    assert {intent(code) for code in (3, 22, 1001, 1005, 1006, 1007)} == {"derived map"}
    assert {intent(code) for code in (2001, 2003, 1, -5)} == {""}


def test_maps_of_probabilities_are_known_by_name_and_range():
    tissue = np.where(ball(12, 48, 40, 40), anatomy(), 0)
    tissue /= tissue.max()
    assert is_probability_map(tissue, "sub-01_gm.nii.gz")
    assert is_probability_map((tissue * 255).astype(np.uint8), "sub-01_label-WM_probseg.nii.gz")
    assert not is_probability_map(tissue, "t1.nii.gz") and not judge(tissue)
    assert not is_probability_map(tissue * 900, "gm.nii.gz")  # an image's numbers
    assert not is_probability_map(tissue + 0.01, "pve_0.nii.gz")
    assert not is_probability_map([], "gm.nii.gz")


def test_no_embedded_image_is_a_label_map():
    """620 real images of 7 modalities: none, with and without a name that suggests it."""
    folder = Path(dex.data.__file__).parent / "embedded"
    count = 0
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith((".jpg", ".png")):
                    image = np.asarray(Image.open(io.BytesIO(archive.extractfile(member).read())))
                    assert not judge([image]) and not judge([image], named=True), member.name
                    count += 1
    assert count == 620
