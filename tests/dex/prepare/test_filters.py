"""What is dropped, and what is suspected of text: drawn text, real ultrasound screens, real images without text."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from dex.data import open_dataset
from dex.prepare import readers
from dex.prepare.filters import DROPPED, suspect_text, verdict
from dex.prepare.slices import slices

SOURCE = SimpleNamespace(min_foreground=0.05)


def embedded(step: int):
    dataset = open_dataset(None)
    for index in range(0, len(dataset), step):
        sample = dataset[index]
        yield sample.id, sample.image.numpy().transpose(1, 2, 0)


def anatomy() -> np.ndarray:
    """uint8 [256, 256]: a textured disc on black."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    texture = np.asarray(Image.fromarray(rng.integers(40, 220, (32, 32), np.uint8)).resize((256, 256)))
    return np.where((y - 140) ** 2 + (x - 128) ** 2 < 80**2, texture, 0).astype(np.uint8)


def write(image: np.ndarray, lines: list[str], level: int = 255, size: int = 10, at=(6, 4)) -> np.ndarray:
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + 14 * number), line, fill=level, font=ImageFont.load_default(size))
    return np.asarray(picture)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.05, None), (0.0499, "foreground"), (1.0, None), (0.0, "foreground")]
)
def test_foreground_is_the_source_s(share, expected):
    assert verdict(anatomy(), share, False, SOURCE) == expected
    assert verdict(anatomy(), share, False, SimpleNamespace(min_foreground=0.0)) is None


def test_first_reason_that_holds():
    blank = np.full((256, 256), 90, np.uint8)
    assert verdict(blank, 0.0, True, SOURCE) == "too small"
    assert verdict(blank, 0.0, False, SOURCE) == "blank"
    assert set(DROPPED) >= {"too small", "blank", "foreground"}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_noise_is_blank_and_a_faint_disc_is_not(dtype):
    """Whatever share of its pixels is off the background level, noise has no structure."""
    rng = np.random.default_rng(1)
    full = np.iinfo(dtype).max
    noise = np.clip(0.05 + rng.normal(0, 0.03, (256, 256)), 0, 1)
    assert verdict((noise * full).astype(dtype), 0.6, False, SOURCE) == "blank"
    noise[100:150, 100:150] += 0.04
    assert verdict((noise * full).astype(dtype), 0.6, False, SOURCE) is None


@pytest.mark.parametrize(
    ("dtype", "total", "expected"),
    [(np.uint8, 1305, "blank"), (np.uint8, 1306, None), (np.uint16, 335_539, "blank"), (np.uint16, 335_540, None)],
)
@pytest.mark.parametrize("ground", [0, 100])
def test_border_of_blank(dtype, total, expected, ground):
    """Of full scale 0.02 are 5.1 or 1310.7 levels: in the 256 pixels of a block 1305.6 or 335,539.2 in all."""
    image = np.full((256, 256), ground, dtype)
    block = np.full(256, total // 256)
    block[: total % 256] += 1
    assert block.sum() == total
    image[240:, 240:] += block.reshape(16, 16).astype(dtype)
    assert verdict(image, 1.0, False, SOURCE) == expected


def test_blank_looks_at_every_channel():
    colour = np.zeros((256, 256, 3), np.uint8)
    assert verdict(colour, 1.0, False, SOURCE) == "blank"
    colour[80:160, 80:160, 2] = 60
    assert verdict(colour, 1.0, False, SOURCE) is None


def test_no_embedded_image_is_blank():
    assert not [name for name, image in embedded(5) if verdict(image, 1.0, False, SOURCE)]


@pytest.mark.parametrize("size", [9, 10, 12])
@pytest.mark.parametrize("ground", [0, 255])
def test_drawn_text_is_suspected(size, ground):
    image = anatomy() if ground == 0 else 255 - anatomy()
    assert not suspect_text(image)
    lines = ["MEDICAL CENTER 12:04:31", "ID 4711-08  MI 0.9"]
    text = write(image, lines, 255 - ground, size)
    assert suspect_text(text)
    assert suspect_text(text.astype(np.uint16) * 257)
    assert suspect_text(np.stack([text] * 3, axis=2))
    assert suspect_text(text.T.copy().T), "layout in memory does not matter"


def test_coloured_text_is_suspected():
    colour = np.stack([anatomy()] * 3, axis=2)
    picture = Image.fromarray(colour)
    ImageDraw.Draw(picture).text((6, 4), "MEDICAL CENTER 12:04:31", fill=(20, 60, 250), font=ImageFont.load_default(10))
    assert suspect_text(np.asarray(picture))


def test_faint_text_is_not_suspected():
    assert not suspect_text(write(anatomy(), ["MEDICAL CENTER 12:04:31", "ID 4711-08"], 30))


@pytest.mark.parametrize(
    "draw",
    [
        lambda d: d.rectangle((20, 20, 230, 26), fill=255),  # a bar, a frame, a line, a grey wedge, a blob
        lambda d: d.rectangle((10, 10, 240, 240), outline=200),
        lambda d: d.line((0, 30, 255, 90), fill=255, width=2),
        lambda d: [d.line((240, y, 250, y), fill=y) for y in range(256)],
        lambda d: d.ellipse((30, 8, 60, 18), fill=255),
    ],
)
def test_other_overlays_are_not_suspected(draw):
    picture = Image.fromarray(np.zeros((256, 256), np.uint8))
    draw(ImageDraw.Draw(picture))
    assert not suspect_text(np.asarray(picture))


@pytest.mark.parametrize(("gap", "expected"), [(10, True), (40, False)])
def test_two_strokes_in_a_window_are_text(gap, expected):
    image = np.zeros((256, 256), np.uint8)
    for left in range(20, 200, gap):
        image[30:38, left : left + 3] = 255
    assert suspect_text(image) == expected


@pytest.mark.parametrize(("left", "expected"), [(0, False), (8, True)])
def test_two_windows_are_needed(left, expected):
    """Windows begin at every 8th column: two strokes at the border lie in the first one only, further in, in two."""
    image = np.zeros((256, 256), np.uint8)
    for stroke in (left + 1, left + 5):
        image[30:38, stroke : stroke + 2] = 255
    assert suspect_text(image) == expected


@pytest.mark.parametrize(("height", "expected"), [(3, False), (4, True), (12, True), (13, False)])
def test_a_line_of_text_has_4_to_12_rows(height, expected):
    image = np.zeros((256, 256), np.uint8)
    for left in range(20, 200, 8):
        image[30 : 30 + height, left : left + 3] = 255
    assert suspect_text(image) == expected


def test_no_embedded_image_is_suspected():
    """Their ultrasound images were cut out clear of text."""
    assert not [name for name, image in embedded(2) if suspect_text(image)]


def test_embedded_images_are_suspected_once_text_is_in_their_margin():
    """The rest of an image hides nothing: a margin above it is enough."""
    found = []
    for _, image in embedded(45):
        image = image.copy()
        image[:40] = 0
        found.append(suspect_text(write(image, ["GENERAL HOSPITAL", "08-NOV-1961 F"], 230)))
    assert len(found) >= 14 and all(found)


@pytest.mark.parametrize("name", ["examples_rgb_color", "examples_palette"])
def test_real_ultrasound_screens_are_suspected(name):
    """Files that pydicom brings; resized as `dex prepare` does, the longer side to 256."""
    pydicom = pytest.importorskip("pydicom")
    pixels = pytest.importorskip("pydicom.pixels")
    file = Path(pydicom.__file__).parent / "data" / "test_files" / f"{name}.dcm"
    assert file.exists(), f"pydicom came without {file.name}"
    dataset = pydicom.dcmread(file)
    values = pixels.pixel_array(dataset)
    if name == "examples_palette":
        values = (pixels.apply_color_lut(values, dataset) / 256).astype(np.uint8)
    picture = Image.fromarray(values)
    scale = 256 / max(picture.size)
    content = np.asarray(picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC))
    screen = np.zeros((256, 256, 3), np.uint8)
    top, left = (256 - content.shape[0]) // 2, (256 - content.shape[1]) // 2
    screen[top : top + content.shape[0], left : left + content.shape[1]] = content
    assert suspect_text(screen)


def speckle(seed: int, level: float) -> np.ndarray:
    """uint8 [256, 256]: a sector of ultrasound, and a tenth of its speckle where the screen is dark."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:256, :256]
    tissue = np.asarray(Image.fromarray(rng.random((20, 20)).astype(np.float32)).resize((256, 256)))
    echo = rng.rayleigh(level, (256, 256)) * (0.5 + tissue)
    sector = (np.hypot(y - 20, x - 128) < 220) & (np.abs(x - 128) < 0.8 * (y - 15)) & (y > 40)
    return (np.where(sector, 3 * echo, 0.15 * echo) * 255).clip(0, 255).astype(np.uint8)


def grain(seed: int, deviation: float, level: float) -> np.ndarray:
    """uint8 [256, 256]: two lungs on film whose grain has this standard deviation."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:256, :256]
    lungs = sum(0.3 * np.exp(-((x - cx) ** 2 + (y - 140) ** 2) / 3000) for cx in (80, 176))
    return ((level + lungs + rng.normal(0, deviation, (256, 256))) * 255).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("ground", "level"),
    [
        *[(lambda seed, s=s: speckle(seed, s), 255) for s in (0.01, 0.02, 0.05, 0.1)],
        *[(lambda seed, s=s: grain(seed, s, 0.05), 255) for s in (0.005, 0.01, 0.02, 0.04)],
        *[(lambda seed, s=s: grain(seed, s, 0.65), 0) for s in (0.005, 0.01, 0.02, 0.04)],
    ],
)
def test_text_on_noise_is_suspected_and_noise_is_not(ground, level):
    """Pillow's own letters in every corner. Those of 18 pixels are too high; those upon the sector are not promised."""
    corners = [(6, 4), (120, 4), (6, 222), (120, 222)]
    found = {
        size: sum(
            suspect_text(write(ground(seed), ["MEDICAL CENTER 12:04", "ID 4711-08  MI 0.9"], level, size, at))
            for seed, at in enumerate(corners)
        )
        for size in (7, 8, 10, 12, 14)
    }
    alarms = sum(suspect_text(ground(100 + seed)) for seed in range(8))
    assert alarms == 0
    assert all(found[size] == len(corners) for size in (10, 12, 14)), found
    assert sum(found.values()) >= 0.9 * len(corners) * len(found), found


@pytest.mark.parametrize(
    ("name", "rule", "text"),
    [
        ("examples_rgb_color", "display", True),
        ("examples_palette", "display", True),
        ("CT_small", "mr", False),
        ("MR_small", "mr", False),
        ("693_J2KI", "mr", False),
        ("JPEG2000", "mr", False),
    ],
)
def test_real_files_as_they_are_prepared(name, rule, text):
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("openjpeg")
    file = Path(pydicom.__file__).parent / "data" / "test_files" / f"{name}.dcm"
    assert file.exists(), f"pydicom came without {file.name}"
    source = SimpleNamespace(normalisation=rule, planes=("axial",), frame_stride=1, whole=True, crop=False, tiles=())
    images = [one.image for stack in readers.read([file], "dicom") for one in slices(stack, source, 256, 8)]
    assert images and all(suspect_text(image) == text for image in images)


def test_small_and_wrong_images():
    assert suspect_text(np.zeros((16, 16), np.uint8)) is False
    with pytest.raises(ValueError, match=r"image: expected uint8 or uint16 .*got float32 \[8, 8\]"):
        suspect_text(np.zeros((8, 8), np.float32))
