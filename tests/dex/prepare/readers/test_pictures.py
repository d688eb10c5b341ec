"""Pictures, arrays and videos that the tests write, and files that ask for more than they are."""

import io
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from dex.prepare import readers
from dex.prepare.readers import Refused

DRAW = np.random.default_rng(4)
GREY = DRAW.integers(0, 256, (20, 30), dtype=np.uint8)
COLOUR = DRAW.integers(0, 256, (20, 30, 3), dtype=np.uint8)
DEEP = DRAW.integers(0, 65536, (20, 30), dtype=np.uint16)


def read(path, **more):
    return list(readers.read([path], readers.format_of(path), **more))


def frames(path):
    (stack,) = read(path)
    return stack, [frame.pixels for frame in stack.frames(("axial",), 1)]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_eight_bits(tmp_path, suffix, pixels):
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    stack, (got,) = frames(tmp_path / f"a.{suffix}")
    assert stack.quantity == "display8" and not stack.volume and np.array_equal(got, pixels)


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
    for name, reason in (("a.png", "too large"), ("b.png", "too large"), ("c.png", "unreadable")):
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


# arrays


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "array, quantity, expected",
    [
        (GREY, "display8", GREY[None]),
        (COLOUR, "display8", COLOUR[None]),
        (DEEP, "raw", DEEP[None]),
        (DEEP.astype(">u2"), "raw", DEEP[None]),
        (np.stack([DEEP, DEEP + 1]), "raw", np.stack([DEEP, DEEP + 1])),
        (np.stack([COLOUR, 255 - COLOUR]), "display8", np.stack([COLOUR, 255 - COLOUR])),
        (COLOUR[:, :, :1], "display8", COLOUR[None, :, :, 0]),
        (COLOUR / 255.0, "display8", COLOUR[None]),
        (COLOUR.astype(np.uint16) * 257, "display8", COLOUR[None]),
        (GREY > 99, "display8", np.where(GREY > 99, 255, 0)[None]),
        (GREY * -1e3, "raw", GREY[None] * -1e3),
        (GREY.astype(np.float16), "raw", GREY[None]),
        (GREY.astype(np.int64) * 10**12, "raw", (GREY[None].astype(np.int64) * 10**12).astype(np.float32)),
    ],
)
def test_npy(tmp_path, order, array, quantity, expected):
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))
    stack, got = frames(tmp_path / "a.npy")
    assert stack.quantity == quantity and stack.described and stack.volume == (len(expected) > 1)
    assert np.allclose(np.stack(got), expected, rtol=1e-6)


class Canary:
    def __reduce__(self):
        return os.mkdir, ("/tmp/dex-canary-of-the-readers-test",)


def test_npy_that_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[Canary()]], object), allow_pickle=True)
    cases = [(tmp_path / "a.npy").read_bytes()]
    for array in (np.zeros(5), np.zeros((2, 2, 2, 2)), np.zeros((0, 5)), np.zeros((3, 3), complex), np.array([["a"]])):
        np.save(tmp_path / "a.npy", array)
        cases.append((tmp_path / "a.npy").read_bytes())
    np.save(tmp_path / "a.npy", GREY)
    whole = (tmp_path / "a.npy").read_bytes()
    cases += [whole[:-1], whole + b"x", b"", whole[:20], whole.replace(b"(20, 30)", b"(20,-30)")]
    cases.append(whole.replace(b"20, 30), }        ", b"200000, 300000), }"))  # asks for 56 GiB
    for number, content in enumerate(cases):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(Refused) as caught:
            frames(tmp_path / "a.npy")
        assert caught.value.reason in ("unreadable", "unsupported"), number
    assert not os.path.exists("/tmp/dex-canary-of-the-readers-test")
    np.save(tmp_path / "a.npy", np.where(COLOUR > 9, 2.0, np.nan))
    with pytest.raises(Refused, match="within 0 and 1"):
        frames(tmp_path / "a.npy")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    save(tmp_path / "a.npz", b=GREY, a=np.stack([DEEP, DEEP]), c=np.zeros(4))
    first, second = read(tmp_path / "a.npz")
    assert (first.series, second.series) == ("a", "b") and (first.length, second.length) == (2, 1)
    assert np.array_equal([f.pixels for f in first.frames(("axial",), 1)], [DEEP, DEEP])
    assert np.array_equal(next(second.frames(("axial",), 1)).pixels, GREY)
    assert [error.reason for error in first.refused] == ["unsupported"] and not second.refused


def test_npz_that_is_refused(tmp_path):
    path = tmp_path / "a.npz"

    def member(shape, size, method=zipfile.ZIP_DEFLATED):
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("../a.npy", head.getvalue() + bytes(size))

    for arguments, reason in (
        (((1000, 1000, 300), 1000), "unreadable"),
        (((20, 30), 2399), "unreadable"),
        (((20, 30), 2400, zipfile.ZIP_BZIP2), "unsupported"),
    ):
        member(*arguments)
        with pytest.raises(Refused) as caught:
            read(path)
        assert caught.value.reason == reason
    member((1000, 1000), 4 * 10**6)
    with pytest.raises(Refused, match="too large"):
        read(path, limits=readers.Limits(memory_mb=40))
    member((20, 30), 2400)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:50], b"PK\x03\x04" + bytes(100), whole + b"comment"):
        path.write_bytes(damaged)
        with pytest.raises(Refused, match="unreadable"):
            read(path)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(1001):
            archive.writestr(str(number), b"")
    with pytest.raises(Refused, match="1001 arrays"):
        read(path)


# videos


def video(path, frames, code, size=(64, 48)):
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 10, size)
    assert writer.isOpened()
    for number in range(frames):
        frame = np.zeros((size[1], size[0], 3), np.uint8)
        frame[:, :32] = (255, 0, 0)  # blue, since OpenCV's order is the reverse
        frame[:24, 32:] = 2 * number
        writer.write(frame)
    writer.release()
    return path


@pytest.mark.parametrize("name, code", [("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "MJPG"), ("a.mov", "mp4v")])
def test_video(tmp_path, name, code):
    (stack,) = read(video(tmp_path / name, 70, code))
    assert stack.quantity == "display8" and not stack.volume and stack.shape == (48, 64)
    got = list(stack.frames(("axial",), 30))
    assert [frame.label for frame in got] == ["frame-0000", "frame-0030", "frame-0060"]
    for number, frame in zip((0, 30, 60), got, strict=True):
        assert frame.pixels.dtype == np.uint8 and np.abs(frame.pixels[36, 10].astype(int) - [0, 0, 255]).max() < 12
        assert np.abs(frame.pixels[10, 50].astype(int) - 2 * number).max() < 8
    assert len(list(stack.frames(("axial",), 1))) == 70  # again, from the start


@pytest.mark.parametrize("name, code", [("a.avi", "MJPG"), ("a.mkv", "mp4v")])
def test_a_video_that_was_cut_off_says_so(tmp_path, name, code):
    data = video(tmp_path / name, 70, code).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    (stack,) = read(tmp_path / name)
    for _ in range(2):
        assert 0 < len(list(stack.frames(("axial",), 1))) < 63
        (part,) = stack.refused
        assert part.reason == "inconsistent" and part.detail.startswith("70 frames declared, ")


def test_what_is_no_video_container_is_not_opened(tmp_path, capfd):
    pytest.importorskip("cv2")
    real = video(tmp_path / "a.mp4", 3, "mp4v")
    playlists = {
        "b.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{real}\n#EXT-X-ENDLIST\n",
        "c.avi": f"ffconcat version 1.0\nfile '{real}'\n",
        "d.mkv": "http://127.0.0.1:9/a.mp4",
        "e.mov": f"v=0\nc=IN IP4 127.0.0.1\n{real}",
    }
    for name, text in playlists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(Refused, match="not a video container"):
            read(tmp_path / name)
    whole = real.read_bytes()
    for content in (whole[:200], whole[:8] + bytes(1000), b"RIFF" + bytes(4) + b"AVI " + bytes(500)):
        (tmp_path / "b.mp4").write_bytes(content)
        with pytest.raises(Refused) as caught:
            list(read(tmp_path / "b.mp4")[0].frames(("axial",), 1))
        assert caught.value.reason in ("unreadable", "no image", "unsupported")
    out, error = capfd.readouterr()
    assert str(tmp_path) not in out + error


def test_only_the_recognised_demuxer_and_files_are_allowed(tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    seen = []
    real = cv2.VideoCapture
    monkeypatch.setattr(
        cv2,
        "VideoCapture",
        lambda *arguments: (seen.append((arguments[0], os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"])), real(*arguments))[
            1
        ],
    )
    monkeypatch.setenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", "mine;1")
    read(video(tmp_path / "a.avi", 3, "MJPG"))
    ((name, options),) = seen
    assert name.startswith("/dev/fd/") and options == "protocol_whitelist;file|format_whitelist;avi"
    assert os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] == "mine;1"
    monkeypatch.setattr(readers.video, "_demuxer", lambda file, limits: "mov")  # the content is an AVI's
    with pytest.raises(Refused, match="unreadable"):
        read(tmp_path / "a.avi")


def test_a_video_that_declares_too_much(tmp_path):
    pytest.importorskip("cv2")
    for name, code, mark, back in (("a.avi", "MJPG", b"avih", 40), ("a.mp4", "mp4v", b"tkhd", 80)):
        data = bytearray(video(tmp_path / name, 3, code).read_bytes())
        place = data.index(mark) + back
        if code == "MJPG":
            data[place : place + 8] = struct.pack("<2L", 60000, 60000)
        else:
            data[place : place + 8] = struct.pack(">2L", 60000 << 16, 60000 << 16)
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Refused, match="too large"):
            read(tmp_path / name)
