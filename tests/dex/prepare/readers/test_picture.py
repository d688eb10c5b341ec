"""Pictures that the tests write, and files that ask for more than they are."""

import struct
import zlib

import numpy as np
import pytest
from flat_files import COLOUR, DEEP, DRAW, GREY, frames
from PIL import Image

from dex.data import open_dataset
from dex.prepare.readers import Refused, read


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "jp2", "ppm"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_eight_bits(tmp_path, suffix, pixels):
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **options)
    stack, (got,) = frames(tmp_path / f"a.{suffix}")
    wanted = np.stack([GREY] * 3, axis=2) if suffix == "webp" and pixels is GREY else pixels  # which has no grey
    assert stack.quantity == "display8" and not stack.volume and np.array_equal(got, wanted)


def test_gif(tmp_path):
    few = GREY // 64
    Image.fromarray(few * np.uint8(60)).save(tmp_path / "a.gif")
    stack, (got,) = frames(tmp_path / "a.gif")
    assert stack.quantity == "display8" and np.array_equal(got.reshape(*few.shape, -1)[:, :, 0], few * 60)
    colours = np.array([[200, 0, 0], [0, 90, 0], [7, 8, 9], [250, 250, 0]], np.uint8)
    Image.fromarray(colours[few]).quantize(4).save(tmp_path / "b.gif")
    assert np.array_equal(frames(tmp_path / "b.gif")[1][0], colours[few])


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, name):
    images = [Image.fromarray((GREY // 64 + n).astype(np.uint8) * np.uint8(40)) for n in range(3)]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], lossless=True)
    stack, (got,) = frames(tmp_path / name)
    assert np.array_equal(got.reshape(*GREY.shape, -1)[:, :, 0], GREY // 64 * 40)
    assert [str(one) for one in stack.refused] == ["inconsistent: frames after the first"]


def test_deep_ppm_and_jpeg_2000(tmp_path):
    for name in ("a.pgm", "a.jp2"):
        Image.fromarray(DEEP).save(tmp_path / name)
        stack, (got,) = frames(tmp_path / name)
        assert stack.quantity == "raw" and np.array_equal(got, DEEP)
    (tmp_path / "b.pgm").write_bytes(b"P2 3 2 255\n0 1 2\n3 4 255\n")
    assert frames(tmp_path / "b.pgm")[1][0].tolist() == [[0, 1, 2], [3, 4, 255]]
    (tmp_path / "c.ppm").write_bytes(b"P3 2000 2000 255\n" + b"0 " * 2**22)
    with pytest.raises(Refused, match="too large"):
        frames(tmp_path / "c.ppm")


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.jp2", "a.ppm"])
def test_pictures_that_are_cut_off(tmp_path, name):
    Image.fromarray(COLOUR).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for end in (4, 12, len(whole) // 2):
        (tmp_path / name).write_bytes(whole[:end])
        with pytest.raises(Refused, match="unreadable"):
            frames(tmp_path / name)


def test_jpeg(tmp_path):
    smooth = np.linspace(0, 255, 600).reshape(20, 30).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=98)
    assert np.abs(frames(tmp_path / "a.jpg")[1][0].astype(int) - smooth).max() < 6
    Image.fromarray(np.stack([smooth] * 3, 2)).convert("CMYK").save(tmp_path / "b.jpg", quality=98)
    assert np.abs(frames(tmp_path / "b.jpg")[1][0].astype(int) - smooth[:, :, None]).max() < 6


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_deep_grey_keeps_its_numbers(tmp_path, name):
    Image.fromarray(DEEP).save(tmp_path / name)
    stack, (got,) = frames(tmp_path / name)
    assert stack.quantity == "raw" and not stack.described and np.array_equal(got, DEEP)
    assert stack.percentiles(1, 99) == pytest.approx(np.percentile(DEEP, (1, 99)))


def test_tiff_of_32_bits(tmp_path):
    for values in (DRAW.normal(size=(20, 30)).astype(np.float32), DRAW.integers(-(10**6), 10**6, (20, 30), np.int32)):
        Image.fromarray(values).save(tmp_path / "a.tif")
        stack, (got,) = frames(tmp_path / "a.tif")
        assert stack.quantity == "raw" and np.array_equal(got, values.astype(np.float32))
    values = np.full((20, 30), np.nan, np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(Refused, match="not finite"):
        frames(tmp_path / "a.tif")


def test_palette_alpha_and_bilevel(tmp_path):
    palette = Image.fromarray((GREY % 3).astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 1, 2, 3])
    palette.save(tmp_path / "a.png")
    table = np.array([[255, 0, 0], [0, 255, 0], [1, 2, 3]])
    assert np.array_equal(frames(tmp_path / "a.png")[1][0], table[GREY % 3])
    palette.save(tmp_path / "a.png", transparency=1)  # the green is not to be seen
    assert np.array_equal(frames(tmp_path / "a.png")[1][0], np.array([[255, 0, 0], [0, 0, 0], [1, 2, 3]])[GREY % 3])
    alpha = np.dstack([COLOUR, np.where(GREY > 127, 255, 0).astype(np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "b.png")
    assert np.array_equal(frames(tmp_path / "b.png")[1][0], np.where(GREY[:, :, None] > 127, COLOUR, 0))
    Image.fromarray(alpha[:, :, 2:]).save(tmp_path / "c.png")
    assert np.array_equal(frames(tmp_path / "c.png")[1][0], np.where(GREY > 127, COLOUR[:, :, 2], 0))
    Image.fromarray(GREY > 127).save(tmp_path / "d.png")
    assert np.array_equal(frames(tmp_path / "d.png")[1][0], np.where(GREY > 127, 255, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name, pixels", [("a.png", COLOUR), ("a.tif", COLOUR), ("b.png", DEEP)])
def test_pictures_are_upright(tmp_path, orientation, name, pixels):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels[::-1].swapaxes(0, 1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: pixels[:, ::-1].swapaxes(0, 1),
    }
    stack, (got,) = frames(tmp_path / name)
    assert np.array_equal(got, turned[orientation]) and stack.shape == got.shape[:2]


def plain_tiff(path, array, photometric, sample_format=1):
    """An uncompressed grey TIFF with one strip, by the specification's own words."""
    height, width = array.shape
    tags = {256: width, 257: height, 258: 8 * array.itemsize, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    tags |= {279: array.nbytes, 339: sample_format}
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    start = b"II*\0" + struct.pack("<L", 8 + len(data))
    path.write_bytes(start + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


def test_white_is_zero_in_a_tiff(tmp_path):
    """Of 8 bits it comes out upright; deeper numbers stay as they are, and the normalised image is to be inverted."""
    stack, got = frames(plain_tiff(tmp_path / "a.tif", GREY, 0))
    assert not stack.inverted and np.array_equal(got[0], 255 - GREY)
    stack, got = frames(plain_tiff(tmp_path / "b.tif", DEEP, 0))
    assert stack.inverted and np.array_equal(got[0], DEEP)
    stack, got = frames(plain_tiff(tmp_path / "c.tif", DEEP, 1))
    assert not stack.inverted and np.array_equal(got[0], DEEP)


def test_signs_of_a_tiff(tmp_path):
    large = DEEP.astype(np.uint32) * 2**16
    assert large.max() >= 2**31
    _, got = frames(plain_tiff(tmp_path / "a.tif", large, 1))
    assert np.array_equal(got[0], large.astype(np.float32))
    signed = large.view(np.int32)
    _, got = frames(plain_tiff(tmp_path / "b.tif", signed, 1, sample_format=2))
    assert np.array_equal(got[0], signed.astype(np.float32))
    with pytest.raises(Refused, match="unsupported: signed"):
        frames(plain_tiff(tmp_path / "c.tif", GREY.view(np.int8), 1, sample_format=2))


def test_pages_of_a_tiff(tmp_path):
    pages = [Image.fromarray(DEEP + n) for n in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=[*pages[1:], Image.fromarray(GREY)])
    stack, got = frames(tmp_path / "a.tif")
    assert len(got) == 3 and all(np.array_equal(page, DEEP + n) for n, page in enumerate(got))
    assert stack.length == 3 and [error.reason for error in stack.refused] == ["inconsistent"]
    assert [f.label for f in stack.frames(("stored",), 2)] == ["frame-0000", "frame-0002"]


def test_pictures_that_ask_for_too_much(tmp_path):
    def png(width, height):
        def chunk(kind, data):
            return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

        head = chunk(b"IHDR", struct.pack(">2L5B", width, height, 8, 0, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")

    (tmp_path / "a.png").write_bytes(png(20000, 20000))
    (tmp_path / "b.png").write_bytes(png(8000, 8000))
    (tmp_path / "c.png").write_bytes(png(500, 500))
    for name, reason in (("a.png", "unreadable"), ("b.png", "unreadable"), ("c.png", "unreadable")):
        with pytest.raises(Refused) as caught:
            frames(tmp_path / name)
        assert caught.value.reason == reason
    tags = [(256, 100), (257, 100), (258, 8), (259, 8), (262, 1), (277, 1), (322, 60000), (323, 60000)]
    tags += [(324, 400), (325, 100)]
    body = b"II*\0" + struct.pack("<LH", 8, len(tags))
    body += b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags) + bytes(4)
    (tmp_path / "d.tif").write_bytes(body.ljust(400, b"\0") + zlib.compress(bytes(10**6)))
    with pytest.raises(Refused, match="tiles of 60000"):
        frames(tmp_path / "d.tif")
    for content in (b"", b"rubbish", b"GIF89a" + bytes(100)):
        (tmp_path / "e.png").write_bytes(content)
        with pytest.raises(Refused, match="unreadable"):
            frames(tmp_path / "e.png")


def at_a_part(path, enough):
    """The stack and its only frame, where `enough` pixels of the shorter side suffice."""
    (stack,) = read([path], "picture", enough=enough)
    return stack, next(stack.frames(("stored",), 1)).pixels


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """Colour, 250 x 198."""
    dataset = open_dataset(None)
    places = np.flatnonzero(dataset.modality_index() == dataset.modalities.index("clinical photography"))
    return Image.fromarray(dataset[places[0]].image.numpy().transpose(1, 2, 0)).crop((0, 0, 250, 198))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"format": "MPO"}], ids=str)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_is_decoded_at_a_part_of_its_sides(tmp_path, photograph, mode, options):
    photograph.convert(mode).save(tmp_path / "a.jpg", quality=95, **options)
    whole = at_a_part(tmp_path / "a.jpg", None)[1].astype(int)
    for enough, by in ((198, 1), (100, 1), (99, 2), (50, 2), (49, 4), (24, 8), (1, 8)):
        stack, pixels = at_a_part(tmp_path / "a.jpg", enough)
        assert stack.shape == pixels.shape[:2] == (-(-198 // by), -(-250 // by))
        assert stack.extent == (None if by == 1 else (198 / by, 250 / by))
        tall, wide = 198 // by, 250 // by  # whole blocks
        means = whole[: tall * by, : wide * by].reshape(tall, by, wide, by, -1).mean(axis=(1, 3))
        difference = np.abs(pixels[:tall, :wide].reshape(means.shape) - means)
        assert difference.mean() < 1.5


def test_a_jpeg_is_turned_after_it_was_decoded_at_a_part(tmp_path, photograph):
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    photograph.save(tmp_path / "plain.jpg", quality=95)
    stack, pixels = at_a_part(tmp_path / "turned.jpg", 60)
    assert stack.extent == (250 / 2, 198 / 2) and stack.shape == (125, 99)
    assert np.array_equal(pixels, np.rot90(at_a_part(tmp_path / "plain.jpg", 60)[1], -1))


def test_what_is_never_decoded_at_a_part(tmp_path, photograph):
    photograph.save(tmp_path / "a.png")
    assert at_a_part(tmp_path / "a.png", 8)[0].extent is None
    photograph.save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    frame = data.index(b"\xff\xc0")
    for name, changed, extent in (
        ("filled.jpg", data[:frame] + b"\xff" * 5 + data[frame:], (198 / 8, 250 / 8)),
        ("lossless.jpg", data[:frame] + b"\xff\xc3" + data[frame + 2 :], None),
    ):
        (tmp_path / name).write_bytes(changed)
        (stack,) = read([tmp_path / name], "picture", enough=8)
        assert stack.extent == extent
