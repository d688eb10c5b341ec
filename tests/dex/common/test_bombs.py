"""Few bytes that would make a decoder work long are known beforehand."""

import io

import pytest

from dex.common import bombs

Image = pytest.importorskip("PIL.Image")


def opened(kind, **options):
    stream = io.BytesIO()
    Image.new("L", (64, 64), 7).save(stream, kind, **options)
    return Image.open(io.BytesIO(stream.getvalue())), stream.getvalue()


def test_scans_of_a_jpeg():
    image, data = opened("JPEG", progressive=True)
    assert not bombs.has_too_many_scans(data) and bombs.too_much(image, len(data), lambda: data) == ""
    start = data.rindex(b"\xff\xda")
    many = data[:start] + data[start:-2] * bombs.MAX_SCANS + data[-2:]
    assert bombs.has_too_many_scans(many) and "scans" in bombs.too_much(image, len(many), lambda: many)


def test_numbers_that_are_written_as_text():
    image = Image.open(io.BytesIO(b"P2 2 2 255 " + b"7 " * 4))
    assert bombs.too_much(image, bombs.MAX_RUNS, bytes) == ""
    assert "numbers that Pillow decodes in Python" in bombs.too_much(image, bombs.MAX_RUNS + 1, bytes)
    image, data = opened("PPM")  # these are
    assert bombs.too_much(image, 2**40, bytes) == ""


def test_tiles_and_strips_of_a_tiff():
    image, data = opened("TIFF")
    assert bombs.too_much_of_tiff(image, 64) == ""
    image.tag_v2[322], image.tag_v2[323] = 64, 64
    assert "tiles of 64 x 64 pixels, at most 4,095" in bombs.too_much_of_tiff(image, 4095)
    image.tag_v2[273] = tuple(range(bombs.MAX_STRIPS + 1))
    assert "strips or tiles" in bombs.too_much_of_tiff(image, 4096)
