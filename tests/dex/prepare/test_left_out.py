"""The private page of what was left out: thumbnails by reason, for the owner's eyes alone."""

import base64
import io
import os
import re
import stat

import numpy as np
import pytest
from PIL import Image
from small_runs import picture, save, save_dicom

from dex.prepare import left_out, run
from dex.prepare.chunks import Settings
from dex.prepare.run import Options, prepare
from dex.prepare.sources import resolve
from dex.prepare.summary import Progress

CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


@pytest.fixture
def made(inline_workers, tmp_path):
    """A set with two kept pictures; a mask, eight screens and a broken picture are left out."""
    root = tmp_path / "scans"
    for number in range(2):
        save(root, f"p{number}/{number}.png", picture(number))
    mask = np.zeros((64, 64), np.uint8)
    mask[10:40, 20:50], mask[15:25, 25:35] = 1, 2
    save(root, "p0/0_mask.png", mask)
    for number in range(8):
        save_dicom(root / f"p1/Doe-{number}.dcm", picture(50 + number), Modality="OT", SOPClassUID=CAPTURE)
    (root / "p1" / "bad.jpg").write_bytes(b"no picture")
    with open(os.path.join(os.fsencode(root), b"p1/\xff<b>.jpg"), "wb") as file:
        file.write(b"no picture")
    prepare(resolve(root, modality="X-ray"), Options(tmp_path / "out", Settings(size=64)), lambda text: None).run(
        Progress()
    )
    return tmp_path


def pictures(html):
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in re.findall(r"base64,([^\"]+)\"", html)
    ]


def test_the_page_is_private_and_shows_a_few_of_each_reason(made):
    path = run.private_folder(made / "out") / left_out.PAGE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    html = path.read_text()
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", html) == ["label map", "secondary capture", "unreadable"]
    assert "8 files or parts" in html and html.count("Doe-") == 2 * left_out.SHOWN  # caption and alternative text
    shown = pictures(html)
    assert len(shown) == 1 + left_out.SHOWN and {image.shape for image in shown} == {(64, 64)}
    assert sorted(np.unique(shown[0])) == [0, 127, 255]  # a mask of 0, 1 and 2 is to be seen
    assert (
        "p1/\\udcff&lt;b&gt;.jpg" in html
        and html.count(">no image<") == 2
        and "first bytes are those of no picture" in html
    )
    assert "<script" not in html and "default-src 'none'" in html


def test_nothing_of_it_is_in_the_set(made):
    """Neither pixels nor names: the card counts, and says where the pictures are."""
    card = (made / "out" / "card.html").read_text()
    assert "secondary capture" in card and "left_out.html" in card and "Doe" not in card
    shown = {image.tobytes() for image in pictures((run.private_folder(made / "out") / left_out.PAGE).read_text())}
    kept = {image.tobytes() for image in pictures(card)}
    assert len(kept) == 2 and shown.isdisjoint(kept)


def test_an_earlier_page_does_not_stay_where_nothing_is_left_out(made):
    private = run.private_folder(made / "out")
    for table in (private / "ids").iterdir():
        table.unlink()
    left_out.write(private, [made / "scans"], run.Options(made).limits, 1)
    assert not (private / left_out.PAGE).exists()


def test_the_same_files_are_shown_again(made):
    private = run.private_folder(made / "out")
    before = (private / left_out.PAGE).read_bytes()
    (private / left_out.PAGE).unlink()
    left_out.write(private, [made / "scans"], run.Options(made).limits, 1)
    assert (private / left_out.PAGE).read_bytes() == before


@pytest.mark.parametrize(
    "frame, values",
    [
        (np.array([[-5.0, np.nan], [5.0, 0.0]]), [0, 128, 255]),
        (np.full((2, 2), 7, np.int16), [0]),
        (np.array([[0, 200], [90, 30]], np.uint8), [0, 30, 90, 200]),
        (np.array([[0, 1], [2, 2]], np.uint8), [0, 127, 255]),
    ],
)
def test_numbers_become_visible(frame, values):
    assert sorted(np.unique(np.asarray(Image.open(io.BytesIO(left_out.thumbnail(frame)))))) == values


def test_a_thumbnail_is_small():
    image = Image.open(io.BytesIO(left_out.thumbnail(np.zeros((900, 300, 3), np.uint8))))
    assert image.size == (43, 128) and image.mode == "RGB"
