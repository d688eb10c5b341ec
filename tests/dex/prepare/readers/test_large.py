"""Pictures of more pixels than a frame may have, with limits that make small ones large."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dex.data.images import TRANSPOSE
from dex.prepare import readers
from dex.prepare.readers import Limits, Refused, large

HEIGHT, WIDTH, SIDE = 210, 330, 64
LIMITS = Limits(pixels=10_000)
DRAW = np.random.default_rng(6)
SMOOTH = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) * 100 % 60000


def colour():
    return DRAW.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def read(path, **more):
    (stack,) = readers.read([path], "picture", **{"limits": LIMITS} | more)
    return stack


def pieces_of(pixels):
    return [
        (f"image-x{x}-y{y}-s{SIDE}", pixels[y : y + SIDE, x : x + SIDE])
        for y in range(0, len(pixels) - SIDE + 1, SIDE)
        for x in range(0, pixels.shape[1] - SIDE + 1, SIDE)
    ]


def tiff(pixels, tile=None, rows=None, planar=1, pack=None, order="<", big=False, more=()):
    """The bytes of a TIFF of tiles, (tall, wide), or of strips of some rows."""
    samples = 1 if pixels.ndim == 2 else pixels.shape[2]
    tall, wide = tile or (rows or len(pixels), pixels.shape[1])
    planes = [pixels] if planar == 1 else [pixels[..., c] for c in range(samples)]
    parts = []
    for plane in planes:
        for y in range(0, len(pixels), tall):
            for x in range(0, pixels.shape[1], wide):
                part = plane[y : y + tall, x : x + wide]
                if tile:
                    part = np.pad(
                        part, [(0, tall - part.shape[0]), (0, wide - part.shape[1])] + [(0, 0)] * (part.ndim - 2)
                    )
                data = part.astype(part.dtype.newbyteorder(order)).tobytes()
                parts.append(pack(data) if pack else data)
    start = 16 if big else 8
    offsets = np.cumsum([start, *map(len, parts)]).tolist()
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags = [
        *((256, 4, [pixels.shape[1]]), (257, 4, [len(pixels)]), (258, 3, [8 * pixels.itemsize] * samples)),
        *((259, 3, [8 if pack else 1]), (262, 3, [1 if samples == 1 else 2]), (277, 3, [samples])),
        *((284, 3, [planar]), (339, 3, [kind] * samples), *more),
    ]
    tags += [(322, 4, [wide]), (323, 4, [tall])] if tile else [(278, 4, [tall])]
    tags += [(324 if tile else 273, 4, offsets[:-1]), (325 if tile else 279, 4, list(map(len, parts)))]
    tags.sort()
    entry, room, count = ("HHQ", 8, "Q") if big else ("HHL", 4, "H")
    behind = offsets[-1] + struct.calcsize(order + count) + len(tags) * (struct.calcsize(order + entry) + room) + room
    entries = values = b""
    for tag, form, numbers in tags:
        data = struct.pack(f"{order}{len(numbers)}{'H' if form == 3 else 'L'}", *numbers)
        entries += struct.pack(order + entry, tag, form, len(numbers))
        if len(data) <= room:
            entries += data.ljust(room, b"\0")
        else:
            entries += struct.pack(order + ("Q" if big else "L"), behind + len(values))
            values += data
    magic = b"II" if order == "<" else b"MM"
    head = magic + (
        struct.pack(order + "HHHQ", 43, 8, 0, offsets[-1]) if big else struct.pack(order + "HL", 42, offsets[-1])
    )
    directory = struct.pack(order + count, len(tags)) + entries + bytes(room)
    return head + b"".join(parts) + directory + values


GREY = DRAW.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
DEEP = SMOOTH.astype(np.uint16)
FORMS = {
    "one strip": (colour(), {}),
    "strips": (colour(), {"rows": 7}),
    "packed strips": (colour(), {"rows": 7, "pack": zlib.compress}),
    "packed strip": (colour(), {"pack": zlib.compress}),
    "tiles": (colour(), {"tile": (48, 80)}),
    "packed tiles": (colour(), {"tile": (48, 80), "pack": zlib.compress}),
    "large tiles": (colour(), {"tile": (256, 512)}),
    "planes": (colour(), {"tile": (48, 80), "planar": 2}),
    "strips of planes": (colour(), {"rows": 7, "planar": 2, "pack": zlib.compress}),
    "big": (colour(), {"tile": (48, 80), "big": True}),
    "grey": (GREY, {"rows": 1}),
    "16 bits": (DEEP, {"tile": (48, 80)}),
    "16 bits, one strip": (DEEP, {"order": ">"}),
    "16 bits, the other order": (DEEP, {"tile": (48, 80), "order": ">", "pack": zlib.compress}),
    "floats": (SMOOTH.astype(np.float32) / 7, {"tile": (48, 80)}),
    "32 bits": ((SMOOTH * 60_000).astype(np.uint32), {"rows": 9}),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_tiff_is_cut_into_pieces(tmp_path, name):
    pixels, form = FORMS[name]
    (tmp_path / "a.tif").write_bytes(tiff(pixels, **form))
    stack = read(tmp_path / "a.tif", pieces=SIDE)
    frames = list(stack.frames(("stored",), 1))
    expected = pieces_of(pixels)
    assert [frame.label for frame in frames] == [label for label, _ in expected] and len(frames) == 15
    for frame, (_, piece) in zip(frames, expected, strict=True):
        assert np.array_equal(frame.pixels, piece if pixels.dtype == np.uint8 else piece.astype(np.float32))
    assert stack.length == 15 and not stack.volume and len(stack.origins) == 15
    some = list(stack.sample([3, 14]))
    assert all(np.array_equal(some[n], expected[place][1]) for n, place in enumerate((3, 14)))
    if pixels.ndim == 2 and pixels.dtype != np.uint8:  # numbers are scaled as those of one picture
        shown = np.stack([piece for _, piece in expected]).astype(np.float32)
        assert stack.percentiles(1, 99) == pytest.approx(np.percentile(shown, (1, 99)), rel=1e-6)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.ppm", "a.jp2", "a.webp", "a.tif"])
def test_other_formats_are_cut_into_the_same_pieces(tmp_path, name):
    pixels = colour()
    more = {"lossless": True} if name == "a.webp" else {"compression": "tiff_lzw"} if name == "a.tif" else {}
    Image.fromarray(pixels).save(tmp_path / name, **more)
    frames = list(read(tmp_path / name, pieces=SIDE).frames(("stored",), 1))
    assert all(np.array_equal(a.pixels, b) for a, (_, b) in zip(frames, pieces_of(pixels), strict=True))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pieces_are_upright(tmp_path, orientation, monkeypatch):
    """Each is turned in its place."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = colour()
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.tif").write_bytes(tiff(stored, tile=(48, 80), more=[(274, 3, [orientation])]))
    (upright,) = readers.read([tmp_path / "a.png"], "picture")
    whole = next(upright.frames(("stored",), 1)).pixels
    turned = [np.asarray(Image.fromarray(piece)) for _, piece in pieces_of(stored)]
    for name in ("a.png", "a.tif"):
        frames = [frame.pixels for frame in read(tmp_path / name, pieces=SIDE).frames(("stored",), 1)]
        for frame, piece in zip(frames, turned, strict=True):
            image = Image.fromarray(piece)
            image.getexif()[0x0112] = orientation
            wanted = np.asarray(image.transpose(TRANSPOSE[orientation]) if orientation > 1 else image)
            assert np.array_equal(frame, wanted)
    for name, cell in (("a.png", large._CELL), ("a.tif", large._CELL), ("a.tif", 100)):  # or is shrunk, by Pillow whole
        monkeypatch.setattr(large, "_CELL", cell)
        shrunk = read(tmp_path / name)
        (frame,) = shrunk.frames(("stored",), 1)
        by = round(whole.shape[0] / frame.pixels.shape[0])
        assert frame.pixels.shape[:2] == shrunk.shape == tuple(side // by for side in whole.shape[:2])


@pytest.mark.parametrize("name", [name for name, (_, form) in FORMS.items() if "big" not in form])
def test_without_pieces_a_picture_is_shrunk_by_means_of_neighbours(tmp_path, name):
    pixels, form = FORMS[name]
    (tmp_path / "a.tif").write_bytes(tiff(pixels, **form))
    stack = read(tmp_path / "a.tif")
    (frame,) = stack.frames(("stored",), 1)
    assert frame.label == "image" and stack.shape == (HEIGHT // 3, WIDTH // 3)  # 7,700 pixels
    means = pixels.reshape(HEIGHT // 3, 3, WIDTH // 3, 3, *pixels.shape[2:]).mean(axis=(1, 3), dtype=np.float64)
    bound = 0.6 if pixels.dtype == np.uint8 else 0.51 if pixels.dtype == np.uint16 else means.max() * 2e-7
    assert np.abs(frame.pixels - means).max() <= bound
    assert np.array_equal(np.concatenate(list(stack.sample([0]))), pixels)  # labels are judged by what was stored


@pytest.mark.parametrize(("name", "by"), [("a.jpg", 4), ("a.jp2", 4)])
def test_decoders_that_divide_the_sides_do(tmp_path, name, by):
    pixels = np.stack([SMOOTH // 250] * 3, axis=2).astype(np.uint8)[:, :, ::-1]
    Image.fromarray(pixels).save(tmp_path / name, **({"quality": 95} if name == "a.jpg" else {}))
    stack = read(tmp_path / name)
    (frame,) = stack.frames(("stored",), 1)
    assert stack.shape == frame.pixels.shape[:2] == (-(-HEIGHT // by), -(-WIDTH // by))
    assert stack.extent == (HEIGHT / by, WIDTH / by)
    inner = pixels[: HEIGHT // by * by, : WIDTH // by * by]
    means = inner.reshape(HEIGHT // by, by, WIDTH // by, by, 3).mean(axis=(1, 3))
    assert np.median(np.abs(frame.pixels[: HEIGHT // by, : WIDTH // by] - means)) < 4


def test_the_first_large_page_is_taken(tmp_path):
    small, pixels = colour()[:50, :60], colour()
    images = [Image.fromarray(page) for page in (small, pixels, small)]
    images[0].save(tmp_path / "a.tif", save_all=True, append_images=images[1:], compression="tiff_deflate")
    stack = read(tmp_path / "a.tif", pieces=SIDE)
    frames = list(stack.frames(("stored",), 1))
    assert all(np.array_equal(a.pixels, b) for a, (_, b) in zip(frames, pieces_of(pixels), strict=True))
    assert [str(one) for one in stack.refused] == ["inconsistent: a page beside the large one"] * 2
    assert stack.origins[0] == ("", 1)


def test_jpegs_in_a_tiff_keep_their_tables(tmp_path):
    pixels = np.stack([SMOOTH // 250] * 3, axis=2).astype(np.uint8)
    more = {"compression": "jpeg", "tiffinfo": {278: 16}}
    Image.fromarray(pixels).save(tmp_path / "a.tif", **more)
    (whole,) = readers.read([tmp_path / "a.tif"], "picture")
    decoded = next(whole.frames(("stored",), 1)).pixels
    stack = read(tmp_path / "a.tif", pieces=SIDE)
    for frame, (_, piece) in zip(stack.frames(("stored",), 1), pieces_of(decoded), strict=True):
        assert np.array_equal(frame.pixels, piece)


def test_what_does_not_fit_says_which_memory_would_do(tmp_path):
    Image.new("L", (20_000, 20_000)).save(tmp_path / "a.png", compress_level=1)
    with pytest.raises(
        Refused, match=r"20000 x 20000 pixels, .* take 446 MB; give --memory 446, or save it as a tiled TIFF"
    ):
        read(tmp_path / "a.png", limits=Limits.within(256), pieces=SIDE)


@pytest.mark.parametrize(
    ("data", "reason", "says"),
    [
        (tiff(colour(), tile=(48, 80))[:5000], "unreadable", ""),
        (tiff(np.zeros((HEIGHT, WIDTH, 3), np.uint16), planar=2), "unsupported", "in separate planes"),
    ],
)
def test_large_tiffs_that_are_refused(tmp_path, data, reason, says):
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(Refused, match=says) as caught:
        list(read(tmp_path / "a.tif", pieces=SIDE).frames(("stored",), 1))
    assert caught.value.reason == reason


def test_a_tiff_that_lacks_tiles_is_refused(tmp_path):
    data = tiff(colour(), tile=(48, 80))
    place = data.rindex(struct.pack("<LL", 48 * 80 * 3, 48 * 80 * 3))
    (tmp_path / "a.tif").write_bytes(data[:place] + bytes(4) + data[place + 4 :])
    with pytest.raises(Refused, match="missing tiles"):
        read(tmp_path / "a.tif", pieces=SIDE)
