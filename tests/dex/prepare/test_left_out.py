"""The private page of what was left out: thumbnails by reason, for the owner's eyes alone."""

import base64
import io
import os
import re
import stat

import numpy as np
import pytest
from browser import CHROMIUM, measured
from PIL import Image
from small_runs import picture, save, save_dicom, source, start

from dex.data import verify
from dex.prepare import chunk_files, left_out, run, thumbnails, unfinished, withdraw
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
    assert "8 files or parts" in html and html.count("Doe-") == 2 * thumbnails.SHOWN  # caption and alternative text
    shown = pictures(html)
    assert len(shown) == 1 + thumbnails.SHOWN and {image.shape for image in shown} == {(64, 64)}
    levels = shown[0].astype(int)  # a mask of 0, 1 and 2 is to be seen
    assert all((abs(levels - level) < 9).sum() > 50 for level in (0, 127, 255))
    assert (
        "p1/\\udcff&lt;b&gt;.jpg" in html
        and html.count(">no image<") == 2
        and "first bytes are not those of a picture" in html
    )
    assert "<script" not in html and "default-src 'none'" in html


def test_nothing_of_it_is_in_the_set(made):
    """Neither pixels nor names: the card counts, and says where the pictures are."""
    card = (made / "out" / "card.html").read_text()
    assert "secondary capture" in card and "left_out.html" in card and "Doe" not in card
    shown = {image.tobytes() for image in pictures((run.private_folder(made / "out") / left_out.PAGE).read_text())}
    kept = {image.tobytes() for image in pictures(card)}
    assert len(kept) == 2 and shown.isdisjoint(kept)


def look_again(made):
    private = run.private_folder(made / "out")
    listed = [left_out.Listed(*resolve(made / "scans", modality="X-ray"), made / "scans")]
    return private, left_out.look_at(private, listed, run.Options(made).limits, 1)


def test_an_earlier_page_does_not_stay_where_nothing_is_left_out(made):
    private = run.private_folder(made / "out")
    for table in (private / "ids").iterdir():
        table.unlink()
    left_out.write(*look_again(made))
    assert not (private / left_out.PAGE).exists() and not (private / left_out.RECORD).exists()


def test_the_same_files_are_shown_again(made):
    private = run.private_folder(made / "out")
    before = (private / left_out.PAGE).read_bytes()
    (private / left_out.PAGE).unlink()
    left_out.write(*look_again(made))
    assert (private / left_out.PAGE).read_bytes() == before


@pytest.fixture
def dropped(here, tmp_path):
    """Pictures of four patients: each has a blank one and one with hardly any foreground; p2's repeats p1's; one is a
    screen."""
    dot = np.zeros((64, 64), np.uint8)
    dot[:10, :10] = np.arange(60, 160).reshape(10, 10)
    for number in range(4):
        save(tmp_path / "scans", f"p{number}/kept.png", picture(number))
        save(tmp_path / "scans", f"p{number}/blank.png", np.full((64, 64), 30 + number, np.uint8))
        save(tmp_path / "scans", f"p{number}/dot.png", np.roll(dot, 3 * number))
    again = picture(1)
    again[20, 20] ^= 8
    save(tmp_path / "scans", "p2/near.png", again)
    save(tmp_path / "scans", "p3/same.png", picture(0))
    save_dicom(tmp_path / "screens" / "p0" / "Doe.dcm", picture(50), Modality="OT", SOPClassUID=CAPTURE)
    return tmp_path


def made_of(tmp_path, public):
    pictures = source(tmp_path / "scans", patient="folder", public=public, min_foreground=0.05)
    screens = source(tmp_path / "screens", "screens", trusted=False, public=public)
    start([pictures, screens], tmp_path / "out")
    card = (tmp_path / "out" / "card.html").read_text()
    left = (tmp_path / "out.private" / left_out.PAGE).read_text()
    return card.split('id="left-out"')[1].split("</section>")[0], left


REASONS = {"blank": 4, "exact duplicate": 2, "foreground": 4, "near duplicate": 2, "secondary capture": 1}


def test_dropped_slices_and_pairs_of_duplicates_are_shown(dropped):
    """Of private sources in the private page alone."""
    section, html = made_of(dropped, public=False)
    assert "base64" not in section and "left_out.html" in section
    for reason, meaning in (("blank", "one level"), ("near duplicate", "nearly the same pixels")):
        assert reason in section and meaning in section
    assert not (dropped / "out" / "left_out.json").exists()
    parts = dict(re.findall(r"<section.*?<h2[^>]*>(.*?)</h2>(.*?)</section>", html, re.DOTALL))
    assert {reason: len(pictures(part)) for reason, part in parts.items()} == REASONS
    left, right = pictures(parts["near duplicate"])
    assert 0 < abs(left.astype(int) - right).max() < 40 and html.count('class="pair"') == 2
    assert "p1/dot.png" in parts["foreground"] and "4 slices" in parts["blank"]


def test_the_card_of_public_sources_shows_what_was_left_out(dropped):
    section, _ = made_of(dropped, public=True)
    parts = dict(re.findall(r"<h3>(.*?)</h3>(.*?)(?=<h3>|<p>At most)", section, re.DOTALL))
    assert {reason: len(pictures(part)) for reason, part in parts.items()} == REASONS
    assert "Doe" not in re.sub(r"base64,[^\"]*", "", section)


@pytest.mark.parametrize("public", [False, True])
def test_a_withdrawal_takes_the_patients_thumbnails_and_leaves_the_others(dropped, public):
    """Those of files of which nobody knows whose they are go with every withdrawal."""
    before = made_of(dropped, public)
    folder = dropped / "out.private"
    withdraw.withdraw(dropped / "out", folder, ["p2"])
    card = (dropped / "out" / "card.html").read_text().split('id="left-out"')[1].split("</section>")[0]
    page = (folder / left_out.PAGE).read_text()
    for number, html in enumerate((card, page)):
        if number == 0 and not public:
            continue
        gone = {image.tobytes() for image in pictures(before[number])} - {image.tobytes() for image in pictures(html)}
        # blank, dot, screen, and the pair; from the card p1's too, whose image in the set was a copy
        assert (len(pictures(html)), len(gone)) == ((6, 7) if number == 0 else (8, 5))
    words = re.sub(r"base64,[^\"]*", "", page)
    assert "p2" not in words and "Doe" not in words and "p1/dot.png" in page and "4 slices" in page
    assert b"p2/" not in (folder / left_out.RECORD).read_bytes()
    assert [row for row in verify(dropped / "out")] == []


def test_without_its_record_a_withdrawal_leaves_no_thumbnail(dropped):
    made_of(dropped, public=False)
    folder = dropped / "out.private"
    (folder / left_out.RECORD).write_text("{")
    withdraw.withdraw(dropped / "out", folder, ["p2"])
    assert not (folder / left_out.PAGE).exists() and not (folder / left_out.RECORD).exists()


def test_what_is_shown_does_not_depend_on_a_kill(dropped, tmp_path, monkeypatch):
    """Thumbnails of dropped slices are written down as images are."""
    _, html = made_of(dropped, public=False)
    real, calls = chunk_files.ChunkFiles.flush, []

    def flush(self):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(unfinished, "EVERY", 0)
    monkeypatch.setattr(chunk_files.ChunkFiles, "flush", flush)
    (dropped / "out").rename(dropped / "first")
    (dropped / "out.private").rename(dropped / "first.private")
    with pytest.raises(KeyboardInterrupt):
        made_of(dropped, public=False)
    assert made_of(dropped, public=False)[1] == html


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.slow
def test_the_page_fits_wide_and_narrow_screens(dropped, tmp_path):
    _, html = made_of(dropped, public=False)
    for width in measured(html, tmp_path).values():
        assert width["bad"] == [] and width["images"] == sum(REASONS.values())
